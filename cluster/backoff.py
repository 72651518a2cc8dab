"""When to try again what failed: ever later, from half a second to 30."""

from __future__ import annotations

from collections.abc import Callable

FIRST_S = 0.5
MAX_S = 30.0


class Backoff:
    """Of one thing: after 0.5, 1, 2 ... 30 s. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._retry_at: float | None = None

    @property
    def is_due(self) -> bool:
        """Whether it may be tried (again)."""
        return self._retry_at is None or self._clock() >= self._retry_at

    def failed(self) -> float:
        """It failed once more: the seconds until it may be tried again."""
        seconds = min(MAX_S, FIRST_S * 2.0 ** min(self._failures, 16))
        self._failures += 1
        self._retry_at = self._clock() + seconds
        return seconds

    def hurry(self) -> None:
        """What may be the cause has changed: it may be tried at once."""
        self._retry_at = None

    def succeeded(self) -> None:
        self._failures, self._retry_at = 0, None
