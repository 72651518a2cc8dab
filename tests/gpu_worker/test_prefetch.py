"""Goal: fetching ahead changes no result, whatever the guess; every byte of it is counted, used or
not; and what it could not get is asked for again.

Method: two layers of a real store, a guess that is told what to say (right, wrong, half right),
and sources that count, lose and hold records back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from expert_store.errors import ExpertUnavailableError
from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.counters import StepCounters, Tally
from gpu_worker.experts import ExpertsFailed, StoreExperts
from gpu_worker.prefetch import Prefetcher
from gpu_worker.record_sizes import RecordSizes, largest_expert_bytes
from gpu_worker.router_guess import Guess, RouterGuess
from gpu_worker.streamer import Streamer
from tests.gpu_worker.guesses import Oracle, Routing, half_right, right, told, wrong
from tests.gpu_worker.sources import CountingSource, LossySource
from tests.gpu_worker.steps import NUM_EXPERTS, TOP_K, Step, running
from tests.hand_store import build_store

LAYERS = (0, 1)
WAIT_S = 60.0


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Segment:
    folder = tmp_path_factory.mktemp("store")
    build_store(folder, layers=LAYERS, experts=NUM_EXPERTS, hidden=64, ffn=64)
    return Segment(folder)


def asked_bytes(source: CountingSource, sizes: RecordSizes) -> int:
    """Of the records that were asked of a source, here or not yet."""
    return sum(sizes.copy_of(request).num_bytes for call in source.calls for request in call)


def run(
    experts: StoreExperts, first: Step, second: Step
) -> tuple[list[torch.Tensor], StepCounters]:
    experts.begin(None)
    outputs = [first.run(experts), second.run(experts)]
    return outputs, experts.end().counters


@pytest.mark.parametrize("num_rows", [1, 6])
@pytest.mark.parametrize("cache_bytes", [0, 20_000, 1 << 30])
@pytest.mark.parametrize("say", [right, wrong, half_right])
def test_no_guess_changes_a_result_and_all_bytes_are_counted(
    segment: Segment, say: Routing, cache_bytes: int, num_rows: int
) -> None:
    plain, ahead = CountingSource(segment), CountingSource(segment)
    with (
        running(plain, prefetch="never", cache_bytes=cache_bytes) as expected,
        running(ahead, prefetch="always", cache_bytes=cache_bytes) as experts,
    ):
        total = StepCounters()
        for seed in range(5):
            first, second = Step(num_rows, seed), Step(num_rows, seed + 9, layer=1)
            experts.predict_with(told(second, say))
            outputs, counters = run(experts, first, second)
            wanted, _ = run(expected, first, second)
            assert all(map(torch.equal, outputs, wanted))
            total += counters
        experts.check_integrity()
        # What was on its way in vain when a step ended is counted by a later one, however late the
        # threads are: all five steps' guesses may still be fetched when the last one ends.
        sizes, deadline = RecordSizes.of(segment.manifest), time.monotonic() + WAIT_S
        while total.total_moved_bytes < asked_bytes(ahead, sizes):
            assert time.monotonic() < deadline
            experts.begin(None)
            total += experts.end().counters
    assert total.total_moved_bytes <= sum(ahead.bytes.values())
    planned = sum(total.planned_bytes.values())
    assert total.total_moved_bytes - planned == total.ahead_bytes - total.ahead_used_bytes
    # Of a layer that is all on the device nothing is guessed.
    asked = 5 * num_rows * TOP_K
    assert total.guessed_pairs == asked or (cache_bytes == 1 << 30 and total.guessed_pairs > 0)
    if say is right:
        assert total.right_pairs == total.guessed_pairs
        assert total.ahead_bytes == total.ahead_used_bytes
    if say is wrong and num_rows == 1:
        assert total.right_pairs == total.ahead_used_bytes == 0


def test_a_right_guess_leaves_the_plan_nothing_to_fetch(segment: Segment) -> None:
    first, second = Step(1, 3), Step(1, 4, layer=1)
    source = CountingSource(segment)
    with running(source, prefetch="always", cache_bytes=0, max_in_flight_bytes=1 << 20) as experts:
        experts.predict_with(told(second, right))
        _, counters = run(experts, first, second)
    # One fetch for the first layer's plan, then one for each expert that was guessed.
    assert len(source.calls) == 1 + TOP_K
    assert counters.ahead_used_bytes == counters.ahead_bytes > 0
    assert counters.cache_misses["codes"] == 2 * TOP_K


def test_the_likeliest_experts_come_first_and_only_as_many_as_fit(segment: Segment) -> None:
    first, second = Step(1, 3), Step(1, 4, layer=1)
    largest = largest_expert_bytes(segment.manifest)
    source = CountingSource(segment)
    with running(
        source,
        prefetch="always",
        cache_bytes=0,
        fetch_threads=1,
        max_in_flight_bytes=8 * largest,
        prefetch_share=1 / 8,
    ) as experts:
        experts.predict_with(told(second, right))
        _, counters = run(experts, first, second)
    (ahead,) = source.calls[1:2]
    likeliest = int(second.ids[0, second.weights[0].argmax()])
    assert {request.key.expert for request in ahead} == {likeliest}
    assert 0 < counters.ahead_bytes <= largest


def test_what_was_lost_on_the_way_ahead_is_asked_for_again(segment: Segment) -> None:
    """A fetch of an expert's two records fails once, and each is then fetched alone."""

    class FailsOnce(CountingSource):
        failed = False

        def before(self, requests: Sequence[RecordRequest]) -> None:
            if not self.failed and requests[0].key.layer == 1:
                self.failed = True
                raise ExpertUnavailableError("not now (test)")

    first, second = Step(1, 3), Step(1, 4, layer=1)
    source = FailsOnce(segment)
    with running(source, prefetch="always", cache_bytes=0, fetch_threads=1) as experts:
        experts.predict_with(told(second, right))
        outputs, _ = run(experts, first, second)
    with running(segment, prefetch="never", cache_bytes=0) as experts:
        wanted, _ = run(experts, first, second)
    assert source.failed
    assert all(map(torch.equal, outputs, wanted))


def test_a_plan_does_not_count_on_what_was_lost_before_it(segment: Segment) -> None:
    gone, here = (RecordRequest(ExpertKey(1, expert), "codes") for expert in range(2))
    size = RecordSizes.of(segment.manifest)
    # Without threads a fetch has ended, or failed, when it is asked for.
    streamer = Streamer(
        LossySource(segment, [gone]),
        device="cpu",
        max_in_flight_bytes=1 << 20,
        fetch_bytes=1,
        num_threads=0,
    )
    prefetcher, ids = Prefetcher(streamer, 1 << 20), torch.tensor([[0, 1]])
    guess = Guess(1, ids, torch.tensor([[0.6, 0.4]]))
    prefetcher.start(guess, [size.copy_of(gone), size.copy_of(here)])
    ahead = prefetcher.settle(1, ids, tally := Tally())
    assert ahead.requests == {here}
    assert ahead.covering(gone) is None
    prefetcher.finish(ahead)
    prefetcher.check_integrity()
    assert tally.ahead_bytes == size.codes[here.key]
    prefetcher.close()


def test_a_step_that_cannot_be_planned_gives_its_records_ahead_back(segment: Segment) -> None:
    first, second = Step(1, 3), Step(1, 4, layer=1)
    unknown = Step(1, 4, layer=1)
    unknown.ids = unknown.ids + 1000
    with running(segment, prefetch="always", cache_bytes=0) as experts:
        experts.predict_with(told(second, right))
        experts.begin(None)
        first.run(experts)
        with pytest.raises(ValueError, match="not in the store"):
            unknown.run(experts)
        experts.begin(None)
        outputs, _ = run(experts, first, second)
        with running(segment, prefetch="never", cache_bytes=0) as plain:
            wanted, _ = run(plain, first, second)
        assert all(map(torch.equal, outputs, wanted))


def test_a_loss_hits_whom_it_hits_without_fetching_ahead(segment: Segment) -> None:
    first, second = Step(4, 3), Step(4, 4, layer=1)
    gone = RecordRequest(ExpertKey(1, int(second.ids[0, 0])), "codes")
    source = LossySource(segment, [gone])
    with running(source, prefetch="always", cache_bytes=0) as experts:
        experts.predict_with(told(second, right))
        experts.begin(None)
        first.run(experts)
        with pytest.raises(ExpertsFailed) as caught:
            second.run(experts)
        rows = (second.ids == gone.key.expert).any(1).nonzero()[:, 0].tolist()
        assert caught.value.token_rows == set(rows)
        # The worker is whole: the rows that need no such expert go on.
        others = [row for row in range(4) if row not in rows]
        experts.begin(None)
        if others:
            second.rows(others).run(experts)
        experts.end()


def test_a_step_that_ends_early_leaves_nothing_behind(segment: Segment) -> None:
    first, second = Step(2, 3), Step(2, 4, layer=1)
    with running(segment, prefetch="always", cache_bytes=0) as experts:
        experts.predict_with(told(second, right))
        for _ in range(3):
            experts.begin(None)
            first.run(experts)  # the second layer never comes
        outputs, _ = run(experts, first, second)
        with running(segment, prefetch="never", cache_bytes=0) as plain:
            wanted, _ = run(plain, first, second)
        assert all(map(torch.equal, outputs, wanted))


def test_a_guess_for_another_layer_is_dropped(segment: Segment) -> None:
    first = Step(1, 3)
    with running(segment, prefetch="always", cache_bytes=0) as experts:
        experts.predict_with(told(Step(1, 4, layer=1), right))
        experts.begin(None)
        expected = first.run(experts)
        assert torch.equal(first.run(experts), expected)
        counters = experts.end().counters
    assert counters.guessed_pairs == counters.ahead_used_bytes == 0


@pytest.mark.parametrize(
    "config", [{"prefetch": "never"}, {"fetch_threads": 0}, {"prefetch_share": 0.0}]
)
def test_where_it_is_not_wanted_nothing_is_fetched_ahead(
    segment: Segment, config: dict[str, Any]
) -> None:
    first, second = Step(1, 3), Step(1, 4, layer=1)
    with running(segment, cache_bytes=0, **config) as experts:
        experts.predict_with(told(second, right))
        _, counters = run(experts, first, second)
    assert counters.ahead_bytes == counters.guessed_pairs == 0


def test_nothing_is_guessed_once_a_layer_is_resident(segment: Segment) -> None:
    with running(segment, prefetch="always", cache_bytes=1 << 30, restore="all") as experts:
        for seed in range(30):  # until every expert was met
            run(experts, Step(6, seed), Step(6, seed + 99, layer=1))
        second = Step(6, 7, layer=1)
        oracle = Oracle(second, right)
        experts.predict_with(cast(RouterGuess, oracle))
        _, counters = run(experts, Step(6, 3), second)
    assert oracle.num_guesses == counters.ahead_bytes == 0
    assert sum(counters.cache_misses.values()) == 0
