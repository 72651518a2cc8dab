"""Goal: near-data calls over a stream give the executor's own answers, and fail in typed,
bounded ways.

Method: real servers in this process on free ports and unix sockets; workers stopped, hung and fed
with malformed frames on purpose. Tolerances are those of test_executor.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expert_store.errors import CorruptRecordError, ExpertUnavailableError, StoreError
from expert_store.latency import MIN_SAMPLES
from expert_store.segment import Segment
from expert_store.types import ExpertKey, ExpertOutputs, ExpertTokens, RecordRequest
from ndp_worker import wire
from ndp_worker.executor import Executor
from ndp_worker.group import Member, NearDataGroup
from ndp_worker.pending import PendingCall, PendingCalls
from ndp_worker.rpc import NdpClient, NdpServer
from ndp_worker.wire import Answer
from tests.gpu_worker.sources import LossySource
from tests.hand_store import build_store
from tests.ndp_worker.truth import reference_outputs

HIDDEN = 64
WAIT_S = 20.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def segment(tmp_path: Path) -> Segment:
    build_store(tmp_path / "store")
    return Segment(tmp_path / "store")


class Gated:
    """An executor that waits for a gate before each call, and counts them."""

    def __init__(self, executor: Executor) -> None:
        self.inner = executor
        self.manifest = executor.manifest
        self.gate = threading.Event()
        self.arrived = threading.Semaphore(0)

    def run(self, hidden_TH: torch.Tensor, work: tuple[ExpertTokens, ...]) -> ExpertOutputs:
        self.arrived.release()
        assert self.gate.wait(WAIT_S)
        return self.inner.run(hidden_TH, work)


def serve(stack: ExitStack, executor: object, *addresses: str, **kwargs: int) -> NdpServer:
    server = NdpServer(executor, addresses or ("127.0.0.1:0",), **kwargs)
    return stack.enter_context(closing(server))


def connect(stack: ExitStack, segment: Segment, *addresses: str, **kwargs: object) -> NdpClient:
    options = {"version": segment.manifest.version, "deadline_s": WAIT_S, **kwargs}
    return stack.enter_context(closing(NdpClient(addresses, **options)))


def work_of(*items: tuple[int, tuple[int, ...]], layer: int = 1) -> list[ExpertTokens]:
    return [ExpertTokens(ExpertKey(layer, expert), rows) for expert, rows in items]


MIXED = work_of((2, (0, 3, 4)), (0, (1,)), (1, (4, 0, 3, 3)))


RESTORED = [
    ExpertTokens(ExpertKey(1, 2), (0, 3, 4), (True, False, True)),
    ExpertTokens(ExpertKey(1, 0), (1,)),
    ExpertTokens(ExpertKey(1, 1), (4, 0), (True, True), 2),
]


@pytest.mark.parametrize(("backend", "tolerance"), [("cpu_fp32", 1e-5), ("cpu_int8", 3e-2)])
def test_restored_rows_agree_with_the_reference(
    stack: ExitStack, segment: Segment, backend: str, tolerance: float
) -> None:
    server = serve(stack, Executor(segment, backend=backend))
    client = connect(stack, segment, *server.addresses)
    hidden_TH = torch.randn(5, HIDDEN)
    found = client.submit(hidden_TH, RESTORED).result(WAIT_S)
    expected = reference_outputs(segment, hidden_TH, RESTORED)
    assert found.degraded == ()
    assert (found.output_PH - expected).norm() / expected.norm() < tolerance


def test_a_lost_compensator_is_told_over_the_wire(stack: ExitStack, segment: Segment) -> None:
    lost = ExpertKey(1, 2)
    source = LossySource(segment, [RecordRequest(lost, "factors")])
    server = serve(stack, Executor(source, backend="cpu_fp32"))
    client = connect(stack, segment, *server.addresses)
    hidden_TH = torch.randn(5, HIDDEN)
    found = client.submit(hidden_TH, RESTORED).result(WAIT_S)
    assert found.degraded == (0,)
    low_bit = [ExpertTokens(lost, (0, 3, 4)), *RESTORED[1:]]
    expected = reference_outputs(segment, hidden_TH, low_bit)
    assert (found.output_PH - expected).norm() / expected.norm() < 1e-5


def test_an_answer_that_degrades_what_was_not_restored_ends_the_stream(
    stack: ExitStack, segment: Segment
) -> None:
    class Confused(Executor):
        def run(self, hidden_TH: torch.Tensor, work: tuple[ExpertTokens, ...]) -> ExpertOutputs:
            return replace(super().run(hidden_TH, work), degraded=(1,))

    client = connect(stack, segment, *serve(stack, Confused(segment)).addresses)
    with pytest.raises(ExpertUnavailableError, match="place 1 of the call has no restored row"):
        client.submit(torch.randn(5, HIDDEN), RESTORED).result(WAIT_S)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize(("backend", "tolerance"), [("cpu_fp32", 1e-5), ("cpu_int8", 3e-2)])
def test_answers_agree_with_the_reference(
    stack: ExitStack, segment: Segment, tmp_path: Path, kind: str, backend: str, tolerance: float
) -> None:
    address = "127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s"
    server = serve(stack, Executor(segment, backend=backend), address)
    client = connect(stack, segment, *server.addresses)
    hidden_TH = torch.randn(5, HIDDEN)
    for work in (MIXED, work_of((0, (2,))), work_of((1, tuple(range(5))), layer=0)):
        found = client.submit(hidden_TH, work).result(WAIT_S).output_PH
        expected = reference_outputs(segment, hidden_TH, work)
        assert found.shape == expected.shape
        assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_travels_and_only_used_rows_do(
    stack: ExitStack, segment: Segment, dtype: torch.dtype
) -> None:
    executor = Executor(segment)
    client = connect(stack, segment, *serve(stack, executor).addresses)
    hidden_TH = torch.randn(100, HIDDEN).to(dtype)
    found = client.submit(hidden_TH, MIXED).result(WAIT_S).output_PH
    assert found.dtype == dtype
    assert torch.equal(found, executor.run(hidden_TH, MIXED).output_PH)
    # 40 of header, 3 experts with counts and blocks, 8 rows and flags, 4 of 100 hidden states.
    sent = 40 + 4 * (3 + 3 + 3 + 8) + 8 + 4 * HIDDEN * dtype.itemsize
    assert client.bytes_moved == (sent, 40 + 8 * HIDDEN * dtype.itemsize)


def test_nothing_to_do_needs_no_worker(stack: ExitStack, segment: Segment) -> None:
    client = connect(stack, segment, "127.0.0.1:1")
    for work in ([], work_of((0, ()))):
        found = client.submit(torch.zeros(3, HIDDEN), work).result(0)
        assert found.output_PH.shape == (0, HIDDEN)
    assert client.bytes_moved == (0, 0)


def test_submit_returns_at_once_with_many_calls_in_flight(
    stack: ExitStack, segment: Segment
) -> None:
    gated = Gated(Executor(segment))
    client = connect(stack, segment, *serve(stack, gated).addresses, max_in_flight=16)
    batches = [torch.randn(5, HIDDEN) for _ in range(16)]
    futures = [client.submit(batch, MIXED) for batch in batches]
    assert gated.arrived.acquire(timeout=WAIT_S)
    assert not any(future.done() for future in futures)
    with pytest.raises(ExpertUnavailableError, match="limit of calls in flight"):
        client.submit(batches[0], MIXED).result(WAIT_S)
    gated.gate.set()
    for batch, future in zip(batches, futures, strict=True):
        assert torch.equal(future.result(WAIT_S).output_PH, gated.inner.run(batch, MIXED).output_PH)


def test_many_threads_and_clients_get_their_own_answers(stack: ExitStack, segment: Segment) -> None:
    executor = Executor(segment)
    server = serve(stack, executor)
    clients = [connect(stack, segment, *server.addresses) for _ in range(2)]
    batches = [torch.randn(5, HIDDEN) for _ in range(12)]
    found: list[torch.Tensor | None] = [None] * len(batches)

    def run(index: int) -> None:
        found[index] = clients[index % 2].submit(batches[index], MIXED).result(WAIT_S).output_PH

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, outputs_PH in zip(batches, found, strict=True):
        assert outputs_PH is not None
        assert torch.equal(outputs_PH, executor.run(batch, MIXED).output_PH)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_repeated_call_gives_the_same_bits(
    stack: ExitStack, segment: Segment, num_threads: int
) -> None:
    """Later, at the same time, over other streams, at another worker, whatever ran between."""
    servers = [serve(stack, Executor(segment, num_threads=num_threads)) for _ in range(2)]
    clients = [connect(stack, segment, *server.addresses) for server in servers for _ in range(2)]
    hidden_TH = torch.randn(5, HIDDEN)
    first = clients[0].submit(hidden_TH, RESTORED).result(WAIT_S)
    other_prefix = [replace(RESTORED[0], num_blocks=1), RESTORED[1], RESTORED[2]]
    between = [client.submit(torch.randn(5, HIDDEN), other_prefix) for client in clients]
    again = [client.submit(hidden_TH, RESTORED) for client in clients for _ in range(5)]
    for future in again:
        outputs = future.result(WAIT_S)
        assert torch.equal(outputs.output_PH, first.output_PH)
        assert outputs.degraded == first.degraded == ()
    assert not any(torch.equal(f.result(WAIT_S).output_PH, first.output_PH) for f in between)


def test_two_answers_to_a_hedged_call_are_counted_once(stack: ExitStack, segment: Segment) -> None:
    """The second worker is asked, both answer, both degraded: the caller and the counts see one."""
    source = LossySource(segment, [RecordRequest(ExpertKey(1, 2), "factors")])
    workers = [Gated(Executor(source)) for _ in range(2)]
    clients = [connect(stack, segment, *serve(stack, each).addresses) for each in workers]
    work = [RESTORED[0]]
    hidden_TH = torch.randn(5, HIDDEN)
    due: list[tuple[float, Callable[[], None]]] = []
    near = NearDataGroup(
        [Member(client) for client in clients], later=lambda *timer: due.append(timer)
    )
    for _ in range(4 * MIN_SAMPLES):
        before, received = near.statistics, [client.bytes_moved[1] for client in clients]
        future = near.submit(hidden_TH, work)
        if len(due) == 2:  # one for its hedge: it is known how long the worker usually takes
            break
        set_gates(workers, is_open=True)
        future.result(WAIT_S)
        set_gates(workers, is_open=False)
        due.clear()
    due[0][1]()
    assert near.statistics.hedged == before.hedged + 1
    set_gates(workers, is_open=True)
    outputs = future.result(WAIT_S)
    wait_until(lambda: all(c.bytes_moved[1] > r for c, r in zip(clients, received, strict=True)))
    for client in clients:  # a stream answers in order: what came is delivered
        client.submit(hidden_TH, work).result(WAIT_S)
    assert torch.equal(outputs.output_PH, workers[0].inner.run(hidden_TH, work).output_PH)
    assert outputs.degraded == (0,)
    assert near.statistics == replace(
        before, calls=before.calls + 2, hedged=before.hedged + 1, degraded=before.degraded + 1
    )


def set_gates(workers: Sequence[Gated], *, is_open: bool) -> None:
    for worker in workers:
        worker.gate.set() if is_open else worker.gate.clear()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_callers_mistakes(stack: ExitStack, segment: Segment) -> None:
    server = serve(stack, Executor(segment))
    client = connect(stack, segment, *server.addresses, max_message_bytes=4096)
    hidden_TH = torch.zeros(5, HIDDEN)
    for bad_hidden, work, message in (
        (hidden_TH, work_of((0, (5,))), "row 5 of 5"),
        (hidden_TH.int(), MIXED, "torch.int32"),
        (hidden_TH, MIXED + work_of((0, (0,)), layer=0), "one call per layer"),
        (torch.zeros(40, HIDDEN), work_of((0, tuple(range(40)))), "at most 4096"),
    ):
        with pytest.raises(ValueError, match=message):
            client.submit(bad_hidden, work)
    for bad_hidden, work, message in (  # what only the worker knows
        (hidden_TH, work_of((77, (0,))), "layer 1 expert 77 is not in store"),
        (torch.zeros(5, 32), MIXED, r"expected \[T, 64\]"),
    ):
        with pytest.raises(ValueError, match=message):
            client.submit(bad_hidden, work).result(WAIT_S)
    assert client.submit(hidden_TH, MIXED).result(WAIT_S).output_PH.shape == (8, HIDDEN)


def test_damage_and_absence_keep_their_types(stack: ExitStack, segment: Segment) -> None:
    record = segment.manifest.experts[ExpertKey(1, 0)].codes
    path = segment.store / record.file
    data = bytearray(path.read_bytes())
    data[record.offset] ^= 1
    path.write_bytes(data)
    part = Segment(segment.store, [ExpertKey(1, 0), ExpertKey(1, 1)])
    client = connect(stack, part, *serve(stack, Executor(part)).addresses)
    hidden_TH = torch.zeros(1, HIDDEN)
    with pytest.raises(CorruptRecordError, match="layer 1 expert 0 .* expected sha256"):
        client.submit(hidden_TH, work_of((0, (0,)))).result(WAIT_S)
    with pytest.raises(ExpertUnavailableError, match="layer 1 expert 2 .* not in this segment"):
        client.submit(hidden_TH, work_of((2, (0,)))).result(WAIT_S)
    found = client.submit(hidden_TH, work_of((1, (0,)))).result(WAIT_S)
    assert found.output_PH.shape == (1, HIDDEN)


def test_an_answer_over_the_limit_is_refused(stack: ExitStack, segment: Segment) -> None:
    server = serve(stack, Executor(segment), max_message_bytes=4096)
    client = connect(stack, segment, *server.addresses)
    many = work_of((0, (0,) * 20))
    with pytest.raises(ValueError, match="over the limit; split the call"):
        client.submit(torch.zeros(1, HIDDEN), many).result(WAIT_S)


def test_a_lost_worker_fails_its_calls_and_is_found_again(
    stack: ExitStack, segment: Segment, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/s"
    gated = Gated(Executor(segment))
    server = serve(stack, gated, address)
    client = connect(stack, segment, address)
    hidden_TH = torch.randn(5, HIDDEN)
    futures = [client.submit(hidden_TH, MIXED) for _ in range(3)]
    assert gated.arrived.acquire(timeout=WAIT_S)
    stopping = server._server.stop(0)  # as a killed process would: streams are cut
    for future in futures:
        with pytest.raises(ExpertUnavailableError, match=f"worker at {address} is lost"):
            future.result(WAIT_S)
    gated.gate.set()
    stopping.wait()
    with pytest.raises(ExpertUnavailableError):
        client.submit(hidden_TH, MIXED).result(WAIT_S)
    serve(stack, Executor(segment), address)
    assert client.submit(hidden_TH, MIXED).result(WAIT_S).output_PH.shape == (8, HIDDEN)


def test_the_next_address_is_tried_after_a_loss(stack: ExitStack, segment: Segment) -> None:
    gone = serve(stack, Executor(segment))
    gone.close(0)
    client = connect(stack, segment, *gone.addresses, *serve(stack, Executor(segment)).addresses)
    hidden_TH = torch.randn(5, HIDDEN)
    with pytest.raises(ExpertUnavailableError):
        client.submit(hidden_TH, MIXED).result(WAIT_S)
    assert client.submit(hidden_TH, MIXED).result(WAIT_S).output_PH.shape == (8, HIDDEN)


def test_a_hung_worker_is_lost_at_the_deadline(stack: ExitStack, segment: Segment) -> None:
    gated = Gated(Executor(segment))
    server = serve(stack, gated)
    stack.callback(gated.gate.set)
    client = connect(stack, segment, *server.addresses, deadline_s=0.2)
    started = time.monotonic()
    futures = [client.submit(torch.randn(5, HIDDEN), MIXED) for _ in range(3)]
    for future in futures:
        with pytest.raises(ExpertUnavailableError, match="no answer within 0.2 s"):
            future.result(WAIT_S)
    assert time.monotonic() - started < 2


def test_a_worker_with_another_store_is_refused(stack: ExitStack, segment: Segment) -> None:
    server = serve(stack, Executor(segment))
    client = connect(stack, segment, *server.addresses, version="other")
    with pytest.raises(ExpertUnavailableError, match="the caller has other"):
        client.submit(torch.randn(5, HIDDEN), MIXED).result(WAIT_S)


def test_close_fails_what_waits(stack: ExitStack, segment: Segment) -> None:
    gated = Gated(Executor(segment))
    stack.callback(gated.gate.set)
    client = connect(stack, segment, *serve(stack, gated).addresses)
    future = client.submit(torch.randn(5, HIDDEN), MIXED)
    assert gated.arrived.acquire(timeout=WAIT_S)
    client.close()
    with pytest.raises(ExpertUnavailableError, match="client was closed"):
        future.result(WAIT_S)
    with pytest.raises(ExpertUnavailableError, match="is closed"):
        client.submit(torch.randn(5, HIDDEN), MIXED).result(WAIT_S)
    client.close()
    assert not future.cancel()


def test_bad_settings_and_a_port_in_use(stack: ExitStack, segment: Segment) -> None:
    server = serve(stack, Executor(segment))
    with pytest.raises(StoreError, match=f"cannot listen on {server.addresses[0]}"):
        serve(stack, Executor(segment), *server.addresses)
    with pytest.raises(ValueError, match="addresses"):
        NdpClient((), version="v")
    with pytest.raises(ValueError, match="deadline_s"):
        NdpClient(("x:1",), version="v", deadline_s=0)


class RawStream:
    """A client that sends any bytes at all."""

    def __init__(self, stack: ExitStack, server: NdpServer, version: str) -> None:
        channel = stack.enter_context(grpc.insecure_channel(server.addresses[0]))
        self.frames: SimpleQueue[bytes | None] = SimpleQueue()
        stack.callback(self.frames.put, None)
        self.answers = channel.stream_stream("/moetier.NearData/Run")(
            iter(self.frames.get, None), metadata=(("moetier-version", version),), timeout=120
        )

    def ask(self, frame: bytes) -> Answer:
        self.frames.put(frame)
        return wire.decode_answer(next(self.answers))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawStream]:
    folder = tmp_path_factory.mktemp("raw")
    build_store(folder)
    segment = Segment(folder)
    with ExitStack() as stack:
        server = serve(stack, Executor(segment))
        yield RawStream(stack, server, segment.manifest.version)


FRAME = wire.encode_call(5, torch.ones(5, HIDDEN), [*MIXED, *RESTORED])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_mutated_frame_is_answered_and_the_stream_goes_on(
    raw: RawStream, data: st.DataObject
) -> None:
    frame = bytearray(FRAME)
    places = st.integers(0, 39) | st.integers(0, len(frame) - 1)  # the header, or anywhere
    for _ in range(data.draw(st.integers(0, 4))):
        frame[data.draw(places)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(frame)) | st.integers(0, len(frame)))
    answer = raw.ask(bytes(frame[:cut]))
    assert isinstance(answer.result, ExpertOutputs | ValueError | StoreError)
    if not isinstance(answer.result, ExpertOutputs):
        assert str(answer.result)
    good = raw.ask(FRAME)
    assert good.request_id == 5
    assert isinstance(good.result, ExpertOutputs)


def pending(owner: str, shape: tuple[int, int] = (1, 2)) -> PendingCall[str]:
    return PendingCall(owner, 10.0, shape, torch.float32)


def test_pending_calls_are_taken_once_and_by_the_right_answer() -> None:
    calls: PendingCalls[str] = PendingCalls(3)
    first, second, third = pending("a"), pending("b"), pending("a")
    for request_id, call in enumerate((first, second, third), start=1):
        calls.add(request_id, call)
    assert calls.is_full
    assert calls.oldest is first
    with pytest.raises(AssertionError):
        calls.add(4, pending("c"))
    for wrong in (torch.zeros(2, 2), torch.zeros(1, 2, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"outputs: expected torch.float32 \(1, 2\)"):
            calls.take(Answer(1, ExpertOutputs(wrong)))
    assert calls.take(Answer(1, ExpertOutputs(torch.zeros(1, 2)))) is first
    with pytest.raises(ValueError, match="no call has id 1"):
        calls.take(Answer(1, ExpertOutputs(torch.zeros(1, 2))))
    assert calls.take_all("a") == [third]
    assert calls.take(Answer(2, ValueError("x"))) is second
    assert calls.oldest is None
    assert isinstance(first.future, Future)
