"""gRPC between simulated hosts: real handlers and callers, simulated wires.

A message takes a latency and its bytes' time; a cut link keeps messages until it is whole again, as
TCP does; a killed process resets its connections, a host that lost its power says nothing at all.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from expert_store.errors import StoreError
from tests.sim.clockwork import PROCESS, Killed, Process, SimThread, VirtualLoop, current_process
from tests.sim.stand_ins import SimFuture

LATENCY_S = 0.0005
BYTES_PER_S = 50e6
RESEND_S = 0.2
CONNECT_TIMEOUT_S = 20.0
RESET_S = 0.001


class SimRpcError(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """What a failed call raises: status and details, as grpc's own has."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


for _name in grpc.Call.__abstractmethods__ - {"code", "details"}:
    setattr(SimRpcError, _name, lambda self, *_: None)
SimRpcError.__abstractmethods__ = frozenset()


@dataclass(slots=True)
class Host:
    """A machine: whether it has power, how much slower it is than it should be."""

    name: str
    has_power: bool = True
    delays_s: list[float] = field(default_factory=list)  # that each of its answers takes longer

    @property
    def delay_s(self) -> float:
        return sum(self.delays_s)


@dataclass(slots=True)
class Network:
    """All hosts, links and listeners, and the calls under way."""

    loop: VirtualLoop
    hosts: dict[str, Host] = field(default_factory=dict)
    cut: set[frozenset[str]] = field(default_factory=set)
    listeners: dict[str, SimServer] = field(default_factory=dict)
    calls: list[SimCall] = field(default_factory=list)
    num_ports: int = 0

    def host(self, name: str) -> Host:
        return self.hosts.setdefault(name, Host(name))

    def is_open(self, left: str, right: str) -> bool:
        """Whether a message gets through now."""
        powered = self.host(left).has_power and self.host(right).has_power
        return powered and (left == right or frozenset((left, right)) not in self.cut)

    def delay_s(self, sender: str, receiver: str, num_bytes: int) -> float:
        return (
            LATENCY_S + num_bytes / BYTES_PER_S + self.host(sender).delay_s
            if sender != receiver
            else LATENCY_S / 5 + self.host(sender).delay_s
        )

    def socket_folder(self) -> Any:
        """As `SocketFolder`, whose socket no simulated host ever finds."""
        self.num_ports += 1
        address = f"unix:/nowhere/moetier-{self.num_ports}"
        return types.SimpleNamespace(address=address, close=lambda: None)

    def start_server(
        self,
        service: str,
        handlers: Mapping[str, grpc.RpcMethodHandler],
        addresses: Sequence[str],
        *,
        max_calls: int,
        max_bytes: int,
        **_: Any,
    ) -> tuple[SimServer, tuple[str, ...]]:
        """As `expert_store.rpc.start_server`."""
        process = current_process(self.loop)
        assert process is not None, "a server outside every process"
        bound = []
        for address in addresses:
            if address.endswith(":0"):
                self.num_ports += 1
                address = f"{address[:-2]}:{20000 + self.num_ports}"
            if address in self.listeners and not self.listeners[address].process.is_dead:
                raise StoreError(f"{service} cannot listen on {address}: in use")
            bound.append(address)
        paths = {f"/{service}/{name}": handler for name, handler in handlers.items()}
        server = SimServer(self, process, paths, max_calls, max_bytes)
        self.listeners |= dict.fromkeys(bound, server)
        return server, tuple(bound)

    def open_channel(self, address: str, **_: Any) -> SimChannel:
        """As `expert_store.rpc.open_channel`."""
        process = current_process(self.loop)
        assert process is not None, "a channel outside every process"
        return SimChannel(self, address, process)

    def reset(self, process: Process) -> None:
        """A process has died: its peers are told, if anybody is there to tell them."""
        for call in list(self.calls):
            if call.server is process or call.client is process:
                call.lost_peer(process)


@dataclass(slots=True)
class SimServer:
    """What listens: the handlers of one service in one process."""

    network: Network
    process: Process
    handlers: Mapping[str, grpc.RpcMethodHandler]
    max_calls: int
    max_bytes: int
    num_calls: int = 0
    most_calls: int = 0

    def stop(self, grace_s: float | None) -> Any:
        for address, server in list(self.network.listeners.items()):
            if server is self:
                del self.network.listeners[address]
        for call in list(self.network.calls):
            if call.listener is self:
                call.fail_soon(grpc.StatusCode.UNAVAILABLE, "the server shut down")
        return types.SimpleNamespace(wait=lambda *_: True)


class SimChannel:
    """A client's connection to one address."""

    def __init__(self, network: Network, address: str, client: Process) -> None:
        self._network, self._address, self._client = network, address, client
        self._is_closed = False
        self._calls: list[SimCall] = []

    def unary_unary(self, path: str, *_: Any, **__: Any) -> SimUnary:
        return SimUnary(self, path)

    def unary_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., SimCall]:
        def call(message: bytes, timeout: float | None = None, **options: Any) -> SimCall:
            return self.begin(path, iter([message]), timeout, options.get("metadata") or ())

        return call

    def stream_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., SimCall]:
        def call(
            messages: Iterator[bytes], timeout: float | None = None, **options: Any
        ) -> SimCall:
            return self.begin(
                path, messages, timeout, options.get("metadata") or (), is_streaming=True
            )

        return call

    def close(self) -> None:
        self._is_closed = True
        for call in self._calls:
            call.fail(grpc.StatusCode.CANCELLED, "Channel closed!")

    def begin(
        self,
        path: str,
        messages: Iterator[bytes],
        timeout: float | None,
        metadata: Iterable[tuple[str, str]],
        *,
        is_streaming: bool = False,
    ) -> SimCall:
        if self._is_closed:
            raise ValueError("Cannot invoke RPC on closed channel!")
        call = SimCall(self._network, self._client, self._address, path, tuple(metadata))
        self._calls = [each for each in self._calls if not each.is_over]
        self._calls.append(call)
        call.start(messages, timeout, is_streaming)
        return call


class SimUnary:
    """A method with one message each way: called, or started with `future`."""

    def __init__(self, channel: SimChannel, path: str) -> None:
        self._channel, self._path = channel, path

    def __call__(self, message: bytes, timeout: float | None = None, **options: Any) -> bytes:
        call = self._channel.begin(
            self._path, iter([message]), timeout, options.get("metadata") or ()
        )
        return next(call)

    def future(self, message: bytes, timeout: float | None = None, **options: Any) -> Any:
        call = self._channel.begin(
            self._path, iter([message]), timeout, options.get("metadata") or ()
        )
        return SimUnaryFuture(call)


class SimUnaryFuture(SimFuture):
    """grpc.Future of a unary call."""

    def __init__(self, call: SimCall) -> None:
        super().__init__(call.network.loop)
        self._call = call
        call.on_change = self._look

    def cancel(self) -> bool:
        self._call.cancel()
        return True

    def code(self) -> Any:
        return self._call.error.code() if self._call.error else grpc.StatusCode.OK

    def details(self) -> str:
        return self._call.error.details() if self._call.error else ""

    def _look(self) -> None:
        if self.done():
            return
        if self._call.answers:
            self.set_result(self._call.answers.popleft())
        elif self._call.error is not None:
            self.set_exception(self._call.error)


class SimCall:
    """One call under way: an iterator of the server's messages."""

    def __init__(
        self,
        network: Network,
        client: Process,
        address: str,
        path: str,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        self.network, self.client, self._address, self._path = network, client, address, path
        self._metadata = metadata
        self.listener: SimServer | None = None
        self.server: Process | None = None
        self.answers: deque[bytes] = deque()
        self.error: SimRpcError | None = None
        self.is_over = False
        self.on_change: Callable[[], None] | None = None
        self._is_finished = False  # the server has ended it well
        self._reader: SimThread | None = None
        self._requests: deque[bytes] = deque()
        self._no_more_requests = False
        self._server_thread: SimThread | None = None
        # Of each direction: when the last message comes, and what comes, in order.
        self._last_s = {True: 0.0, False: 0.0}
        self._coming: dict[bool, deque[Callable[[], None]]] = {True: deque(), False: deque()}
        self._deadline: Any = None

    def start(self, messages: Iterator[bytes], timeout: float | None, is_streaming: bool) -> None:
        loop = self.network.loop
        self.network.calls.append(self)
        if timeout is not None:
            self._deadline = loop.call_later(
                max(0.0, timeout), self.fail, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"
            )
        else:
            loop.call_later(CONNECT_TIMEOUT_S, self._check_connected)
        if is_streaming:
            SimThread(target=self._send_all, args=(messages,), name="sender", loop=loop).start()
        else:
            for message in messages:
                self._send(message)
            self._send(None)

    def __iter__(self) -> SimCall:
        return self

    def __next__(self) -> bytes:
        while True:
            if self.answers:
                return self.answers.popleft()
            if self.error is not None:
                raise self.error
            if self._is_finished:
                raise StopIteration
            self._reader = self.network.loop.thread
            self._reader.park()

    def cancel(self) -> bool:
        self.fail(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")
        return True

    def code(self) -> Any:
        return self.error.code() if self.error else grpc.StatusCode.OK

    def details(self) -> str:
        return self.error.details() if self.error else ""

    def fail(self, code: grpc.StatusCode, details: str) -> None:
        """End the call at the client; the server is told as far as it can be."""
        if self.is_over:
            return
        self.error = SimRpcError(code, details)
        self._end()

    def fail_soon(self, code: grpc.StatusCode, details: str) -> None:
        self._deliver(False, 0, lambda: self.fail(code, details))

    def lost_peer(self, process: Process) -> None:
        """One side's process has died."""
        if process is self.client:
            self._end()
        elif self.network.host(process.host).has_power:
            self.fail_soon(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")

    def _end(self) -> None:
        self.is_over = True
        if self in self.network.calls:
            self.network.calls.remove(self)
        if self.listener is not None:
            self.listener.num_calls -= 1
            self.listener = None
        if self._deadline is not None:
            self._deadline.cancel()
        if self._server_thread is not None:
            self._server_thread.kill()
        self._changed()

    def _changed(self) -> None:
        if self._reader is not None:
            self._reader.wake()
        if self.on_change is not None:
            self.on_change()

    def _check_connected(self) -> None:
        if self.server is None and not self.is_over:
            self.fail(grpc.StatusCode.UNAVAILABLE, "failed to connect: timed out")

    def _send_all(self, messages: Iterator[bytes]) -> None:
        for message in messages:
            if self.is_over:
                return
            self._send(message)
        self._send(None)

    def _send(self, message: bytes | None) -> None:
        self._deliver(True, len(message or b""), lambda: self._arrive(message))

    def _deliver(self, to_server: bool, num_bytes: int, act: Callable[[], None]) -> None:
        """Run `act` when a message gets to the other side: in order, once the link is open."""
        here, there = self.client.host, self._host_of_address()
        ends = (here, there) if to_server else (there, here)
        loop = self.network.loop
        at_s = max(loop.time() + self.network.delay_s(*ends, num_bytes), self._last_s[to_server])
        self._last_s[to_server] = at_s
        coming = self._coming[to_server]
        coming.append(act)

        def come() -> None:
            if self.is_over:
                return
            if not self.network.is_open(here, there):
                loop.call_later(RESEND_S, come)
                return
            coming.popleft()()

        loop.call_at(at_s, come)

    def _host_of_address(self) -> str:
        return self._address.rpartition(":")[0]

    def _arrive(self, message: bytes | None) -> None:
        """A message of the client has come to the server's host."""
        if self.server is None and not self._connect():
            return
        if self.server is not None and self.server.is_dead:
            return
        if message is None:
            self._no_more_requests = True
        else:
            self._requests.append(message)
        if self._server_thread is not None:
            self._server_thread.wake()

    def _connect(self) -> bool:
        listener = self.network.listeners.get(self._address)
        if listener is None or listener.process.is_dead:
            self.fail_soon(grpc.StatusCode.UNAVAILABLE, "Connection refused")
            return False
        if listener.num_calls >= listener.max_calls:
            self.fail_soon(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many concurrent calls")
            return False
        self.listener, self.server = listener, listener.process
        listener.num_calls += 1
        listener.most_calls = max(listener.most_calls, listener.num_calls)
        handler = listener.handlers[self._path]
        thread = SimThread(
            target=self._serve, args=(handler,), name="server", loop=self.network.loop
        )
        thread.process = self.server
        thread._context.run(_set_process, self.server)
        self._server_thread = thread
        thread.start()
        return True

    def _incoming(self) -> Iterator[bytes]:
        while True:
            while not self._requests:
                if self._no_more_requests:
                    return
                self.network.loop.thread.park()
            yield self._requests.popleft()

    def _serve(self, handler: grpc.RpcMethodHandler) -> None:
        context = _Context(self)
        try:
            if handler.stream_stream is not None:
                answers = handler.stream_stream(self._incoming(), context)
            elif handler.unary_stream is not None:
                answers = handler.unary_stream(next(self._incoming()), context)
            else:
                answers = iter([handler.unary_unary(next(self._incoming()), context)])
            for answer in answers:
                self._deliver(False, len(answer), lambda answer=answer: self._answer(answer))
        except _Abort as abort:
            self.fail_soon(abort.code, abort.details)
        except Killed:
            raise
        except Exception as error:  # noqa: BLE001 - as grpc does
            self.fail_soon(grpc.StatusCode.UNKNOWN, f"Exception calling application: {error}")
        else:
            self._deliver(False, 0, self._finish)

    def _answer(self, answer: bytes) -> None:
        self.answers.append(answer)
        self._changed()

    def _finish(self) -> None:
        self._is_finished = True
        self._end()


class _Abort(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class _Context:
    """`grpc.ServicerContext`, as far as the product uses it."""

    def __init__(self, call: SimCall) -> None:
        self._call = call

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise _Abort(code, details)

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._call._metadata

    def is_active(self) -> bool:
        return not self._call.is_over

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return True

    def time_remaining(self) -> float | None:
        return None


def _set_process(process: Process) -> None:
    PROCESS.set(process)
