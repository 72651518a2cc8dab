"""Warnings that would repeat with every call, told once a minute each, with how often it was so.

Knows no call: a name says which warnings are the same one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

TELL_AGAIN_S = 60.0
MAX_NAMES = 4096
"""Remembered at once; of more the ones told longest ago are forgotten, and told again sooner."""


class WarningsTold:
    """Warns in `logger`; the clock gives seconds. Thread-safe."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float]) -> None:
        self._logger, self._clock = logger, clock
        # When each was told, and how often it was so since then; the oldest first.
        self._told: dict[Hashable, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def warn(self, name: Hashable, message: str, *values: object) -> None:
        """Warn as `Logger.warning`, unless this name was told of in the last TELL_AGAIN_S."""
        now_s = self._clock()
        with self._lock:
            told_s, since = self._told.get(name, (None, 0))
            if told_s is not None and now_s - told_s < TELL_AGAIN_S:
                self._told[name] = told_s, since + 1
                return
            self._told.pop(name, None)  # so that it goes to the end
            self._told[name] = now_s, 0
            if len(self._told) > MAX_NAMES:
                del self._told[next(iter(self._told))]
        if told_s is None:
            self._logger.warning(message, *values)
        else:
            self._logger.warning(
                f"{message} (%d more in the %.0f s before)", *values, since, now_s - told_s
            )
