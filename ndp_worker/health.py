"""What a group knows of its near-data workers: how fast they are, who hangs, who lost compensators.

Pure: the clock is passed in. Knows no call and no transport; a worker is a number.
"""

from __future__ import annotations

import logging
import operator
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

from expert_store.latency import ExtraRequests, Latencies
from expert_store.types import ExpertKey

logger = logging.getLogger(__name__)

FORGET_S = 30.0
"""A worker that had lost an expert's compensator is asked to restore it again after that long."""
HEDGE_QUANTILE = 0.95
HEDGE_FLOOR_S = 0.02
"""A second worker is asked after this quantile of the first one's own times, twice over, because
the time of a call also depends on who else computes there."""
HANG_S = 0.6
HANG_PAIR_S = 0.01
"""A worker that has not answered after HANG_S, and HANG_PAIR_S more for each pair, is taken for
lost: its experts go to the next one, or are streamed. Twenty times what a Mixtral-size pair takes
on two cores, so that slow is not called lost."""


@dataclass(frozen=True, slots=True)
class NearDataStatistics:
    """Calls to workers since the start: all of them, second ones to be quicker, those that went to
    another worker because the first failed, those that hung; and experts whose answer was taken
    though it came degraded."""

    calls: int = 0
    hedged: int = 0
    failed_over: int = 0
    hung: int = 0
    degraded: int = 0

    def __add__(self, other: NearDataStatistics) -> NearDataStatistics:
        return NearDataStatistics(*map(operator.add, astuple(self), astuple(other)))


class WorkerHealth:
    """What is known of the workers, by their number, over all calls. Thread-safe.

    `client` is the number of who asks: clients that differ in it prefer different workers.
    """

    def __init__(self, clock: Callable[[], float], client: int = 0) -> None:
        self.client = client
        self.clock = clock
        self.latencies = Latencies(clock)
        self.extra = ExtraRequests()
        self._counts: Counter[str] = Counter()
        self._degrading: dict[tuple[int, ExpertKey], float] = {}  # until when
        self._lock = threading.Lock()

    @property
    def statistics(self) -> NearDataStatistics:
        with self._lock:
            return NearDataStatistics(**self._counts)

    def count(self, what: str) -> None:
        """One more of a field of the statistics."""
        with self._lock:
            self._counts[what] += 1

    def hedge_after_s(self, member: int, num_pairs: int) -> float:
        """After how long a second worker may be asked."""
        usual_s = self.latencies.quantile_s(member, num_pairs, HEDGE_QUANTILE)
        hang_s = self.hang_after_s(num_pairs)
        return hang_s if usual_s is None else min(hang_s, max(HEDGE_FLOOR_S, 2 * usual_s))

    def hang_after_s(self, num_pairs: int) -> float:
        return HANG_S + HANG_PAIR_S * num_pairs

    def degraded(self, member: int, keys: Sequence[ExpertKey]) -> None:
        """The worker ran these experts from codes alone, though asked to restore; whether that is
        what the caller gets, and to be counted, is not said."""
        now = self.clock()
        with self._lock:
            self._degrading = {name: t for name, t in self._degrading.items() if t > now}
            new = [key for key in keys if (member, key) not in self._degrading]
            self._degrading.update({(member, key): now + FORGET_S for key in new})
        if new:
            logger.warning(
                "near-data worker %d has lost the compensators of %d experts, first %s; it is "
                "asked for them again in %g s",
                member,
                len(new),
                new[0],
                FORGET_S,
            )

    def can_restore(self, member: int, key: ExpertKey) -> bool:
        with self._lock:
            return self._degrading.get((member, key), float("-inf")) <= self.clock()
