"""Records over gRPC as raw bytes: a server in front of a segment, and the source that asks it.

Owns the connections. The bytes of a request are `expert_store/wire.py`, which copy to ask is
`expert_store/failover.py`. No protobuf: identity serialisers, so that nothing is copied twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import grpc
import torch

from expert_store import wire
from expert_store.errors import (
    CorruptRecordError,
    ExpertUnavailableError,
    StoreError,
    StoreFormatError,
)
from expert_store.failover import Attempts, ListedCopies, check_deadline
from expert_store.fetching import Call, Fetch, lost
from expert_store.health import CopyHealth, ReadingStatistics
from expert_store.listing import Listing
from expert_store.segment import Segment, locate
from expert_store.types import Manifest, RecordRequest

SERVICE = "moetier.Records"
MAX_MESSAGE_BYTES = 8 * 2**20
MAX_DETAIL_CHARS = 1000  # of an error's text: it travels as a header, and those are small
MAX_CALLS_AT_ONCE = 64  # of one source; those to a copy that hangs are ended by the others'

_STATUS = (
    (CorruptRecordError, grpc.StatusCode.DATA_LOSS),
    (ExpertUnavailableError, grpc.StatusCode.NOT_FOUND),
    (StoreError, grpc.StatusCode.FAILED_PRECONDITION),
    (ValueError, grpc.StatusCode.INVALID_ARGUMENT),
)


class RecordServer:
    """Serves a segment's records on all `addresses` until closed.

    An address is "host:port" (port 0 takes a free one) or "unix:/path". Raises StoreError when an
    address cannot be listened on.
    """

    def __init__(
        self,
        segment: Segment,
        addresses: Sequence[str] = ("127.0.0.1:0",),
        *,
        max_connections: int = 16,
    ) -> None:
        self._segment, self._version = segment, segment.manifest.version
        self._frames = wire.Frames(segment.manifest)
        handlers = {
            "Fetch": grpc.unary_stream_rpc_method_handler(self._fetch),
            "FetchSmall": grpc.unary_unary_rpc_method_handler(self._fetch_small),
        }
        self._server, self._addresses = start_server(
            SERVICE, handlers, addresses, max_calls=max_connections, max_bytes=MAX_MESSAGE_BYTES
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens, real ports filled in, in the order given."""
        return self._addresses

    def close(self, grace_s: float = 1.0) -> None:
        """Take no new call; cut the running ones off after `grace_s`."""
        self._server.stop(grace_s).wait()

    def _fetch(self, message: bytes, context: Any) -> Iterator[bytes]:
        try:
            call = wire.decode_call(message)
            if call.version != self._version:
                raise StoreFormatError(
                    f"this copy holds store version {self._version}, not {call.version}; restart it"
                )
            records = self._segment.fetch(call.requests)
        except (ValueError, StoreError) as error:
            status = next(status for kind, status in _STATUS if isinstance(error, kind))
            context.abort(status, str(error)[:MAX_DETAIL_CHARS])
            raise AssertionError("abort() raises") from error
        yield from wire.answer(call, records, self._frames)

    def _fetch_small(self, message: bytes, context: Any) -> bytes:
        return b"".join(self._fetch(message, context))


class GrpcSource:
    """Reads records from the copies that are listed; tier "grpc". Thread-safe.

    `find` gives the listings (`directory.listings`); other store versions and roles are passed
    over. A copy that is gone, slow or damaged is replaced by another one, within `deadline_s`.
    With compression "zstd" the records travel entropy-coded and are decoded here.
    """

    tier = "grpc"

    def __init__(
        self,
        manifest: Manifest,
        find: Callable[[], Sequence[Listing]],
        *,
        compression: wire.Compression = "none",
        deadline_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        client: int = 0,
    ) -> None:
        check_deadline(deadline_s)
        self._manifest, self._compression = manifest, compression
        self._deadline_s, self._clock = deadline_s, clock
        self._copies = ListedCopies(find, manifest.version, clock=clock)
        self._health = CopyHealth(clock, client)
        self._pool = futures.ThreadPoolExecutor(MAX_CALLS_AT_ONCE, "moetier-ask")
        self._channels: dict[str, grpc.Channel] = {}
        self._bytes_sent = self._bytes_received = self._record_bytes = 0
        self._lock, self._closed = threading.Lock(), threading.Event()

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes of messages (sent, received) since the start; a failed try's bytes count too."""
        return self._bytes_sent, self._bytes_received

    @property
    def record_bytes(self) -> int:
        """Bytes of the records that came whole; over those received, what compression saved."""
        return self._record_bytes

    @property
    def statistics(self) -> ReadingStatistics:
        """Of the calls to copies since the start."""
        return self._health.statistics

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        """The records' bytes in request order, each a flat uint8 tensor, maybe read-only.

        Raises ValueError for a request no store could answer, ExpertUnavailableError when no copy
        gave a record before the deadline, CorruptRecordError when every copy of it is damaged.
        """
        sizes = [locate(self._manifest, request).num_bytes for request in requests]
        attempts = Attempts(requests, sizes=sizes, health=self._health, max_batch=wire.MAX_REQUESTS)
        fetch = Fetch(
            attempts,
            self._copies,
            lambda call, left_s: self._ask(
                call, [requests[index] for index in call.batch.indices], left_s
            ),
            health=self._health,
            pool=self._pool,
            clock=self._clock,
            is_closed=self._closed.is_set,
        )
        try:
            return fetch.run(self._deadline_s)
        except ValueError as error:
            if self._closed.is_set():  # gRPC's own word for a channel that was closed meanwhile
                raise ExpertUnavailableError("the source is closed") from error
            raise

    def close(self) -> None:
        """Hang up; fetches that are under way fail."""
        self._closed.set()
        with self._lock:
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()
        self._pool.shutdown(wait=False)

    def _ask(
        self, call: Call, wanted: Sequence[RecordRequest], left_s: float
    ) -> list[torch.Tensor]:
        """As `fetching.Ask`; ValueError when the copy finds the request wrong."""
        try:
            return self._ask_one(call, wanted, left_s)
        except StoreFormatError as error:
            raise lost(error) from error
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
            if code == grpc.StatusCode.DATA_LOSS:
                raise CorruptRecordError(details) from error
            if code == grpc.StatusCode.NOT_FOUND:
                raise ExpertUnavailableError(details) from error
            if code == grpc.StatusCode.INVALID_ARGUMENT:
                where = call.batch.address
                raise ValueError(f"{where} refused the request: {details}") from error
            raise lost(f"{code.name}: {details}") from error

    def _ask_one(
        self, call: Call, wanted: Sequence[RecordRequest], left_s: float
    ) -> list[torch.Tensor]:
        message = wire.encode_call(self._manifest.version, wanted, self._compression)
        lengths = [locate(self._manifest, r).num_bytes for r in wanted]
        assembly = wire.assembly_of(lengths, self._compression)
        channel = self._channel(call.batch.address)
        self._count(len(message), 0)
        answer: Iterable[bytes]
        if assembly.num_bytes > wire.CHUNK_BYTES:
            stream = channel.unary_stream(f"/{SERVICE}/Fetch")(message, timeout=left_s)
            call.on_cancel(stream.cancel)
            answer = stream
        elif call.batch.is_only_hope:
            answer = [channel.unary_unary(f"/{SERVICE}/FetchSmall")(message, timeout=left_s)]
        else:
            future = channel.unary_unary(f"/{SERVICE}/FetchSmall").future(message, timeout=left_s)
            call.on_cancel(future.cancel)
            answer = [_result(future)]
        for chunk in answer:
            self._count(0, len(chunk))
            assembly.add(chunk)
        records = assembly.finish()
        self._count(0, 0, sum(lengths))
        return records

    def _channel(self, address: str) -> grpc.Channel:
        with self._lock:
            if self._closed.is_set():
                raise ExpertUnavailableError("the source is closed")
            if address not in self._channels:
                self._channels[address] = open_channel(address, max_bytes=MAX_MESSAGE_BYTES)
            return self._channels[address]

    def _count(self, sent: int, received: int, delivered: int = 0) -> None:
        with self._lock:
            self._bytes_sent += sent
            self._bytes_received += received
            self._record_bytes += delivered


def _result(future: Any) -> bytes:
    try:
        answer: bytes = future.result()
    except grpc.FutureCancelledError as error:
        raise lost("cancelled: another copy was quicker") from error
    return answer


def start_server(
    service: str,
    handlers: Mapping[str, grpc.RpcMethodHandler],
    addresses: Sequence[str],
    *,
    max_calls: int,
    max_bytes: int,
) -> tuple[grpc.Server, tuple[str, ...]]:
    """A started server of raw-bytes handlers, and where it listens with real ports.

    `max_calls` run at once, each on a thread; more are refused. `max_bytes` bounds a message.
    Raises ValueError without an address, StoreError when one cannot be listened on.
    """
    if not addresses:
        raise ValueError("addresses: got none, expected one to listen on")
    server = grpc.server(
        futures.ThreadPoolExecutor(max_calls, thread_name_prefix=service),
        maximum_concurrent_rpcs=max_calls,
        options=[
            ("grpc.max_receive_message_length", max_bytes),
            ("grpc.max_send_message_length", max_bytes),
            ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
        ],
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    bound = []
    for address in addresses:
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            server.stop(None)
            raise StoreError(
                f"{service} cannot listen on {address}: {error}; choose another (0: any free)"
            ) from error
        is_unix = address.startswith("unix:")
        bound.append(address if is_unix else f"{address.rpartition(':')[0]}:{port}")
    server.start()
    return server, tuple(bound)


def open_channel(address: str, *, max_bytes: int) -> grpc.Channel:
    """A channel that tries a lost server again after 0.1 to 1 s, not gRPC's 1 to 120."""
    return grpc.insecure_channel(
        address,
        options=[
            ("grpc.max_receive_message_length", max_bytes),
            ("grpc.max_send_message_length", max_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ],
    )
