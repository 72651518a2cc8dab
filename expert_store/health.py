"""What a source knows of its copies: how fast they answer, when to ask a second.

Pure: the clock is passed in. Knows no transport.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

from expert_store.latency import ExtraRequests, Latencies

HEDGE_QUANTILE = 0.95
HEDGE_FLOOR_S = 0.01
"""A second copy is asked after that quantile of the first one's own answer times, not sooner."""
HANG_S = 0.5
SLOWEST_BYTES_PER_S = 100e6
"""A copy that has not answered after HANG_S, and as long as its bytes take on a 1 Gb/s link, is
taken for lost while there is another."""


@dataclass(frozen=True, slots=True)
class ReadingStatistics:
    """Calls since the start: all of them; second ones to be quicker, and those that were; those
    that another copy had to take over; answers refused because the copy is damaged; those that hung
    until another copy was asked."""

    calls: int = 0
    hedged: int = 0
    hedges_won: int = 0
    failed_over: int = 0
    corrupt: int = 0
    hung: int = 0

    def __add__(self, other: ReadingStatistics) -> ReadingStatistics:
        return ReadingStatistics(*map(operator.add, astuple(self), astuple(other)))


class CopyHealth:
    """Shared by all fetches of a source. Thread-safe.

    `client` is the number of who reads: clients that differ in it prefer different copies.
    """

    def __init__(self, clock: Callable[[], float], client: int = 0) -> None:
        self.client = client
        self._latencies = Latencies(clock)
        self._extra = ExtraRequests()
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def statistics(self) -> ReadingStatistics:
        with self._lock:
            return ReadingStatistics(**self._counts)

    def count(self, what: str) -> None:
        """One more of a field of the statistics."""
        with self._lock:
            self._counts[what] += 1

    def best(self, addresses: Sequence[str], num_bytes: int) -> list[str]:
        """The addresses that are neither slow nor left alone for now; never none of them."""
        return self._latencies.best(addresses, num_bytes)

    def hedge_after_s(self, address: str, num_bytes: int) -> float:
        """After how long a second copy may be asked, if extra requests are left."""
        usual_s = self._latencies.quantile_s(address, num_bytes, HEDGE_QUANTILE)
        hang_s = self.hang_after_s(num_bytes)
        return hang_s if usual_s is None else min(hang_s, max(HEDGE_FLOOR_S, usual_s))

    def hang_after_s(self, num_bytes: int) -> float:
        """After how long the copy is taken for lost, if there is another."""
        return HANG_S + num_bytes / SLOWEST_BYTES_PER_S

    def may_hedge(self) -> bool:
        """Whether an extra request may be made; it counts as made."""
        return self._extra.spend()

    def answered(self, address: str, num_bytes: int, seconds: float) -> None:
        self._extra.earn()
        self._latencies.answered(address, num_bytes, seconds)

    def overtaken(self, address: str, num_bytes: int, seconds: float) -> None:
        self._latencies.overtaken(address, num_bytes, seconds)

    def failed(self, address: str) -> None:
        self._latencies.failed(address)
