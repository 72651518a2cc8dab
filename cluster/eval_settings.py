"""What an evaluation measures, and the variants it compares: plain values, checked at the door."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_worker.config import WorkerConfig
from gpu_worker.restoring import Restore


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """What is measured. Raises ValueError naming field, value and what is allowed.

    - windows of window_tokens predicted tokens each give the quality;
    - bytes per token are counted while sequences decode decode_tokens each, one token a step: every
      number of sequences in batch side by side, with a cache of every cache_percent of the store's
      codes bytes, after warm_up steps;
    - seed None takes windows from fixed places of a text, else from random ones.
    """

    windows: int = 32
    window_tokens: int = 256
    decode_tokens: int = 40
    warm_up: int = 8
    batch: tuple[int, ...] = (1, 8)
    cache_percent: tuple[float, ...] = (0.0, 25.0, 50.0)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("windows", "window_tokens", "decode_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.decode_tokens > self.window_tokens:
            raise ValueError(
                f"decode_tokens: got {self.decode_tokens}, expected at most the "
                f"{self.window_tokens} window_tokens that they are taken from"
            )
        if not 0 <= self.warm_up < self.decode_tokens:
            raise ValueError(
                f"warm_up: got {self.warm_up}, expected 0 to {self.decode_tokens - 1}, less than "
                "decode_tokens"
            )
        for name in ("batch", "cache_percent"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: got {list(values)}, expected one or more, all different")
        for batch in self.batch:
            if not 1 <= batch <= self.windows:
                raise ValueError(
                    f"batch: got {batch}, expected 1 to the {self.windows} windows, each of which "
                    "decodes as one sequence"
                )
        for percent in self.cache_percent:
            if not (math.isfinite(percent) and 0 <= percent <= 1000):
                raise ValueError(f"cache_percent: got {percent}, expected 0 to 1000")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the experts: of which store, and the worker's policies for their pairs.

    The fields from `restore` on are `WorkerConfig`'s, which checks them.
    """

    label: str
    store: Path
    top_n: int | None = None  # None: what the store says
    near_data: bool = False
    restore: Restore = "top_n"
    restore_mass: float | None = None
    restore_benefit: float | None = None
    restore_seed: int = 0
    skip_below: float = 0.0
    factor_share: float = 1.0

    def policies(self) -> dict[str, Any]:
        """The fields that go into a WorkerConfig as they are."""
        shared = {item.name for item in dataclasses.fields(WorkerConfig)} - {"near_data"}
        names = [item.name for item in dataclasses.fields(self) if item.name in shared]
        return {name: getattr(self, name) for name in names}
