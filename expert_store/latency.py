"""How fast each copy has answered lately, and which ones are to be left alone for a while.

Pure: the clock is passed in. Knows no transport and not what is asked; a copy is a name.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)

WINDOW = 64
"""Answers of one copy and size class that are remembered."""
MIN_SAMPLES = 8
"""Fewer say nothing of a quantile."""
SLOW_FACTOR = 3.0
SLOW_MARGIN_S = 0.005
"""A copy is slow when its median is over SLOW_FACTOR times the best one's and this much longer:
below it the network's own jitter decides."""
REST_S = 0.5
MAX_REST_S = 8.0
"""A copy that failed is left alone for REST_S, twice as long after each further failure."""
MAX_STRIKES = 2
"""Races lost in a row before a copy rests: by its quantile a healthy one loses one in twenty."""


@dataclass(slots=True)
class _Record:
    """What is known of one copy."""

    windows: defaultdict[int, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=WINDOW))
    )
    strikes: int = 0
    failures: int = 0  # in a row
    rests_until: float = float("-inf")
    probe_at: float = float("-inf")  # when a slow copy is asked again


class Latencies:
    """Answer times by copy and size class (powers of four). Thread-safe."""

    def __init__(
        self, clock: Callable[[], float], *, rest_s: float = REST_S, max_rest_s: float = MAX_REST_S
    ) -> None:
        self._clock = clock
        self._rest_s, self._max_rest_s = rest_s, max_rest_s
        self._records: defaultdict[Hashable, _Record] = defaultdict(_Record)
        self._lock = threading.Lock()

    def answered(self, name: Hashable, size: int, seconds: float) -> None:
        """The copy gave an answer of this size."""
        with self._lock:
            record = self._records[name]
            record.windows[_size_class(size)].append(seconds)
            record.strikes = record.failures = 0
            record.rests_until = float("-inf")

    def overtaken(self, name: Hashable, size: int, seconds: float) -> None:
        """Another copy answered first; this one would have taken `seconds` or longer."""
        with self._lock:
            record = self._records[name]
            record.windows[_size_class(size)].append(seconds)
            record.strikes += 1
            if record.strikes >= MAX_STRIKES:
                self._rest(record)

    def failed(self, name: Hashable) -> None:
        """The copy did not answer."""
        with self._lock:
            self._rest(self._records[name])

    def quantile_s(self, name: Hashable, size: int, quantile: float) -> float | None:
        """Of the copy's own answer times for that size; None while too few are known."""
        with self._lock:
            times = sorted(self._records[name].windows[_size_class(size)])
        if len(times) < MIN_SAMPLES:
            return None
        return times[min(len(times) - 1, int(quantile * len(times)))]

    def is_resting(self, name: Hashable) -> bool:
        with self._lock:
            return name in self._records and self._records[name].rests_until > self._clock()

    def best(self, names: Sequence[Name], size: int) -> list[Name]:
        """Those that are neither resting nor slow, never none of them. A slow one is among them
        again once in MAX_REST_S: a probe, whose answer may clear it."""
        now = self._clock()
        with self._lock:
            awake = [n for n in names if self._records[n].rests_until <= now] or list(names)
            if len(awake) < 2:
                return awake
            medians = {n: self._median_s(n, size) for n in awake}
            known = [seconds for seconds in medians.values() if seconds is not None]
            if not known:
                return awake
            limit_s = max(min(known) * SLOW_FACTOR, min(known) + SLOW_MARGIN_S)
            chosen = []
            for name in awake:
                seconds, record = medians[name], self._records[name]
                if seconds is None or seconds <= limit_s:
                    chosen.append(name)
                elif now >= record.probe_at:
                    record.probe_at = now + self._max_rest_s
                    return [name]
            return chosen

    def _median_s(self, name: Hashable, size: int) -> float | None:
        # Of the last few only: a copy that has recovered shall be believed soon.
        times = sorted(list(self._records[name].windows[_size_class(size)])[-MIN_SAMPLES:])
        return times[len(times) // 2] if len(times) >= MIN_SAMPLES // 2 else None

    def _rest(self, record: _Record) -> None:
        pause_s = min(self._max_rest_s, self._rest_s * 2**record.failures)
        record.failures = min(record.failures + 1, 16)
        record.rests_until = self._clock() + pause_s


class ExtraRequests:
    """A bucket of tokens: `share` of the requests may be doubled, `burst` of them at once.

    Thread-safe.
    """

    def __init__(self, share: float = 0.05, *, burst: float = 8.0) -> None:
        if not 0 <= share <= 1 or burst < 1:
            raise ValueError(
                f"share and burst: got {share} and {burst}, expected 0 to 1 and at least 1"
            )
        self._share, self._burst = share, burst
        self._tokens = burst
        self._lock = threading.Lock()

    def earn(self) -> None:
        """A request was made that was not an extra one."""
        with self._lock:
            self._tokens = min(self._burst, self._tokens + self._share)

    def spend(self) -> bool:
        """Whether one extra request may be made now; it counts as made."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


def _size_class(size: int) -> int:
    return max(0, size).bit_length() // 2
