"""The stores of the contestants, made in the cache folder when they are not there.

Also the calibration that recipe best needs, from the built-in text (`moetier calibrate`'s own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.offload_parts.contestants import StoreName
from cluster.calibrate import calibrate
from cluster.docstrings import built_in_calibration_text
from cluster.environment import cache_folder
from cluster.stores import compressed_store, original_store
from expert_store.calibration import is_calibration
from expert_store.config import CompressionConfig

SMALLEST_BITS = 2.25
"""Of recipe best: 2-bit codes of one float16 scale per 64 weights, nothing less is stored."""


class Stores:
    """Finds or makes the stores of one model.

    `bits_of_paper` gives the bits moved per weight that the paper's store was measured to move,
    which is the budget of "best".
    """

    def __init__(
        self,
        model: Path,
        calibration: Path | None,
        bits_of_paper: Callable[[Path], float],
    ) -> None:
        self._model = model
        self._calibration = calibration
        self._bits_of_paper = bits_of_paper

    def make(self, names: Iterable[StoreName]) -> dict[StoreName, Path]:
        """The folder of each."""
        return {name: self._one(name) for name in dict.fromkeys(names)}

    def _one(self, name: StoreName) -> Path:
        if name == "original":
            return original_store(self._model)
        return compressed_store(self._model, self._config(name))

    def _config(self, name: StoreName) -> CompressionConfig:
        if name == "paper":
            return CompressionConfig("paper", bits=2)
        if name == "best":
            # Down to two digits: the texts' routing is not the calibration's, so it is no bound.
            bits = int(100 * self._bits_of_paper(self._one("paper"))) / 100
            return CompressionConfig("best", budget=bits, calibration=self._calibrated())
        if name == "best 2.25":
            calibration = self._calibrated()
            return CompressionConfig("best", budget=SMALLEST_BITS, calibration=calibration)
        return CompressionConfig("static", bits=int(name.removeprefix("static ")))

    def _calibrated(self) -> Path:
        if self._calibration is None:
            name = original_store(self._model).name  # a digest of the checkpoint's files is in it
            folder = cache_folder() / "calibrations" / f"{name}-docstrings"
            if not is_calibration(folder):
                calibrate(self._model, folder, [built_in_calibration_text()])
            self._calibration = folder
        return self._calibration
