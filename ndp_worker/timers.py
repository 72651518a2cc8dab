"""Calls a function later, unless it is no longer needed: the hedging time-outs of near-data calls.

One thread, only while something is due. Knows no worker.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

IDLE_S = 5.0
"""The thread ends when nothing was due for that long; the next call starts another one."""

Later = Callable[[float, Callable[[], None]], None]
"""Calls the function after so many seconds."""


class Timers:
    """Functions that are due, soonest first. They must be short: they run on one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __call__(self, delay_s: float, function: Callable[[], None]) -> None:
        with self._changed:
            entry = (self._clock() + delay_s, next(self._numbers), function)
            heapq.heappush(self._due, entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ndp-timers", daemon=True)
                self._thread.start()
            elif self._due[0] is entry:  # else the thread wakes soon enough by itself
                self._changed.notify()

    def _run(self) -> None:
        while (function := self._next()) is not None:
            try:
                function()
            except Exception:  # one call's trouble shall not end the others' time-outs
                logger.exception("a near-data time-out failed")

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while True:
                if not self._due:
                    if not self._changed.wait(IDLE_S) and not self._due:
                        self._thread = None
                        return None
                    continue
                left_s = self._due[0][0] - self._clock()
                if left_s <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(left_s)
