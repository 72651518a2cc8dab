"""What every step is told: where it runs, on which device, with which store. Fixed for a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / ".moetier" / "gpu-check-store"
"""Where `--prepare` puts the store of the bundled model; ignored by git, so it must be carried."""
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
TINY_RESULTS = ROOT / ".moetier" / "gpu-check-tiny"


@dataclass(frozen=True, slots=True)
class Setting:
    """One run of the check.

    tiny: every step on the CPU, kernels under Triton's interpreter, small shapes; times mean
    nothing and are not kept. store: a moetier store for the one-process system.
    """

    tiny: bool
    store: Path

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    def rounds(self, wanted: int) -> int:
        """How often to measure: once where times mean nothing."""
        return 1 if self.tiny else wanted
