"""How much each expert is asked of the memory tier lately, from what GPU workers report.

What a worker finds in its own cache asks nothing of the tier and is no heat here.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from expert_store.types import ExpertKey
from gpu_worker.messages import ExpertUses

HALF_LIFE_S = 600.0
MAX_TOLD = 2048
"""Experts in one report, the hottest: about 20 KB."""
TELL_INTERVAL_S = 10.0


class UseCounter:
    """A worker's uses of the tier since it last told them. Thread-safe. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._uses: Counter[ExpertKey] = Counter()
        self._told_at = clock()
        self._lock = threading.Lock()

    def add(self, keys: Iterable[ExpertKey]) -> None:
        """One use of each."""
        with self._lock:
            self._uses.update(keys)

    def take(self) -> tuple[ExpertUses, ...]:
        """The most used experts since the last time; () before `TELL_INTERVAL_S` have passed."""
        with self._lock:
            now = self._clock()
            if now - self._told_at < TELL_INTERVAL_S:
                return ()
            uses, self._uses, self._told_at = self._uses, Counter(), now
        return tuple(ExpertUses(*key, count) for key, count in uses.most_common(MAX_TOLD))


class ExpertHeat:
    """Uses of all workers, those of `HALF_LIFE_S` ago counting half. Used by one event loop."""

    def __init__(self, keys: Iterable[ExpertKey], clock: Callable[[], float]) -> None:
        self._heat = dict.fromkeys(keys, 0.0)
        self._clock = clock
        self._as_of = clock()

    def add(self, uses: Iterable[ExpertUses]) -> None:
        """Of an expert that the store does not have (another version's) nothing is kept."""
        self._cool()
        for layer, expert, count in uses:
            key = ExpertKey(layer, expert)
            if key in self._heat and count > 0:
                self._heat[key] += count

    def current(self) -> Mapping[ExpertKey, float]:
        """The heat now, of every expert."""
        self._cool()
        return dict(self._heat)

    def _cool(self) -> None:
        now = self._clock()
        if now - self._as_of >= 1.0:
            factor = 0.5 ** ((now - self._as_of) / HALF_LIFE_S)
            self._heat = {key: value * factor for key, value in self._heat.items()}
            self._as_of = now
