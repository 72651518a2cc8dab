"""Simulated time: things that happen at times, and servers that do one thing after another.

Knows nothing of models. No clock is read and nothing sleeps.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

Act = Callable[[float], None]
"""What happens; it is told the time."""


class Events:
    """What is still to happen, in order of time; at the same time in the order it was asked for."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Act]] = []
        self._numbers = itertools.count()
        self._stopped = False
        self.now_s = 0.0

    def at(self, time_s: float, act: Act) -> None:
        assert time_s >= self.now_s, f"{time_s} s is past: it is {self.now_s} s"
        heapq.heappush(self._heap, (time_s, next(self._numbers), act))

    def stop(self) -> None:
        """Nothing happens after what happens now."""
        self._stopped = True

    def run(self) -> None:
        while self._heap and not self._stopped:
            self.now_s, _, act = heapq.heappop(self._heap)
            act(self.now_s)


@dataclass(slots=True)
class Server:
    """A link's direction, a device or a worker: first come, first served, one at a time; what goes
    first is served before all else, and delays it.

    `busy_s` and `num_bytes` are what it was given since `reset`.
    """

    free_s: float = 0.0
    first_free_s: float = 0.0
    busy_s: float = 0.0
    num_bytes: float = 0.0

    def take(self, now_s: float, seconds: float, num_bytes: float = 0.0) -> tuple[float, float]:
        """When it begins with this, and when it ends."""
        begin_s = max(now_s, self.free_s)
        self.free_s = begin_s + seconds
        self.busy_s += seconds
        self.num_bytes += num_bytes
        return begin_s, self.free_s

    def take_first(
        self, now_s: float, seconds: float, num_bytes: float = 0.0
    ) -> tuple[float, float]:
        """The same of what waits for nothing but others that go first."""
        begin_s = max(now_s, self.first_free_s)
        self.first_free_s = begin_s + seconds
        self.free_s = max(begin_s, self.free_s) + seconds
        self.busy_s += seconds
        self.num_bytes += num_bytes
        return begin_s, self.first_free_s

    def reset(self) -> None:
        self.busy_s = self.num_bytes = 0.0


@dataclass(slots=True)
class Machine:
    """One end of the network: what it sends, what it receives, and what it computes."""

    out: Server = field(default_factory=Server)
    into: Server = field(default_factory=Server)
    compute: Server = field(default_factory=Server)

    def servers(self) -> tuple[Server, Server, Server]:
        return self.out, self.into, self.compute
