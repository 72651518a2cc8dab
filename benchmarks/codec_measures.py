"""What the benchmarks of codecs have in common: the fastest of some runs, and an error."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

REPEATS = 3

Weights = dict[str, torch.Tensor]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of the fastest of some runs, and what it gave."""
    best = float("inf")
    for _ in range(REPEATS):
        start_s = time.process_time()
        result = run()
        best = min(best, time.process_time() - start_s)
    return best, result


def relative_error(served: torch.Tensor, weight: torch.Tensor) -> float:
    return float((served.double() - weight.double()).norm() / weight.double().norm())
