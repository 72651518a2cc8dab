"""Near-data calls over one persistent gRPC stream: the server in front of an executor, the client.

Owns the connections, deadlines and the matching of answers to calls. The bytes of a frame are
`ndp_worker/wire.py`. No protobuf: identity serialisers.

Legend: T tokens, P (expert, token) pairs, H hidden.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import grpc
import torch

from expert_store.errors import ExpertUnavailableError, StoreError
from expert_store.listing import is_reachable
from expert_store.rpc import open_channel, start_server
from expert_store.types import ExpertOutputs, ExpertTokens
from ndp_worker.executor import Executor, check_work
from ndp_worker.pending import PendingCall, PendingCalls
from ndp_worker.wire import (
    decode_answer,
    decode_call,
    encode_answer,
    encode_call,
    encode_error,
    request_id_of,
    used_rows,
)

logger = logging.getLogger(__name__)

SERVICE = "moetier.NearData"
MAX_MESSAGE_BYTES = 64 * 2**20
VERSION_KEY = "moetier-version"  # metadata: the store version the caller has the manifest of


class NdpServer:
    """Runs calls on an executor, for every stream that callers open on `addresses`.

    A stream's calls are answered in order. A call that cannot be decoded or run is answered with a
    typed error and the stream goes on. Calls are idempotent: one that comes again, on this or
    another stream, is computed again to the same bits. Raises StoreError when an address cannot be
    listened on.
    """

    def __init__(
        self,
        executor: Executor,
        addresses: Sequence[str] = ("127.0.0.1:0",),
        *,
        max_connections: int = 32,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._executor = executor
        self._max_message_bytes = max_message_bytes
        handlers = {"Run": grpc.stream_stream_rpc_method_handler(self._run)}
        self._server, self._addresses = start_server(
            SERVICE, handlers, addresses, max_calls=max_connections, max_bytes=max_message_bytes
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens, real ports filled in, in the order given."""
        return self._addresses

    def close(self, grace_s: float = 0.5) -> None:
        """Take no new stream; cut the open ones off after `grace_s`."""
        self._server.stop(grace_s).wait()

    def _run(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        version = dict(context.invocation_metadata()).get(VERSION_KEY)
        held = self._executor.manifest.version
        if version != held:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this worker holds store version {held}, the caller has {version}; restart "
                "whichever is older",
            )
        for message in messages:
            yield self._answer(message)

    def _answer(self, message: bytes) -> bytes:
        try:
            call = decode_call(message)
            outputs = self._executor.run(call.hidden_TH, call.work)
            answer = encode_answer(call.request_id, outputs)
            if len(answer) > self._max_message_bytes:
                raise ValueError(f"outputs: {len(answer)} bytes are over the limit; split the call")
        except (ValueError, StoreError) as error:
            return encode_error(request_id_of(message), error)
        return answer


class NdpClient:
    """Sends batches to one near-data worker. Thread-safe; `submit` does not block.

    `addresses` all lead to that worker, best first ("unix:/path" on its own host); after a loss
    the next submit connects anew, to the next address that can be reached. A call that is not
    answered within `deadline_s` counts as a loss too; it may be submitted again, here or to another
    worker, though the worker may have run it.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        version: str,
        deadline_s: float = 5.0,
        max_in_flight: int = 256,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not addresses:
            raise ValueError("addresses: got none, expected those of a near-data worker")
        if deadline_s <= 0 or max_in_flight < 1:
            raise ValueError(
                f"deadline_s and max_in_flight: got {deadline_s} and {max_in_flight}, expected "
                "positive numbers"
            )
        self._addresses = tuple(addresses)
        self._version = version
        self._deadline_s = deadline_s
        self._max_message_bytes = max_message_bytes
        self._clock = clock
        self._ids = itertools.count(1)
        self._num_lost = 0
        self._bytes_sent = self._bytes_received = 0
        self._pending: PendingCalls[_Stream] = PendingCalls(max_in_flight)
        self._stream: _Stream | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._watcher = threading.Thread(target=self._watch, name="ndp-deadlines", daemon=True)
        self._watcher.start()

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes of frames (sent, received) since the start."""
        return self._bytes_sent, self._bytes_received

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        """Start one layer's batch: outputs in the order of `work`.

        Only the rows that some expert needs travel. Raises ValueError for rows, dtypes or limits;
        the future raises ExpertUnavailableError when the worker is lost, CorruptRecordError when
        its copy is damaged, ValueError when it does not know an expert or a shape.
        """
        check_work(hidden_TH, work, hidden_TH.shape[-1])
        rows, work = used_rows(work)
        shape = (sum(len(item.token_rows) for item in work), hidden_TH.shape[1])
        if not shape[0]:
            return _resolved(ExpertOutputs(hidden_TH.new_empty(shape, device="cpu")))
        restorable = frozenset(place for place, item in enumerate(work) if item.restored)
        request_id = next(self._ids)
        frame = encode_call(request_id, hidden_TH[rows].cpu(), work)
        if len(frame) > self._max_message_bytes:
            raise ValueError(f"call: {len(frame)} bytes, at most {self._max_message_bytes}; split")
        with self._changed:
            if self._closed or self._pending.is_full:
                state = "closed" if self._closed else "at its limit of calls in flight"
                return _resolved(ExpertUnavailableError(f"the near-data client is {state}"))
            stream = self._stream = self._stream or self._connect()
            deadline = self._clock() + self._deadline_s
            call = PendingCall(stream, deadline, shape, hidden_TH.dtype, restorable)
            self._pending.add(request_id, call)
            self._changed.notify()
            stream.frames.put(frame)
        return call.future

    def close(self) -> None:
        """Hang up; calls that are under way fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            stream = self._stream
        self._watcher.join()
        if stream is not None:
            self._drop(stream, "the client was closed")
            stream.reader.join()

    def _connect(self) -> _Stream:
        reachable = [address for address in self._addresses if is_reachable(address)]
        candidates = reachable or list(self._addresses)
        address = candidates[self._num_lost % len(candidates)]
        channel = open_channel(address, max_bytes=self._max_message_bytes)
        frames: SimpleQueue[bytes | None] = SimpleQueue()
        call = channel.stream_stream(f"/{SERVICE}/Run")(
            self._outgoing(frames), metadata=((VERSION_KEY, self._version),)
        )
        stream = _Stream(address, channel, call, frames)
        stream.reader = threading.Thread(
            target=self._read, args=(stream,), name="ndp-answers", daemon=True
        )
        stream.reader.start()
        return stream

    def _outgoing(self, frames: SimpleQueue[bytes | None]) -> Iterator[bytes]:
        while (frame := frames.get()) is not None:
            with self._changed:
                self._bytes_sent += len(frame)
            yield frame

    def _read(self, stream: _Stream) -> None:
        try:
            for message in stream.call:
                with self._changed:
                    self._bytes_received += len(message)
                self._deliver(message)
            reason = "the worker ended the stream"
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except ValueError as error:
            reason = f"an answer that cannot be read: {error}"
        self._drop(stream, reason)

    def _deliver(self, message: bytes) -> None:
        answer = decode_answer(message)
        with self._changed:
            call = self._pending.take(answer)
        if isinstance(answer.result, ExpertOutputs):
            call.future.set_result(answer.result)
        else:
            call.future.set_exception(answer.result)

    def _drop(self, stream: _Stream, reason: str) -> None:
        """Fail what was sent on a stream and let the next submit connect anew."""
        with self._changed:
            if self._stream is stream:
                self._stream = None
                self._num_lost += 1
            failed = self._pending.take_all(stream)
        stream.hang_up()
        message = f"the near-data worker at {stream.address} is lost: {reason}"
        if failed:
            logger.warning("%s; %d calls failed", message, len(failed))
        for call in failed:
            call.future.set_exception(
                ExpertUnavailableError(f"{message}; its experts can be streamed instead")
            )

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                oldest = self._pending.oldest
                left_s = oldest.deadline - self._clock() if oldest else None
                if oldest is None or (left_s is not None and left_s > 0):
                    self._changed.wait(left_s)
                    continue
            self._drop(oldest.owner, f"no answer within {self._deadline_s:g} s")


class _Stream:
    """One connection: its channel, its call, and the frames that wait to be sent."""

    reader: threading.Thread

    def __init__(
        self,
        address: str,
        channel: grpc.Channel,
        call: Any,
        frames: SimpleQueue[bytes | None],
    ) -> None:
        self.address = address
        self.call = call
        self.frames = frames
        self._channel = channel

    def hang_up(self) -> None:
        self.frames.put(None)
        self.call.cancel()
        self._channel.close()


def _resolved(outcome: ExpertOutputs | StoreError) -> Future[ExpertOutputs]:
    future: Future[ExpertOutputs] = Future()
    if isinstance(outcome, ExpertOutputs):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
    return future
