"""Brings records from a source to the device, with a limit on the bytes under way.

The one place of this room that waits for bytes. Knows no cache and not what a record holds.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from expert_store.errors import ExpertUnavailableError, StoreError, without_frames
from expert_store.types import ExpertKey, RecordKind, RecordRequest
from gpu_worker.protocols import ExpertSource
from gpu_worker.record_sizes import PlannedCopy, by_expert, largest_expert_bytes
from gpu_worker.staging import StagingRing
from gpu_worker.stream import Arrival, Landed, Stream

MIN_STAGING_BYTES = 32 << 20


class Streamer:
    """Fetches records in batches, each one call to the source, on `num_threads` threads.

    A batch has `fetch_bytes` at most, or one expert that is larger; an expert is never cut.
    Without threads the one that asks fetches: nothing overlaps, and the order is fixed.
    At most `max_in_flight_bytes` are fetched, or fetched and not yet released, at any time. What
    does not fit waits in the order it was asked for. One stream may be left to itself, with its
    threads: its bytes count apart, so that at worst twice the limit is under way.
    `decode` makes of the bytes that came those that go to the device, on the thread that fetched
    them. On a CPU that memory is used as it is; on a GPU it goes through a ring of pinned memory,
    made once (a source whose memory is pinned skips that), and a copy stream of its own.

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
        # Two experts: one is filled while the other crosses.
        staging_bytes = min(max_in_flight_bytes, max(2 * largest, MIN_STAGING_BYTES))
        self._staging = StagingRing(staging_bytes, pin=True) if self._copy_stream else None
        self._max_bytes = max_in_flight_bytes
        self._fetch_bytes = min(fetch_bytes, max_in_flight_bytes)
        self._clock = clock
        # Reentrant: without threads a fetch runs where it is admitted.
        self._lock = threading.RLock()
        self._waiting: deque[tuple[Stream, tuple[PlannedCopy, ...]]] = deque()
        # Admitted, but no thread has begun them yet.
        self._queued: dict[int, tuple[Stream, tuple[PlannedCopy, ...]]] = {}
        self._numbers = itertools.count()
        self._in_flight: Counter[RecordRequest] = Counter()
        self._in_flight_bytes = 0
        self._left: Counter[RecordRequest] = Counter()
        self._moved_bytes: Counter[tuple[str, RecordKind]] = Counter()
        self._closed = False
        self._num_threads = num_threads
        self._pool = _new_pool(num_threads) if num_threads else None
        self._left_pool: ThreadPoolExecutor | None = None

    @property
    def tier(self) -> str:
        return self._source.tier

    @property
    def has_threads(self) -> bool:
        return self._pool is not None

    @property
    def in_flight_bytes(self) -> int:
        return self._in_flight_bytes

    @property
    def left_bytes(self) -> int:
        """Bytes of the stream that was left: still under way, or landed and not yet taken."""
        with self._lock:
            return sum(self._left.values())

    @property
    def moved_bytes(self) -> Counter[tuple[str, RecordKind]]:
        """Bytes the source delivered since the start, by (tier, kind)."""
        with self._lock:
            return Counter(self._moved_bytes)

    def start(self, copies: Sequence[PlannedCopy]) -> Stream:
        """Begin to fetch; returns at once. Use the stream in a `with`, on one thread."""
        assert not self._closed, "the streamer was closed"
        stream = Stream(self._source.tier, copies, self._release, self._withdraw, self._clock)
        if not copies:
            return stream
        with self._lock:
            self._waiting.extend((stream, batch) for batch in self._batches(copies))
            self._admit()
        return stream

    def leave(self, stream: Stream) -> None:
        """Let a stream's fetches run on unawaited; others start as if they were not there.

        Drops what the stream has not started. Only when no other stream is open, and the last one
        that was left is whole.
        """
        assert self._pool is not None, "without threads nothing is under way"
        stream.withdraw()
        with self._lock:
            assert not self._left, f"{len(self._left)} records of an earlier stream are still left"
            for copy in stream.leave(self._release_left):
                self._uncount(copy)
                self._left[copy.request] += copy.held_bytes
            # Its threads may hang for as long as the source waits: what follows has its own.
            self._pool.shutdown(wait=False)
            self._left_pool = self._pool
            self._pool = _new_pool(self._num_threads)
            self._admit()

    def check_integrity(self, *, idle: bool = False) -> None:
        """AssertionError naming every term when the bytes under way do not add up."""
        with self._lock:
            in_flight = sum(self._in_flight.values())
            waiting = sum(len(batch) for _, batch in self._waiting)
            assert in_flight == self._in_flight_bytes <= self._max_bytes, (
                f"streamer: records under way hold {in_flight} bytes, the count says "
                f"{self._in_flight_bytes}, the limit is {self._max_bytes}"
            )
            left = sum(self._left.values())
            assert left <= self._max_bytes, (
                f"streamer: records left behind hold {left} bytes, the limit is {self._max_bytes}"
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
                stream.deliver(Arrival(Landed(copy, None, error), None))
        for pool in (self._left_pool, self._pool):
            if pool is not None:
                pool.shutdown(wait=True)

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
                number = next(self._numbers)
                self._queued[number] = stream, batch
                self._pool.submit(self._run_queued, number)

    def _release(self, copy: PlannedCopy) -> None:
        with self._lock:
            self._uncount(copy)
            self._admit()

    def _uncount(self, copy: PlannedCopy) -> None:
        """A record is no longer under way. The lock is held."""
        self._in_flight[copy.request] -= copy.held_bytes
        if self._in_flight[copy.request] == 0:
            del self._in_flight[copy.request]
        self._in_flight_bytes -= copy.held_bytes

    def _release_left(self, copy: PlannedCopy) -> None:
        with self._lock:
            del self._left[copy.request]

    def _withdraw(self, stream: Stream, keep: frozenset[ExpertKey]) -> list[PlannedCopy]:
        """Drop what a stream still waits to start: of what was admitted, all but `keep`."""
        with self._lock:
            mine = [batch for owner, batch in self._waiting if owner is stream]
            self._waiting = deque(pair for pair in self._waiting if pair[0] is not stream)
            for number, (owner, batch) in list(self._queued.items()):
                if owner is stream and not any(copy.request.key in keep for copy in batch):
                    del self._queued[number]
                    mine.append(batch)
                    for copy in batch:
                        self._uncount(copy)
            self._admit()
        return [copy for batch in mine for copy in batch]

    def _run_queued(self, number: int) -> None:
        with self._lock:
            found = self._queued.pop(number, None)
        if found is not None:  # else it was withdrawn
            self._run_batch(*found)

    def _run_batch(self, stream: Stream, batch: tuple[PlannedCopy, ...]) -> None:
        """One fetch, on a pool thread; when it fails, each record alone, to find the bad ones."""
        handed = 0
        try:
            for arrival in self._fetch(stream, batch):
                stream.deliver(arrival)
                handed += 1
        except BaseException as bug:  # noqa: BLE001 - raised again on the thread that waits
            for copy in batch[handed:]:
                stream.deliver(Arrival(Landed(copy, None, None), None, bug))

    def _fetch(self, stream: Stream, batch: tuple[PlannedCopy, ...]) -> list[Arrival]:
        try:
            datas = self._source.fetch([copy.request for copy in batch])
        except StoreError as error:
            if len(batch) == 1 or stream.is_left:  # nobody waits: not worth finding the bad ones
                kept = without_frames(error)
                return [Arrival(Landed(copy, None, kept), None) for copy in batch]
            return [arrival for copy in batch for arrival in self._fetch(stream, (copy,))]
        with self._lock:
            for copy, data in zip(batch, datas, strict=True):
                self._moved_bytes[self._source.tier, copy.request.kind] += data.numel()
        return [self._to_device(copy, data) for copy, data in zip(batch, datas, strict=True)]

    def _to_device(self, copy: PlannedCopy, data: torch.Tensor) -> Arrival:
        moved_bytes = data.numel()
        try:
            data = self._decode(copy.request, data)
        except StoreError as error:
            return Arrival(Landed(copy, None, without_frames(error), moved_bytes), None)
        if self._copy_stream is None:
            return Arrival(Landed(copy, data, None, moved_bytes), None)
        assert self._staging is not None
        ready = torch.cuda.Event()
        if data.is_pinned():
            with torch.cuda.stream(self._copy_stream):
                on_device = data.to(self._device, non_blocking=True)
                ready.record(self._copy_stream)
            return Arrival(Landed(copy, on_device, None, moved_bytes), ready)
        with self._staging.range(data.numel()) as staged, torch.cuda.stream(self._copy_stream):
            staged.bytes_.copy_(data)
            on_device = staged.bytes_.to(self._device, non_blocking=True)
            ready.record(self._copy_stream)
            staged.done = ready
        return Arrival(Landed(copy, on_device, None, moved_bytes), ready)


def _new_pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="moetier-fetch")
