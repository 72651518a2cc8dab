"""Goal: a layer whose factors hang goes on from codes and says so; codes are waited for; what comes
late is kept and counted once, and an answer that was not late is unchanged.

Method: a store made by hand behind a source whose reads wait for an event; real threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from expert_store.segment import Segment
from expert_store.types import RecordKind, RecordRequest
from gpu_worker.experts import StoreExperts
from gpu_worker.late_factors import SLOWEST_BYTES_PER_S
from gpu_worker.record_sizes import PlannedCopy, largest_expert_bytes
from tests.gpu_worker.guesses import right, told
from tests.gpu_worker.sources import CountingSource
from tests.gpu_worker.steps import HIDDEN, NUM_EXPERTS, Step, running
from tests.hand_store import build_store

PATIENCE_S = 0.2


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Segment:
    folder = tmp_path_factory.mktemp("late")
    build_store(folder, layers=(0, 1), experts=NUM_EXPERTS, hidden=HIDDEN, ffn=64)
    return Segment(folder)


class HangingSource(CountingSource):
    """Reads with records of one kind, of all layers or one, hang until `gate` is set."""

    def __init__(self, inner: Segment, kind: RecordKind, layer: int | None = None) -> None:
        super().__init__(inner)
        self.kind, self.layer, self.gate = kind, layer, threading.Event()

    def before(self, requests: Sequence[RecordRequest]) -> None:
        if any(
            request.kind == self.kind and self.layer in (None, request.key.layer)
            for request in requests
        ):
            assert self.gate.wait(timeout=8)


@pytest.fixture
def hanging(segment: Segment) -> Iterator[HangingSource]:
    source = HangingSource(segment, "factors")
    yield source
    source.gate.set()


def settled(experts: StoreExperts, source: HangingSource) -> None:
    """Let the late records come, and begin a step once they are here."""
    source.gate.set()
    for _ in range(300):
        experts.begin(None)
        experts.check_integrity()
        if not experts.streamer.left_bytes:
            return
        time.sleep(0.1)
    raise AssertionError("the late records never came")


@pytest.mark.parametrize("experts_in_flight", [1, 100])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_layer_goes_on_from_codes_and_is_whole_again_once_factors_come(
    segment: Segment, hanging: HangingSource, cache_bytes: int, experts_in_flight: int
) -> None:
    in_flight = experts_in_flight * largest_expert_bytes(segment.manifest)
    options = {"cache_bytes": cache_bytes, "max_in_flight_bytes": in_flight, "prefetch": "never"}
    step = Step()
    with running(segment, top_n=0, **options) as low_bit, running(segment, **options) as calm:
        from_codes, restored = step.run(low_bit), step.run(calm)
        full = calm.end().counters
    with running(hanging, factor_deadline_s=PATIENCE_S, **options) as experts:
        experts.begin(None)
        assert torch.equal(step.run(experts), from_codes)
        report = experts.end()
        experts.check_integrity()
        assert report.counters.restored_pairs == 0
        assert report.counters.degraded_pairs == full.restored_pairs > 0
        assert sum(report.degraded_rows.values()) == full.restored_pairs
        moved = report.counters
        settled(experts, hanging)
        moved += experts.end().counters
        assert moved.total_moved_bytes == sum(hanging.bytes.values())
        experts.begin(None)
        assert torch.equal(step.run(experts), restored)
        again = experts.end().counters
        assert again.degraded_pairs == 0
        if cache_bytes and experts_in_flight > 1:
            assert again.total_moved_bytes == 0, "late factors were not kept"
        experts.check_integrity()


def test_large_records_are_given_the_time_that_a_slow_link_takes(segment: Segment) -> None:
    key = min(segment.keys)
    factors = PlannedCopy(RecordRequest(key, "factors"), num_bytes=10_000_000)
    codes = PlannedCopy(RecordRequest(key, "codes"), num_bytes=40_000_000)
    with running(segment, factor_deadline_s=1.0) as experts:
        late = experts.late_factors
        assert late.patience_of([codes, factors]) == 1.0 + 50_000_000 / SLOWEST_BYTES_PER_S
        assert late.patience_of([codes]) is None, "codes are waited for"
    with running(segment, factor_deadline_s=None) as experts:
        assert experts.late_factors.patience_of([factors]) is None


def test_an_expert_that_lacks_only_late_factors_is_run_all_the_same(
    segment: Segment, hanging: HangingSource
) -> None:
    """Its codes are on the device, its factors may not be asked for: nothing is to be fetched."""
    step = Step()
    with running(segment, top_n=0) as low_bit, running(segment) as calm:
        from_codes = step.run(low_bit)
        step.run(calm)
        full = calm.end().counters.restored_pairs
    options = {"cache_bytes": 1 << 30, "prefetch": "never"}
    with running(hanging, factor_deadline_s=PATIENCE_S, **options) as experts:
        step.run(experts)
        experts.end()
        hanging.calls.clear()
        experts.begin(None)
        assert torch.equal(step.run(experts), from_codes)
        assert experts.end().counters.degraded_pairs == full > 0
        assert not hanging.calls
        settled(experts, hanging)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_what_was_fetched_ahead_and_hangs_is_gone_without(
    segment: Segment, cache_bytes: int
) -> None:
    """An expert is one fetch ahead: its codes hang with its factors, and are asked for again."""
    first, second = Step(2, 3), Step(2, 4, layer=1)
    with running(segment, top_n=0) as low_bit, running(segment) as calm:
        from_codes, restored = second.run(low_bit), second.run(calm)
        full = calm.end().counters.restored_pairs
        first_restored = first.run(calm)
    source = HangingSource(segment, "factors", layer=1)
    options = {"prefetch": "always", "cache_bytes": cache_bytes}
    with running(source, factor_deadline_s=PATIENCE_S, **options) as experts:
        experts.predict_with(told(second, right))
        experts.begin(None)
        assert torch.equal(first.run(experts), first_restored)
        assert torch.equal(second.run(experts), from_codes)
        report = experts.end()
        experts.check_integrity()
        assert report.counters.guessed_pairs == report.counters.right_pairs > 0
        assert report.counters.degraded_pairs == full
        source.gate.set()
        end_s = time.monotonic() + 20
        while True:
            experts.begin(None)
            assert torch.equal(first.run(experts), first_restored)
            output = second.run(experts)
            if not experts.end().counters.degraded_pairs:
                break
            assert time.monotonic() < end_s, "what was late never came"
        assert torch.equal(output, restored)


def test_one_hanging_copy_costs_one_wait_and_no_second_ask(
    segment: Segment, hanging: HangingSource
) -> None:
    with running(hanging, factor_deadline_s=PATIENCE_S, prefetch="never", cache_bytes=0) as experts:
        Step().run(experts)
        hanging.calls.clear()
        Step(layer=1).run(experts)
        assert {request.kind for call in hanging.calls for request in call} == {"codes"}
        settled(experts, hanging)


@pytest.mark.parametrize("kind", ["codes", "factors"])
def test_codes_are_waited_for_and_factors_too_without_a_deadline(
    segment: Segment, kind: RecordKind
) -> None:
    source = HangingSource(segment, kind)
    deadline_s = PATIENCE_S if kind == "codes" else None
    threading.Timer(4 * PATIENCE_S, source.gate.set).start()
    with running(segment, prefetch="never") as calm:
        expected = Step().run(calm)
    with running(source, factor_deadline_s=deadline_s, prefetch="never") as experts:
        output = Step().run(experts)
        assert source.gate.is_set()
        if kind == "factors":
            assert torch.equal(output, expected)
        settled(experts, source)
