"""Arithmetic behind a report: fronts, rank correlation, intervals. Knows no row and no page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

CONFIDENCE = 0.95
_LEAST_FREEDOM = 3
"""Below, the expansion of Student's quantile is off by more than a few per cent."""
_QUANTILES = {1: 12.706, 2: 4.303}
"""Student's, two-sided 95 %, where the expansion does not hold."""


class Point(NamedTuple):
    """What a variant costs and what it loses; less of either is better."""

    cost: float
    loss: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval; without one when there was a single value."""

    mean: float
    low: float
    high: float
    num_values: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    @property
    def is_certain(self) -> bool:
        """Whether the interval excludes 0; never for a single value."""
        return self.num_values > 1 and (self.low > 0 or self.high < 0)


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is nowhere worse than `other` and somewhere better."""
    return one.cost <= other.cost and one.loss <= other.loss and one != other


def on_front(points: Sequence[Point]) -> list[bool]:
    """For each point, whether no other one dominates it; equal points are both on the front."""
    return [not any(dominates(other, point) for other in points) for point in points]


def interval(values: Sequence[float]) -> Interval:
    """Student's two-sided 95 % interval of the mean. Raises ValueError without values."""
    if not values:
        raise ValueError("values: got none, expected at least one")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, mean, mean, 1)
    half = student_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(mine: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of mine minus theirs, pair by pair. Raises ValueError when they are not of one length."""
    return interval([a - b for a, b in zip(mine, theirs, strict=True)])


def student_quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, good to 1 % (Fisher's expansion)."""
    if freedom < 1:
        raise ValueError(f"freedom: got {freedom}, expected at least 1")
    if freedom < _LEAST_FREEDOM:
        return _QUANTILES[freedom]
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Rank correlation, -1 to 1, equal values at their mean rank; None where it is not defined:
    fewer than two pairs, or one side all equal. Raises ValueError for unequal lengths."""
    if len(xs) != len(ys):
        raise ValueError(f"pairs: got {len(xs)} and {len(ys)} values, expected as many of each")
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    return statistics.correlation(_ranks(xs), _ranks(ys))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2
        start = end + 1
    return ranks
