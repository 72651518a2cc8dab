"""Made-up traces by name: poisson, step, diurnal, bursts. The same seed gives the same requests.

Arrivals are a Poisson process whose rate changes with time; lengths are log-normal, as those of
public traces roughly are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from cluster.tune.trace import MAX_REQUESTS, Request, Trace

SPREAD = 0.6
"""Standard deviation of the logarithm of lengths."""
BURST_S, BETWEEN_BURSTS_S, BURST_TIMES = 60.0, 420.0, 4.0
"""A burst's mean length, the mean quiet between two, and how many times the rate it has."""


@dataclass(frozen=True, slots=True)
class Made:
    """What to make: kind, seconds, mean rate, mean lengths. Raises ValueError for nonsense."""

    kind: str
    seconds: float = 1800.0
    rate_per_s: float = 2.0
    prompt_tokens: int = 256
    answer_tokens: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        for name, most in (("seconds", 7 * 86400), ("rate_per_s", 10_000)):
            if not 0 < getattr(self, name) <= most:
                got = getattr(self, name)
                raise ValueError(f"{name}: got {got}, expected more than 0, at most {most}")
        if self.seconds * self.rate_per_s > MAX_REQUESTS / 2:
            raise ValueError(f"rate_per_s: {self.rate_per_s:g} for {self.seconds:g} s is too much")
        for name in ("prompt_tokens", "answer_tokens"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 to 1000000")


Rate = Callable[[float], float]
"""Seconds -> how many times the mean rate."""


def generate(made: Made) -> Trace:
    """The trace. Arrivals are thinned from the largest rate, so that any rate can be followed."""
    draw = random.Random(f"{made.kind} {made.seed}")
    rate, most = KINDS[made.kind](made, draw)
    requests = []
    now = 0.0
    while True:
        now += draw.expovariate(most * made.rate_per_s)
        if now > made.seconds:
            break
        if draw.random() * most <= rate(now):
            lengths = (_length(draw, made.prompt_tokens), _length(draw, made.answer_tokens))
            requests.append(Request(now, *lengths))
    return Trace(f"{made.kind} (seed {made.seed})", tuple(requests))


def _length(draw: random.Random, mean: int) -> int:
    drawn = draw.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD)
    return max(1, min(round(drawn), 16 * mean))


def _poisson(made: Made, draw: random.Random) -> tuple[Rate, float]:
    return (lambda now: 1.0), 1.0


def _step(made: Made, draw: random.Random) -> tuple[Rate, float]:
    """A third of the time at half the mean rate, a third at twice of it, a third at half again."""
    third = made.seconds / 3
    return (lambda now: 2.0 if third <= now < 2 * third else 0.5), 2.0


def _diurnal(made: Made, draw: random.Random) -> tuple[Rate, float]:
    """Two days' waves in the time there is, from almost nothing to almost twice the mean."""

    def rate(now: float) -> float:
        return 1 - 0.9 * math.cos(4 * math.pi * now / made.seconds)

    return rate, 1.9


def _bursts(made: Made, draw: random.Random) -> tuple[Rate, float]:
    """A quiet rate, and four times of it in bursts of about a minute; the mean is as asked."""
    share = BURST_S / (BURST_S + BETWEEN_BURSTS_S)
    quiet = 1 / (1 + (BURST_TIMES - 1) * share)
    edges, now = [], 0.0
    while now < made.seconds:
        start = now + draw.uniform(0.5, 1.5) * BETWEEN_BURSTS_S
        now = start + draw.uniform(0.5, 1.5) * BURST_S
        edges.append((start, now))

    def rate(at: float) -> float:
        return quiet * (BURST_TIMES if any(a <= at < b for a, b in edges) else 1.0)

    return rate, quiet * BURST_TIMES


KINDS: dict[str, Callable[[Made, random.Random], tuple[Rate, float]]] = {
    "poisson": _poisson,
    "step": _step,
    "diurnal": _diurnal,
    "bursts": _bursts,
}
