"""A directory in this process' memory, with the test's own clock: what Redis is held against.

Nobody but tests uses it: without Redis the tier manager keeps the listings itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from expert_store.listing import Listing


class MemoryDirectory:
    """A directory for one process. The clock gives seconds and is passed in by tests."""

    def __init__(
        self, *, expiry_s: float = 15.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._expiry_s = expiry_s
        self._clock = clock
        self._entries: dict[str, tuple[float, Listing]] = {}
        self._lock = threading.Lock()

    def announce(self, listing: Listing) -> None:
        with self._lock:
            self._entries[listing.name] = (self._clock() + self._expiry_s, listing)

    def withdraw(self, name: str) -> None:
        with self._lock:
            self._entries.pop(name, None)

    def listings(self) -> tuple[Listing, ...]:
        with self._lock:
            now = self._clock()
            self._entries = {k: entry for k, entry in self._entries.items() if entry[0] > now}
            return tuple(self._entries[name][1] for name in sorted(self._entries))

    def close(self) -> None:
        """Nothing to give back."""
