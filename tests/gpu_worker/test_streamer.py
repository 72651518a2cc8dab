"""Goal: records arrive whole, within the byte limit, batched; errors reach who waits; no leaks.

Method: a real segment behind sources that count, fail or wait on events; every n-th call is failed
in turn until a run has no failure.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from expert_store.errors import CorruptRecordError, ExpertUnavailableError, StoreFormatError
from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.record_sizes import PlannedCopy, RecordSizes, largest_expert_bytes
from gpu_worker.streamer import Streamer
from tests.gpu_worker.sources import CountingSource, FailingSource, LossySource
from tests.hand_store import build_store

NUM_EXPERTS = 4


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Segment:
    folder = tmp_path_factory.mktemp("store")
    build_store(folder, layers=(0,), experts=NUM_EXPERTS, ffn=64, blocks="gd")
    return Segment(folder)


def copies_of(segment: Segment, num_experts: int = NUM_EXPERTS) -> list[PlannedCopy]:
    sizes = RecordSizes.of(segment.manifest)
    requests = [
        RecordRequest(ExpertKey(0, expert), kind)
        for expert in range(num_experts)
        for kind in ("codes", "factors")
    ]
    return [PlannedCopy(request, sizes.bytes_of(request)) for request in requests]


def make(
    source: CountingSource,
    *,
    experts_in_flight: int = 8,
    experts_per_fetch: int = 8,
    threads: int = 2,
    **options: Any,
) -> Streamer:
    largest = largest_expert_bytes(source.manifest)
    return Streamer(
        source,
        device="cpu",
        max_in_flight_bytes=experts_in_flight * largest,
        fetch_bytes=experts_per_fetch * largest,
        num_threads=threads,
        **options,
    )


def drain(streamer: Streamer, copies: Sequence[PlannedCopy]) -> dict[RecordRequest, object]:
    """What landed for each copy: its bytes, or its error."""
    got: dict[RecordRequest, object] = {}
    with streamer.start(copies) as stream:
        for landed in stream:
            streamer.check_integrity()
            got[landed.copy.request] = landed.error if landed.data is None else landed.data
            stream.release(landed.copy.request)
    streamer.check_integrity(idle=True)
    return got


@pytest.mark.parametrize("in_flight", [1, 2, 8])
@pytest.mark.parametrize("per_fetch", [1, 3])
@pytest.mark.parametrize("threads", [0, 2])
def test_every_record_lands_once_with_the_source_s_bytes(
    segment: Segment, in_flight: int, per_fetch: int, threads: int
) -> None:
    source = CountingSource(segment)
    streamer = make(
        source, experts_in_flight=in_flight, experts_per_fetch=per_fetch, threads=threads
    )
    copies = copies_of(segment)
    got = drain(streamer, copies)
    streamer.close()
    for copy in copies:
        assert torch.equal(got[copy.request], segment.fetch([copy.request])[0])
    expected = {
        kind: sum(copy.num_bytes for copy in copies if copy.request.kind == kind)
        for kind in ("codes", "factors")
    }
    assert source.bytes == expected
    assert streamer.moved_bytes == {("test", kind): count for kind, count in expected.items()}


def test_a_layer_that_fits_is_one_fetch_and_an_expert_is_never_cut(segment: Segment) -> None:
    source = CountingSource(segment)
    streamer = make(source)
    drain(streamer, copies_of(segment))
    assert [len(call) for call in source.calls] == [2 * NUM_EXPERTS]
    streamer.close()

    source = CountingSource(segment)
    streamer = make(source, experts_per_fetch=1)
    drain(streamer, copies_of(segment))
    assert sorted(call[0].key for call in source.calls) == [ExpertKey(0, e) for e in range(4)]
    assert all(call[0].key == call[1].key for call in source.calls)
    streamer.close()


def test_without_threads_records_land_in_the_order_asked_for(segment: Segment) -> None:
    source = CountingSource(segment)
    streamer = make(source, experts_in_flight=2, experts_per_fetch=1, threads=0)
    copies = copies_of(segment)
    assert list(drain(streamer, copies)) == [copy.request for copy in copies]
    streamer.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_no_more_than_the_limit_is_under_way_until_it_is_released(
    segment: Segment, threads: int
) -> None:
    """Two experts fit: the third is fetched only after one of them was released."""
    source = CountingSource(segment)
    streamer = make(source, experts_in_flight=2, experts_per_fetch=1, threads=threads)
    limit = 2 * largest_expert_bytes(segment.manifest)
    with streamer.start(copies_of(segment)) as stream:
        arrivals = iter(stream)
        first = [next(arrivals) for _ in range(4)]
        assert streamer.in_flight_bytes == limit
        assert len(source.calls) == 2
        for landed in first:
            stream.release(landed.copy.request)
        rest = list(arrivals)
        assert len(rest) == 4
        assert streamer.in_flight_bytes <= limit
    streamer.check_integrity(idle=True)
    streamer.close()


def test_the_records_of_a_failed_batch_are_asked_for_one_by_one(segment: Segment) -> None:
    lost = RecordRequest(ExpertKey(0, 2), "factors")
    source = LossySource(segment, [lost])
    streamer = make(source)
    got = drain(streamer, copies_of(segment))
    streamer.close()
    assert isinstance(got.pop(lost), ExpertUnavailableError)
    assert len(got) == 2 * NUM_EXPERTS - 1
    assert all(isinstance(data, torch.Tensor) for data in got.values())


@pytest.mark.parametrize("error", [ExpertUnavailableError("gone"), CorruptRecordError("bad")])
def test_failing_any_one_call_loses_at_most_its_own_record(
    segment: Segment, error: Exception
) -> None:
    """The n-th call fails, for every n until none does; all records land and no byte leaks."""
    copies = copies_of(segment)
    for fail_call in range(100):
        source = FailingSource(segment, fail_call, error)
        streamer = make(source, experts_per_fetch=1)
        got = drain(streamer, copies)
        streamer.close()
        assert set(got) == {copy.request for copy in copies}
        # A batch that failed was asked for again, record by record, and then came.
        assert all(isinstance(data, torch.Tensor) for data in got.values())
        if not source.failed:
            break
    assert 1 < fail_call < 99


def test_an_exception_that_is_no_store_error_reaches_the_waiting_side(segment: Segment) -> None:
    source = FailingSource(segment, 0, ZeroDivisionError("a bug"))
    streamer = make(source)
    stream = streamer.start(copies_of(segment))
    with pytest.raises(ZeroDivisionError, match="a bug"), stream:
        list(stream)
    streamer.check_integrity(idle=True)
    streamer.close()


class GatedSource(CountingSource):
    """Holds every fetch until the gate opens, and says when the first has begun."""

    def __init__(self, inner: Segment) -> None:
        super().__init__(inner)
        self.gate, self.begun = threading.Event(), threading.Event()

    def before(self, requests: Sequence[RecordRequest]) -> None:
        self.begun.set()
        assert self.gate.wait(timeout=30)


def test_leaving_early_waits_for_what_runs_and_drops_what_waits(segment: Segment) -> None:
    source = GatedSource(segment)
    streamer = make(source, experts_in_flight=1, experts_per_fetch=1)
    with streamer.start(copies_of(segment)):
        assert source.begun.wait(timeout=30)
        source.gate.set()
    assert len(source.calls) == 1
    streamer.check_integrity(idle=True)
    streamer.close()


@pytest.mark.parametrize("kept", [(), (2,)])
def test_what_no_thread_has_begun_is_withdrawn_but_for_what_is_kept(
    segment: Segment, kept: tuple[int, ...]
) -> None:
    """All of it was admitted: only threads are short."""
    source = GatedSource(segment)
    streamer = make(source, experts_per_fetch=1, threads=1)
    keep = frozenset(ExpertKey(0, expert) for expert in kept)
    with streamer.start(copies_of(segment)) as stream:
        assert source.begun.wait(timeout=30)
        stream.withdraw(keep)
        assert {request.key.expert for request in stream.due} == {0, *kept}
        streamer.check_integrity()
        source.gate.set()
        for landed in stream:
            stream.release(landed.copy.request)
    assert [call[0].key.expert for call in source.calls] == [0, *kept]
    streamer.check_integrity(idle=True)
    assert len(drain(streamer, copies_of(segment))) == 2 * NUM_EXPERTS, "and it goes on"
    streamer.close()


def test_close_ends_the_threads_and_fails_what_was_never_fetched(segment: Segment) -> None:
    source = GatedSource(segment)
    streamer = make(source, experts_in_flight=1, experts_per_fetch=1)
    stream = streamer.start(copies_of(segment))
    assert source.begun.wait(timeout=30)
    threading.Timer(0, source.gate.set).start()
    streamer.close()
    assert not any(
        t.name.startswith("moetier-fetch") and t in streamer._pool._threads
        for t in threading.enumerate()
    )
    with stream:
        landed = list(stream)
    errors = [item.error for item in landed if item.data is None]
    assert len(landed) == 2 * NUM_EXPERTS
    assert len(errors) == 2 * (NUM_EXPERTS - 1)
    assert all("the streamer was closed" in str(error) for error in errors)
    with pytest.raises(AssertionError, match="was closed"):
        streamer.start(copies_of(segment))


def halve(request: RecordRequest, data: torch.Tensor) -> torch.Tensor:
    return data[: data.numel() // 2] if request.kind == "codes" else data


def test_what_crosses_to_the_device_is_what_the_host_decoded(segment: Segment) -> None:
    copies = copies_of(segment)
    codes = sum(copy.num_bytes for copy in copies if copy.request.kind == "codes")
    factors = sum(copy.num_bytes for copy in copies) - codes
    streamer = make(CountingSource(segment), decode=halve)
    with streamer.start(copies) as stream:
        for landed in stream:
            (data,) = segment.fetch([landed.copy.request])
            assert landed.data is not None
            assert torch.equal(landed.data, halve(landed.copy.request, data))
    assert stream.moved_bytes == {("test", "codes"): codes, ("test", "factors"): factors}
    assert stream.device_bytes == {"codes": codes // 2, "factors": factors}
    streamer.close()


def test_a_record_that_cannot_be_decoded_fails_alone_and_was_moved_all_the_same(
    segment: Segment,
) -> None:
    bad = RecordRequest(ExpertKey(0, 1), "codes")

    def decode(request: RecordRequest, data: torch.Tensor) -> torch.Tensor:
        if request == bad:
            raise StoreFormatError("not this one (test)")
        return data

    streamer = make(CountingSource(segment), decode=decode)
    copies = copies_of(segment)
    with streamer.start(copies) as stream:
        failed = [landed for landed in stream if landed.data is None]
    assert [(landed.copy.request, str(landed.error)) for landed in failed] == [
        (bad, "not this one (test)")
    ]
    moved = sum(copy.num_bytes for copy in copies)
    assert sum(stream.moved_bytes.values()) == sum(streamer.moved_bytes.values()) == moved
    assert sum(stream.device_bytes.values()) == moved - failed[0].copy.num_bytes
    streamer.check_integrity(idle=True)
    streamer.close()


def test_the_limit_is_on_the_larger_of_fetched_and_decoded(segment: Segment) -> None:
    """Decoded codes three times as large: two experts no longer fit at once."""
    largest = largest_expert_bytes(segment.manifest)
    copies = [
        PlannedCopy(copy.request, copy.num_bytes, 3 * copy.num_bytes)
        for copy in copies_of(segment)
        if copy.request.kind == "codes"
    ]
    assert 3 * copies[0].num_bytes < 3 * largest < 6 * copies[0].num_bytes
    source = CountingSource(segment)
    streamer = make(source, experts_in_flight=3, experts_per_fetch=3)
    with streamer.start(copies) as stream:
        for number, landed in enumerate(stream, start=1):
            assert streamer.in_flight_bytes == copies[0].held_bytes == 3 * copies[0].num_bytes
            assert len(source.calls) == number
            stream.release(landed.copy.request)
    assert number == NUM_EXPERTS
    streamer.check_integrity(idle=True)
    streamer.close()


def test_a_limit_below_the_largest_expert_is_refused(segment: Segment) -> None:
    largest = largest_expert_bytes(segment.manifest)
    with pytest.raises(ValueError, match=f"largest expert of the store has {largest} bytes"):
        Streamer(
            segment,
            device="cpu",
            max_in_flight_bytes=largest - 1,
            fetch_bytes=1,
            num_threads=1,
        )


def test_waiting_time_is_measured_with_the_given_clock(segment: Segment) -> None:
    ticks = iter(range(100))
    streamer = Streamer(
        segment,
        device="cpu",
        max_in_flight_bytes=1 << 30,
        fetch_bytes=1 << 30,
        num_threads=1,
        clock=lambda: float(next(ticks)),
    )
    with streamer.start(copies_of(segment, 1)) as stream:
        list(stream)
    assert stream.wait_s == 2.0  # two records, one tick each
    streamer.close()


def test_integrity_names_what_does_not_balance(segment: Segment) -> None:
    streamer = make(CountingSource(segment))
    streamer._in_flight_bytes = 7
    with pytest.raises(AssertionError, match="hold 0 bytes, the count says 7"):
        streamer.check_integrity()
    streamer.close()
