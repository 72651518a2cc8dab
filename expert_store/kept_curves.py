"""Measured curves kept in a folder: the same model under another budget need not measure anew.

Knows what curves depend on, and files; how they are measured is `expert_store/planning.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expert_store.calibration import Calibration
from expert_store.config import CompressionConfig
from expert_store.errors import StoreWriteError
from expert_store.files import Disk
from expert_store.sampling import Sample

logger = logging.getLogger(__name__)

_VERSION = 2
"""Raise it when the same methods begin to give other curves."""
_NOT_OF_CURVES = ("allocation", "milo", "codec")


@dataclass(frozen=True, slots=True)
class KeptCurves:
    """The file of one set of curves. `folder` None keeps nothing."""

    folder: Path | None
    id: str
    disk: Disk

    @classmethod
    def of(
        cls,
        folder: Path | None,
        source: str,
        config: CompressionConfig,
        calibration: Calibration | None,
        disk: Disk,
    ) -> KeptCurves:
        """`source` stands for the checkpoint."""
        how = asdict(config.how)
        for name in _NOT_OF_CURVES:
            del how[name]
        heard = calibration.id if calibration is not None and config.how.weighted else ""
        told = [_VERSION, source, heard, config.factor_bits, how]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        return cls(folder, digest, disk)

    def get(
        self, samples: Sequence[Sample], measure: Callable[[Sequence[Sample]], list[Any]]
    ) -> list[Any]:
        """The curves of these samples as JSON values; measured only if they are not kept.

        A folder that cannot be written, or a file that cannot be read, costs the time alone.
        """
        if self.folder is None:
            return measure(samples)
        path = self.folder / f"{self.id}.json"
        asked = [[one.key.layer, one.key.expert, one.whole] for one in samples]
        try:
            kept = json.loads(path.read_text())
            if kept["experts"] == asked:
                return list(kept["curves"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("measuring curves anew: %s: %s", path, error)
        measured = measure(samples)
        text = json.dumps({"experts": asked, "curves": measured}).encode()
        try:
            self.disk.write_atomic(path, len(text), [text])
        except StoreWriteError as error:
            logger.warning("curves are not kept for other budgets: %s", error)
        return measured
