"""Contestants take turns, round by round; the machine's limits are measured in each round too."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.cpu_kernels.contestant import Contestant
from benchmarks.cpu_kernels.roofline import Roofline

MIN_ROUNDS, MAX_ROUNDS = 11, 80
WARM_BYTES = 32 << 20
"""A smaller product's time is taken at its second call in a row: the first also pays for cold code.
Both read other copies."""


@dataclass(frozen=True, slots=True)
class Times:
    """Of one shape, form and token count; every list has an entry for each round."""

    seconds: dict[str, list[float]]  # by contestant
    read_bandwidth: float  # median, bytes/s
    dot_peak: float  # median, multiply-adds/s

    def ratio(self, name: str, rival: str) -> float:
        """How many times `name` is faster than `rival`: the median of the rounds' own ratios."""
        pairs = zip(self.seconds[rival], self.seconds[name], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)

    def quantiles(self, name: str) -> tuple[float, float, float]:
        """p20, p50 and p80 in seconds."""
        tenths = statistics.quantiles(self.seconds[name], n=10)
        return tenths[1], tenths[4], tenths[7]


def take_turns(
    contestants: list[Contestant], x_TK: torch.Tensor, roofline: Roofline, budget_s: float
) -> Times:
    """Rounds until the budget is spent; who comes first moves on by one each round."""
    calls = {each.name: each.start(x_TK) for each in contestants}
    small = {each.name for each in contestants if each.num_bytes < WARM_BYTES}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    reads, peaks = [], []
    ends = time.perf_counter() + budget_s
    names = list(calls)
    while len(reads) < MIN_ROUNDS or (len(reads) < MAX_ROUNDS and time.perf_counter() < ends):
        turn = len(reads)
        reads.append(roofline.read_bandwidth())
        peaks.append(roofline.dot_peak())
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            copies = calls[name]
            if name in small:
                copies[2 * turn % len(copies)]()
            started = time.perf_counter()
            copies[(2 * turn + 1) % len(copies)]()
            seconds[name].append(time.perf_counter() - started)
    return Times(seconds, statistics.median(reads), statistics.median(peaks))
