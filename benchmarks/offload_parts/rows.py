"""What repetitions give: medians with their spread, and ratios repetition by repetition."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.offload_parts.turn import Phase

NO_LINK = math.inf


@dataclass(frozen=True, slots=True)
class Repetition:
    """One contestant's turn, over one link, in one repetition."""

    key: str
    link_gbit: float  # NO_LINK: all experts are in this host's memory
    repetition: int
    link_bytes_per_s: float  # measured with a plain socket before the turns of this link
    prefill: Phase
    one: Phase
    many: Phase
    first_token_s: float

    @classmethod
    def of(
        cls,
        answer: Mapping[str, Any],
        key: str,
        repetition: int,
        link_gbit: float,
        link_bytes_per_s: float,
    ) -> Repetition:
        """What a node answered to the question "turn"."""
        phases = {name: Phase(**answer[name]) for name in ("prefill", "one", "many")}
        return cls(
            key=key,
            link_gbit=link_gbit,
            repetition=repetition,
            link_bytes_per_s=link_bytes_per_s,
            first_token_s=answer["first_token_s"],
            **phases,
        )

    @property
    def told(self) -> str:
        """Both decoding speeds, for a line of progress."""
        one, many = self.one.tokens / self.one.seconds, self.many.tokens / self.many.seconds
        return f"{one:8.1f} {many:8.1f} tokens/s"


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of several repetitions, and their ends."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[-1])


Measure = Callable[[Repetition], float]


def _speed(phase: Phase) -> float:
    return phase.tokens / phase.seconds


def _share(phase: Phase, link_bytes_per_s: float) -> float:
    return phase.wire_bytes / phase.seconds / link_bytes_per_s


MEASURES: Mapping[str, tuple[str, Measure]] = {
    "decode, batch 1": ("tokens/s", lambda r: _speed(r.one)),
    "decode, batch 8": ("tokens/s", lambda r: _speed(r.many)),
    "prefill": ("tokens/s", lambda r: _speed(r.prefill)),
    "first token": ("ms", lambda r: 1e3 * r.first_token_s),
    "codes, batch 1": ("KB/token", lambda r: r.one.codes_bytes / r.one.tokens / 1e3),
    "factors, batch 1": ("KB/token", lambda r: r.one.factors_bytes / r.one.tokens / 1e3),
    "activations, batch 1": ("KB/token", lambda r: r.one.activation_bytes / r.one.tokens / 1e3),
    "in vain, batch 1": ("KB/token", lambda r: r.one.vain_bytes / r.one.tokens / 1e3),
    "in vain, batch 8": ("KB/token", lambda r: r.many.vain_bytes / r.many.tokens / 1e3),
    "codes, batch 8": ("KB/token", lambda r: r.many.codes_bytes / r.many.tokens / 1e3),
    "factors, batch 8": ("KB/token", lambda r: r.many.factors_bytes / r.many.tokens / 1e3),
    "activations, batch 8": ("KB/token", lambda r: r.many.activation_bytes / r.many.tokens / 1e3),
    "link share, batch 1": ("share", lambda r: _share(r.one, r.link_bytes_per_s)),
    "link share, batch 8": ("share", lambda r: _share(r.many, r.link_bytes_per_s)),
    "waiting, batch 1": ("share", lambda r: r.one.wait_s / r.one.seconds),
    "waiting, batch 8": ("share", lambda r: r.many.wait_s / r.many.seconds),
}
"""Every figure of the CSV, with its unit."""


class Results:
    """All repetitions, to be asked by link, contestant and measure."""

    def __init__(self, repetitions: Sequence[Repetition]) -> None:
        self._of: dict[tuple[float, str], list[Repetition]] = {}
        for one in repetitions:
            self._of.setdefault((one.link_gbit, one.key), []).append(one)

    def repetitions(self, link: float, key: str) -> Sequence[Repetition]:
        return self._of.get((link, key), [])

    def spread(self, link: float, key: str, measure: str) -> Spread:
        value = MEASURES[measure][1]
        return Spread.of(value(one) for one in self._of[link, key])

    def ratio(self, link: float, key: str, base: str, measure: str) -> Spread | None:
        """Of `key` over `base`, each repetition with its own; None when `base` did not run."""
        value = MEASURES[measure][1]
        bases = {one.repetition: value(one) for one in self.repetitions(link, base)}
        pairs = [(value(one), bases.get(one.repetition)) for one in self._of[link, key]]
        ratios = [mine / theirs for mine, theirs in pairs if theirs]
        return Spread.of(ratios) if ratios else None
