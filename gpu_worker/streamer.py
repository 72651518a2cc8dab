"""Brings records from a source to the device, with a limit on the bytes under way.

The one place of this room that waits for bytes. Knows no cache and not what a record holds.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from expert_store.errors import ExpertUnavailableError, StoreError
from expert_store.types import RecordKind, RecordRequest
from gpu_worker.protocols import ExpertSource
from gpu_worker.record_sizes import PlannedCopy, by_expert, largest_expert_bytes


@dataclass(frozen=True, slots=True)
class Landed:
    """A record that came, on the device, or the reason why it did not. One of the two is None."""

    copy: PlannedCopy
    data: torch.Tensor | None  # [device_bytes] uint8
    error: StoreError | None
    moved_bytes: int = 0  # that the source delivered


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What a fetch thread hands over; `bug` is an exception that is not a StoreError."""

    landed: Landed
    ready: torch.cuda.Event | None
    bug: BaseException | None = None


class Streamer:
    """Fetches records in batches, each one call to the source, on `num_threads` threads.

    A batch has `fetch_bytes` at most, or one expert that is larger; an expert is never cut.
    Without threads the one that asks fetches: nothing overlaps, and the order is fixed.
    At most `max_in_flight_bytes` are fetched, or fetched and not yet released, at any time. What
    does not fit waits in the order it was asked for. `decode` makes of the bytes that came those
    that go to the device, on the thread that fetched them. On a CPU that memory is used as it is;
    on a GPU it goes through pinned memory and a copy stream of its own.

    Raises ValueError when the largest expert does not fit into `max_in_flight_bytes`.
    """

    def __init__(
        self,
        source: ExpertSource,
        *,
        device: str,
        max_in_flight_bytes: int,
        fetch_bytes: int,
        num_threads: int,
        decode: Callable[[RecordRequest, torch.Tensor], torch.Tensor] = lambda _, data: data,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        largest = largest_expert_bytes(source.manifest)
        if largest > max_in_flight_bytes:
            raise ValueError(
                f"max_in_flight_bytes: got {max_in_flight_bytes}, but the largest expert of the "
                f"store has {largest} bytes of codes and factors; give at least that"
            )
        self._source = source
        self._decode = decode
        self._device = torch.device(device)
        self._copy_stream = torch.cuda.Stream() if self._device.type == "cuda" else None
        self._max_bytes = max_in_flight_bytes
        self._fetch_bytes = min(fetch_bytes, max_in_flight_bytes)
        self._clock = clock
        # Reentrant: without threads a fetch runs where it is admitted.
        self._lock = threading.RLock()
        self._waiting: deque[tuple[Stream, tuple[PlannedCopy, ...]]] = deque()
        self._in_flight: Counter[RecordRequest] = Counter()
        self._in_flight_bytes = 0
        self._moved_bytes: Counter[tuple[str, RecordKind]] = Counter()
        self._closed = False
        name = "moetier-fetch"
        self._pool = (
            ThreadPoolExecutor(num_threads, thread_name_prefix=name) if num_threads else None
        )

    @property
    def tier(self) -> str:
        return self._source.tier

    @property
    def in_flight_bytes(self) -> int:
        return self._in_flight_bytes

    @property
    def moved_bytes(self) -> Counter[tuple[str, RecordKind]]:
        """Bytes the source delivered since the start, by (tier, kind)."""
        with self._lock:
            return Counter(self._moved_bytes)

    def start(self, copies: Sequence[PlannedCopy]) -> Stream:
        """Begin to fetch; returns at once. Use the stream in a `with`, on one thread."""
        assert not self._closed, "the streamer was closed"
        stream = Stream(self, len(copies), self._clock)
        with self._lock:
            self._waiting.extend((stream, batch) for batch in self._batches(copies))
            self._admit()
        return stream

    def check_integrity(self, *, idle: bool = False) -> None:
        """AssertionError naming every term when the bytes under way do not add up."""
        with self._lock:
            in_flight = sum(self._in_flight.values())
            waiting = sum(len(batch) for _, batch in self._waiting)
            assert in_flight == self._in_flight_bytes <= self._max_bytes, (
                f"streamer: records under way hold {in_flight} bytes, the count says "
                f"{self._in_flight_bytes}, the limit is {self._max_bytes}"
            )
            assert not idle or (in_flight == 0 and waiting == 0), (
                f"streamer: {in_flight} bytes under way and {waiting} records waiting while idle"
            )

    def close(self) -> None:
        """Start no fetch any more and end the threads; waits for the fetches that were started.

        A stream that still waits gets ExpertUnavailableError for what was not fetched.
        """
        with self._lock:
            dropped, self._waiting = self._waiting, deque()
            self._closed = True
        for stream, batch in dropped:
            for copy in batch:
                error = ExpertUnavailableError(f"{copy.request.key}: the streamer was closed")
                stream.deliver(_Arrival(Landed(copy, None, error), None))
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _batches(self, copies: Sequence[PlannedCopy]) -> Iterator[tuple[PlannedCopy, ...]]:
        """Cut a step's copies into fetches; an expert's records stay together."""
        batch: list[PlannedCopy] = []
        batch_bytes = 0
        for records in by_expert(copies):
            num_bytes = sum(copy.held_bytes for copy in records)
            if batch and batch_bytes + num_bytes > self._fetch_bytes:
                yield tuple(batch)
                batch, batch_bytes = [], 0
            batch.extend(records)
            batch_bytes += num_bytes
        if batch:
            yield tuple(batch)

    def _admit(self) -> None:
        """Start what fits, in order. The lock is held."""
        while self._waiting:
            stream, batch = self._waiting[0]
            num_bytes = sum(copy.held_bytes for copy in batch)
            if self._in_flight_bytes + num_bytes > self._max_bytes:
                return
            self._waiting.popleft()
            self._in_flight.update({copy.request: copy.held_bytes for copy in batch})
            self._in_flight_bytes += num_bytes
            if self._pool is None:
                self._run_batch(stream, batch)
            else:
                self._pool.submit(self._run_batch, stream, batch)

    def _release(self, copy: PlannedCopy) -> None:
        with self._lock:
            self._in_flight[copy.request] -= copy.held_bytes
            if self._in_flight[copy.request] == 0:
                del self._in_flight[copy.request]
            self._in_flight_bytes -= copy.held_bytes
            self._admit()

    def _withdraw(self, stream: Stream) -> int:
        """Drop what a stream still waits to start; how many records that was."""
        with self._lock:
            dropped = sum(len(batch) for owner, batch in self._waiting if owner is stream)
            self._waiting = deque(pair for pair in self._waiting if pair[0] is not stream)
            self._admit()
        return dropped

    def _run_batch(self, stream: Stream, batch: tuple[PlannedCopy, ...]) -> None:
        """One fetch, on a pool thread; when it fails, each record alone, to find the bad ones."""
        handed = 0
        try:
            for arrival in self._fetch(batch):
                stream.deliver(arrival)
                handed += 1
        except BaseException as bug:  # noqa: BLE001 - raised again on the thread that waits
            for copy in batch[handed:]:
                stream.deliver(_Arrival(Landed(copy, None, None), None, bug))

    def _fetch(self, batch: tuple[PlannedCopy, ...]) -> list[_Arrival]:
        try:
            datas = self._source.fetch([copy.request for copy in batch])
        except StoreError as error:
            if len(batch) == 1:
                return [_Arrival(Landed(batch[0], None, error), None)]
            return [arrival for copy in batch for arrival in self._fetch((copy,))]
        with self._lock:
            for copy, data in zip(batch, datas, strict=True):
                self._moved_bytes[self._source.tier, copy.request.kind] += data.numel()
        return [self._to_device(copy, data) for copy, data in zip(batch, datas, strict=True)]

    def _to_device(self, copy: PlannedCopy, data: torch.Tensor) -> _Arrival:
        moved_bytes = data.numel()
        try:
            data = self._decode(copy.request, data)
        except StoreError as error:
            return _Arrival(Landed(copy, None, error, moved_bytes), None)
        if self._copy_stream is None:
            return _Arrival(Landed(copy, data, None, moved_bytes), None)
        with torch.cuda.stream(self._copy_stream):
            on_device = data.pin_memory().to(self._device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._copy_stream)
        return _Arrival(Landed(copy, on_device, None, moved_bytes), ready)


class Stream:
    """The records of one layer on their way: iterate for them in the order they land.

    Every record is given back with `release` once its bytes are used or accounted for elsewhere.
    Leaving the `with` waits for what is being fetched, drops the rest and releases all.
    """

    def __init__(self, streamer: Streamer, num_records: int, clock: Callable[[], float]) -> None:
        self._streamer = streamer
        self._clock = clock
        self._arrivals: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        self._num_due = num_records
        self._held: dict[RecordRequest, PlannedCopy] = {}
        self.moved_bytes: Counter[tuple[str, RecordKind]] = Counter()
        self.device_bytes: Counter[RecordKind] = Counter()
        self.wait_s = 0.0

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._num_due -= self._streamer._withdraw(self)
        while self._num_due:
            self._take()
        for request in list(self._held):
            self.release(request)

    def __iter__(self) -> Iterator[Landed]:
        while self._num_due:
            arrival = self._take()
            if arrival.bug is not None:
                raise arrival.bug
            yield arrival.landed

    def release(self, request: RecordRequest) -> None:
        """The record's bytes are no longer under way; others may start."""
        self._streamer._release(self._held.pop(request))

    def deliver(self, arrival: _Arrival) -> None:
        """Hand a record over; called by the streamer's threads."""
        self._arrivals.put(arrival)

    def _take(self) -> _Arrival:
        start_s = self._clock()
        arrival = self._arrivals.get()
        self.wait_s += self._clock() - start_s
        self._num_due -= 1
        landed = arrival.landed
        self._held[landed.copy.request] = landed.copy
        kind = landed.copy.request.kind
        if landed.moved_bytes:
            self.moved_bytes[self._streamer.tier, kind] += landed.moved_bytes
        if landed.data is not None:
            self.device_bytes[kind] += landed.data.numel()
            if arrival.ready is not None:
                current = torch.cuda.current_stream()
                current.wait_event(arrival.ready)
                landed.data.record_stream(current)
        return arrival
