"""One log line when answers begin to be degraded, and one when they are whole again.

An outage lasts from the first step with degraded pairs until none was degraded for `QUIET_S`
seconds of steps: a cache that still has some compensators must not end it for a moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

QUIET_S = 10.0


class OutageLog:
    """Told of every step by the one thread that makes them. `clock` gives seconds."""

    def __init__(self, replica: str, clock: Callable[[], float]) -> None:
        self._replica = replica
        self._clock = clock
        self._since_s: float | None = None
        self._last_s = 0.0
        self._pairs = 0

    @property
    def is_on(self) -> bool:
        """Whether an outage goes on."""
        return self._since_s is not None

    def stepped(self, degraded_pairs: int) -> None:
        """A step ended, in which so many pairs lost their compensator."""
        now_s = self._clock()
        if degraded_pairs:
            if self._since_s is None:
                self._since_s, self._pairs = now_s, 0
                logger.warning(
                    "worker %s: compensators cannot be had, answers go on from codes alone "
                    "(degraded) until they are back",
                    self._replica,
                )
            self._pairs += degraded_pairs
            self._last_s = now_s
        elif self._since_s is not None and now_s - self._last_s >= QUIET_S:
            logger.warning(
                "worker %s: full quality again; %d pairs were degraded within %.1f s",
                self._replica,
                self._pairs,
                self._last_s - self._since_s,
            )
            self._since_s = None
