"""A lease: what must be renewed, or somebody is told that it was not. Knows no Ray."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Lease:
    """Calls `end` once, from a thread of its own, when nobody has renewed it for `seconds`."""

    def __init__(
        self,
        seconds: float,
        end: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds: got {seconds}, expected more than 0")
        self._seconds = seconds
        self._end = end
        self._clock = clock
        self._until = clock() + seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="moetier-lease", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """It runs for another `seconds` from now."""
        self._until = self._clock() + self._seconds

    def close(self) -> None:
        """It no longer runs out."""
        self._closed.set()

    def _watch(self) -> None:
        while (left_s := self._until - self._clock()) > 0:
            if self._closed.wait(left_s):
                return
        logger.warning("nobody has asked for %g s: ending", self._seconds)
        self._end()
