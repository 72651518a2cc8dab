"""The records of one layer on their way to the device: who waits for them holds one of these.

Owns the arrivals and what is not yet given back. Knows no source and no limit; `streamer.py` does.
"""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from expert_store.errors import StoreError
from expert_store.types import ExpertKey, RecordKind, RecordRequest
from gpu_worker.record_sizes import PlannedCopy


@dataclass(frozen=True, slots=True)
class Landed:
    """A record that came, on the device, or the reason why it did not. One of the two is None."""

    copy: PlannedCopy
    data: torch.Tensor | None  # [device_bytes] uint8
    error: StoreError | None
    moved_bytes: int = 0  # that the source delivered


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a fetch thread hands over; `bug` is an exception that is not a StoreError."""

    landed: Landed
    ready: torch.cuda.Event | None
    bug: BaseException | None = None


class Stream:
    """Records on their way: take them as they land, one by one or in batches.

    Every record is given back with `release` once its bytes are used or accounted for elsewhere.
    `close`, or leaving a `with`, waits for what is being fetched, drops the rest and releases all.
    A stream that was left is not waited for: what is still due lands for whoever keeps it.
    One thread only. `release` and `withdraw` are the streamer's: a record's bytes are free again;
    drop what was not started, and say what that is.
    """

    def __init__(
        self,
        tier: str,
        copies: Sequence[PlannedCopy],
        release: Callable[[PlannedCopy], None],
        withdraw: Callable[[Stream, frozenset[ExpertKey]], Sequence[PlannedCopy]],
        clock: Callable[[], float],
    ) -> None:
        self._tier = tier
        self._due = {copy.request: copy for copy in copies}
        self._give_back, self._drop = release, withdraw
        self._clock = clock
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._held: dict[RecordRequest, PlannedCopy] = {}
        self.moved_bytes: Counter[tuple[str, RecordKind]] = Counter()
        self.device_bytes: Counter[RecordKind] = Counter()
        self.wait_s = 0.0
        self.is_left = False

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def due(self) -> frozenset[RecordRequest]:
        """What has not landed yet."""
        return frozenset(self._due)

    @property
    def copies_due(self) -> tuple[PlannedCopy, ...]:
        """The copies that have not landed yet."""
        return tuple(self._due.values())

    @property
    def is_whole(self) -> bool:
        """Whether all that was asked for has landed or was withdrawn."""
        return not self._due

    def __iter__(self) -> Iterator[Landed]:
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[Landed]]:
        """The records in the order they land: waits for one, then gives all that are here."""
        while self._due:
            yield [self.next(), *self.landed()]

    def batch(self, patience_s: float | None) -> list[Landed]:
        """Waits for one record and gives all that are here; none if so many seconds bring none."""
        try:
            first = self.next(patience_s)
        except queue.Empty:
            return []
        return [first, *self.landed()]

    def next(self, patience_s: float | None = None) -> Landed:
        """The record that lands next; waits for it. Raises queue.Empty after so many seconds."""
        arrival = self._take(patience_s)
        if arrival.bug is not None:
            raise arrival.bug
        return arrival.landed

    def landed(self) -> list[Landed]:
        """What is here now; waits for nothing."""
        here = []
        while self._due and not self._arrivals.empty():
            here.append(self.next())
        return here

    def release(self, request: RecordRequest) -> None:
        """The record's bytes are no longer under way; others may start."""
        self._give_back(self._held.pop(request))

    def withdraw(self, keep: frozenset[ExpertKey] = frozenset()) -> None:
        """Drop what was not started; what is being fetched still lands. Of what only waits for a
        thread, `keep` is not dropped.
        """
        for copy in self._drop(self, keep):
            del self._due[copy.request]

    def leave(self, release: Callable[[PlannedCopy], None]) -> list[PlannedCopy]:
        """Wait no longer: what is being fetched still lands, and is released by `release`.

        The counts begin anew. Returns what is due or not yet given back.
        """
        self.is_left = True
        self._give_back = release
        self.moved_bytes.clear()
        self.device_bytes.clear()
        self.wait_s = 0.0
        return [*self._due.values(), *self._held.values()]

    def close(self) -> None:
        self.withdraw()
        while self._due and not self.is_left:
            self._take()
        for request in list(self._held):
            self.release(request)

    def deliver(self, arrival: Arrival) -> None:
        """Hand a record over; called by the streamer's threads."""
        self._arrivals.put(arrival)

    def _take(self, patience_s: float | None = None) -> Arrival:
        start_s = self._clock()
        try:
            arrival = self._arrivals.get(timeout=patience_s)
        finally:
            self.wait_s += self._clock() - start_s
        landed = arrival.landed
        del self._due[landed.copy.request]
        self._held[landed.copy.request] = landed.copy
        kind = landed.copy.request.kind
        if landed.moved_bytes:
            self.moved_bytes[self._tier, kind] += landed.moved_bytes
        if landed.data is not None:
            self.device_bytes[kind] += landed.data.numel()
            if arrival.ready is not None:
                current = torch.cuda.current_stream()
                current.wait_event(arrival.ready)
                landed.data.record_stream(current)
        return arrival
