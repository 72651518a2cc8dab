"""Looks for settings that cost little and miss little: a Latin hypercube, then around the best.

Knows knobs and scores, no policy. The same seed looks at the same settings in the same order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

FIRST_SHARE = 0.4
"""Of all trials so many are spread over the whole space; the others are near good ones."""
WIDE, NARROW = 0.2, 0.02
"""How far from a good one a trial is drawn, in parts of a knob's range: at first and at the end."""

MOVED_SHARE = 0.5
"""Of a good one's knobs so many are moved at a time; one always is."""

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting from low to high, in equal steps of itself or of its logarithm."""

    name: str
    low: float
    high: float
    is_log: bool = False

    def at(self, place: float) -> float:
        """The value at a place from 0 to 1, to three digits, so that it reads well."""
        place = min(max(place, 0.0), 1.0)
        if self.is_log:
            value = self.low * (self.high / self.low) ** place
        else:
            value = self.low + (self.high - self.low) * place
        return float(f"{value:.3g}")

    def place(self, value: float) -> float:
        """Where a value is, from 0 to 1."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Score:
    """Share of requests that were not served as promised, and what the workers cost, in hours.

    `worst` is the share on the trace with the most: a mean over few traces can keep a promise that
    half of them break, and what is chosen by it breaks it on the next one.
    """

    violations: float
    hours: float
    worst: float


@dataclass(frozen=True, slots=True)
class Trial:
    """Settings and what came of them."""

    values: Values
    score: Score


def search(
    knobs: Sequence[Knob],
    evaluate: Callable[[Values], Score],
    *,
    runs: int,
    limit: float,
    seed: int,
    starts: Sequence[Values] = (),
) -> list[Trial]:
    """`runs` trials: at `starts`, settings known to be fair; then over the whole space; and then
    near the best for `limit` and its neighbours on the front. Raises ValueError for fewer than 2.
    """
    if runs < 2:
        raise ValueError(f"runs: got {runs}, expected 2 or more")
    draw = random.Random(seed)
    trials: list[Trial] = []
    places: dict[int, list[float]] = {}

    def attempt(place: list[float]) -> None:
        values = {knob.name: knob.at(at) for knob, at in zip(knobs, place, strict=True)}
        places[len(trials)] = place
        trials.append(Trial(values, evaluate(values)))

    first = max(1, math.ceil(runs * FIRST_SHARE))
    for start in starts[:first]:
        attempt([knob.place(start[knob.name]) for knob in knobs])
    for place in latin_hypercube(len(knobs), first - len(trials), draw):
        attempt(place)
    while len(trials) < runs:
        done = (len(trials) - first) / max(runs - first, 1)
        spread = WIDE + (NARROW - WIDE) * done
        parents = _good(trials, limit)
        around = places[parents[draw.randrange(len(parents))]]
        # Some knobs stay: what is right already need not be found again.
        moved = [draw.random() < MOVED_SHARE for _ in knobs]
        moved[draw.randrange(len(knobs))] = True
        attempt(
            [
                min(max(draw.gauss(at, spread), 0.0), 1.0) if moves else at
                for at, moves in zip(around, moved, strict=True)
            ]
        )
    return trials


def latin_hypercube(num_knobs: int, num: int, draw: random.Random) -> list[list[float]]:
    """`num` places; along each knob there is one in each of `num` equal parts."""
    columns = []
    for _ in range(num_knobs):
        column = [(part + draw.random()) / num for part in range(num)]
        draw.shuffle(column)
        columns.append(column)
    return [list(place) for place in zip(*columns, strict=True)]


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other beats in both respects, by cost."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.score.hours, t.score.violations)):
        if not front or trial.score.violations < front[-1].score.violations:
            front.append(trial)
    return front


def choose(trials: Sequence[Trial], limit: float) -> tuple[Trial, bool]:
    """The cheapest within the limit on every trace and True; else the one whose worst trace
    misses least, and False.
    """
    within = [trial for trial in trials if trial.score.worst <= limit]
    if within:
        return min(within, key=lambda t: (t.score.hours, t.score.violations)), True
    return min(trials, key=lambda t: (t.score.worst, t.score.violations, t.score.hours)), False


def best_for(trials: Sequence[Trial], hours: float) -> Trial | None:
    """The one that misses least of those that cost no more; None where all cost more."""
    cheap = [trial for trial in trials if trial.score.hours <= hours]
    return min(cheap, key=lambda t: (t.score.violations, t.score.hours), default=None)


def _good(trials: Sequence[Trial], limit: float) -> list[int]:
    """Numbers of the chosen one, twice, and of those beside it on the front."""
    chosen, _ = choose(trials, limit)
    front = pareto(trials)
    nearest = sorted(front, key=lambda t: abs(t.score.hours - chosen.score.hours))[:3]
    return [trials.index(trial) for trial in (chosen, chosen, *nearest)]
