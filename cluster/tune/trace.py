"""The requests of some time, as far as their cost goes: when each came and how long it was.

Knows no file and no text.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

MAX_REQUESTS = 2_000_000
MAX_TOKENS = 10_000_000
MAX_SECONDS = 32 * 86400.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request: seconds after the trace's start, and tokens of prompt and answer."""

    arrival_s: float
    prompt_tokens: int
    answer_tokens: int

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s <= MAX_SECONDS:
            raise ValueError(f"arrival_s: got {self.arrival_s}, expected 0 to {MAX_SECONDS:g}")
        for name in ("prompt_tokens", "answer_tokens"):
            value = getattr(self, name)
            if not 1 <= value <= MAX_TOKENS:
                raise ValueError(f"{name}: got {value}, expected 1 to {MAX_TOKENS}")


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by time of arrival. Raises ValueError for none, too many, or a wrong order."""

    name: str
    requests: tuple[Request, ...]

    def __post_init__(self) -> None:
        if not self.requests:
            raise ValueError(f"{self.name}: the trace has no request; nothing can be tuned on it")
        if len(self.requests) > MAX_REQUESTS:
            raise ValueError(f"{self.name}: {len(self.requests)} requests, at most {MAX_REQUESTS}")
        last = 0.0
        for number, request in enumerate(self.requests, 1):
            if request.arrival_s < last:
                raise ValueError(
                    f"{self.name}: request {number} came at {request.arrival_s:g} s, before the "
                    f"one ahead of it ({last:g} s); sort the trace by time"
                )
            last = request.arrival_s

    @property
    def end_s(self) -> float:
        """When the last request came."""
        return self.requests[-1].arrival_s

    @property
    def mean_prompt_tokens(self) -> float:
        return statistics.fmean(request.prompt_tokens for request in self.requests)

    @property
    def mean_answer_tokens(self) -> float:
        return statistics.fmean(request.answer_tokens for request in self.requests)

    def scaled(self, *, rate: float = 1.0) -> Trace:
        """The same requests, so many times as fast after one another."""
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate: got {rate}, expected a positive, finite number")
        return Trace(
            self.name, tuple(replace(r, arrival_s=r.arrival_s / rate) for r in self.requests)
        )

    def halves(self) -> tuple[Trace, Trace]:
        """The requests of the first half of its time and of the second, each from its own 0.

        Raises ValueError where one of them would be empty.
        """
        middle_s = self.end_s / 2
        early = tuple(r for r in self.requests if r.arrival_s < middle_s)
        late = tuple(
            replace(r, arrival_s=r.arrival_s - middle_s)
            for r in self.requests
            if r.arrival_s >= middle_s
        )
        if not early:
            raise ValueError(
                f"{self.name}: all {len(late)} requests came at once or in its second half; the "
                "first half is tuned on; give a longer trace"
            )
        return Trace(f"{self.name}, first half", early), Trace(f"{self.name}, second half", late)
