"""Where the time of a step goes: functions wrapped for a while, each second counted once.

A part's time is that of its functions less what is spent in wrapped functions they call, on the
thread that runs the step. Wrapping costs about a microsecond a call. Knows no engine.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Timed:
    """A function, by its owner and name there, and the part of a step that it is."""

    part: str
    owner: Any
    name: str


class Stopwatch:
    """Seconds and calls by part since `reset`. One thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner: list[float] = []

    def reset(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    @contextmanager
    def on(self, timed: Sequence[Timed]) -> Any:
        """Time these functions as long as the `with` lasts."""
        kept = [(item, getattr(item.owner, item.name)) for item in timed]
        for item, function in kept:
            setattr(item.owner, item.name, self._wrapped(item.part, function))
        try:
            yield self
        finally:
            for item, function in kept:
                setattr(item.owner, item.name, function)

    def _wrapped(self, part: str, function: Any) -> Any:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                self.seconds[part] += took - self._inner.pop()
                self.calls[part] += 1
                if self._inner:
                    self._inner[-1] += took

        return timed
