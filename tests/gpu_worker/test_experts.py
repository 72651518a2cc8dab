"""Goal: a layer's experts give the weighted sum that plain torch gives, whatever the cache, the
policy, the order of arrival or the batch; and say exactly whom a loss hits.

Method: a real store made by hand, random routing, and an oracle that runs each pair alone through
`kernels.reference`. Sources fail, shuffle and count.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expert_store.errors import ExpertUnavailableError
from expert_store.format import parse_codes, parse_factors
from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.experts import ExpertsFailed, StoreExperts
from gpu_worker.record_sizes import largest_expert_bytes
from gpu_worker.restoring import restore_mask
from kernels import reference
from tests.gpu_worker.sources import (
    CountingSource,
    FailingSource,
    InProcessNearData,
    LossySource,
    ShuffledSource,
)
from tests.gpu_worker.steps import HIDDEN, NUM_EXPERTS, TOP_K, Step, running
from tests.hand_store import build_store

LAYERS = (0, 1)
CLOSE = 2e-6  # relative, float32: the same products in another order
INT8_CLOSE = 2e-2  # relative RMS of an MLP on int8 activations, as kernels/ops.py states


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bias"])
def segment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Segment:
    folder = tmp_path_factory.mktemp("store")
    build_store(
        folder, layers=LAYERS, experts=NUM_EXPERTS, hidden=HIDDEN, ffn=64, has_bias=request.param
    )
    return Segment(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Segment:
    folder = tmp_path_factory.mktemp("store")
    build_store(folder, layers=LAYERS, experts=NUM_EXPERTS, hidden=HIDDEN, ffn=64)
    return Segment(folder)


def oracle(
    segment: Segment, step: Step, top_n: int, lost_factors: tuple[int, ...] = ()
) -> torch.Tensor:
    """Each pair alone, in plain torch."""
    manifest = segment.manifest
    restore = restore_mask(step.weights, top_n)
    total = torch.zeros(step.hidden.shape)
    for row, column in torch.cartesian_prod(
        torch.arange(step.hidden.shape[0]), torch.arange(TOP_K)
    ).tolist():
        key = ExpertKey(step.layer, int(step.ids[row, column]))
        info, shape = manifest.experts[key], manifest.model.expert
        codes, factors = segment.fetch([RecordRequest(key, "codes"), RecordRequest(key, "factors")])
        low_rank = None
        if restore[row, column] and key.expert not in lost_factors:
            low_rank = parse_factors(key, factors, shape, info.repair).factors
        mlp = parse_codes(key, codes, shape, info.form).mlp
        y = reference.gated_mlp(step.hidden[row : row + 1], mlp, low_rank)
        total[row] += step.weights[row, column] * y[0]
    return total


def run_again_if_failed(step: Step, experts: StoreExperts) -> torch.Tensor:
    experts.begin(None)
    try:
        return step.run(experts)
    except ExpertsFailed:
        experts.begin(None)
        return step.run(experts)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("top_n", [0, 1, 2])
@pytest.mark.parametrize("cache_bytes", [0, 20_000, 1 << 30])
def test_output_is_the_oracle_s_for_any_top_n_and_cache(
    segment: Segment, top_n: int, cache_bytes: int
) -> None:
    with running(segment, top_n=top_n, cache_bytes=cache_bytes) as experts:
        for seed in range(4):
            for layer in LAYERS:
                step = Step(seed=seed, layer=layer)
                assert relative(step.run(experts), oracle(segment, step, top_n)) < CLOSE
                experts.check_integrity()


def test_restoring_changes_the_answer(plain: Segment) -> None:
    """Negative control: without it the tests above could not tell restored from low-bit."""
    step = Step()
    assert relative(oracle(plain, step, 1), oracle(plain, step, 0)) > 1e-2


@pytest.mark.parametrize("cache_bytes", [0, 60_000, 1 << 30])
def test_planned_bytes_are_the_bytes_the_source_delivered(plain: Segment, cache_bytes: int) -> None:
    source = CountingSource(plain)
    total = None
    with running(source, cache_bytes=cache_bytes, top_n=2) as experts:
        for seed in range(6):
            experts.begin(None)
            Step(num_rows=3, seed=seed, layer=seed % 2).run(experts)
            counters = experts.end().counters
            total = counters if total is None else total + counters
    assert total is not None
    for kind in ("codes", "factors"):
        assert total.planned_bytes.get(kind, 0) == total.moved_by_kind(kind) == source.bytes[kind]
        assert total.planned_bytes[kind] > 0
        assert total.cache_hits.get(kind, 0) + total.cache_misses[kind] > 0
        assert (total.cache_hits.get(kind, 0) > 0) is (cache_bytes > 0)
    assert set(total.moved_bytes) == {("test", "codes"), ("test", "factors")}
    assert (total.restored_pairs, total.low_bit_pairs, total.degraded_pairs) == (36, 18, 0)


def test_the_order_of_arrival_changes_no_bit(plain: Segment) -> None:
    """One fetch per expert, let through in 12 seeded orders."""
    step, orders = Step(num_rows=9), set()
    outputs = []
    for seed in range(12):
        source = ShuffledSource(plain, seed)
        with running(source, fetch_threads=NUM_EXPERTS, fetch_bytes=1, cache_bytes=0) as experts:
            source.attach(experts.streamer)
            outputs.append(step.run(experts))
        orders.add(tuple(source.landed))
    assert len(orders) > 6
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_what_is_resident_changes_no_bit(plain: Segment) -> None:
    step = Step(num_rows=9)
    with running(plain) as experts:
        cold = step.run(experts)
        warm = step.run(experts)
    with running(plain) as experts:
        step.rows([0]).run(experts)
        half_warm = step.run(experts)
    assert torch.equal(cold, warm)
    assert torch.equal(cold, half_warm)


def test_a_token_s_result_does_not_depend_on_its_batch(plain: Segment) -> None:
    step = Step(num_rows=9)
    with running(plain, top_n=2) as experts:
        together = step.run(experts)
        alone = torch.cat([step.rows([row]).run(experts) for row in range(9)])
    assert relative(alone, together) < CLOSE


def test_padding_rows_move_nothing_and_give_zeros(plain: Segment) -> None:
    step, source = Step(num_rows=4), CountingSource(plain)
    with running(source, cache_bytes=0) as experts:
        experts.begin(torch.tensor([True, False, True, False]))
        output = step.run(experts)
        padded = experts.end().counters
        experts.begin(None)
        expected = step.rows([0, 2]).run(experts)
        alone = experts.end().counters
    assert torch.equal(output[[0, 2]], expected)
    assert not output[[1, 3]].any()
    assert padded.moved_bytes == alone.moved_bytes
    with running(source) as experts:
        experts.begin(torch.zeros(4, dtype=torch.bool))
        assert not step.run(experts).any()
        assert experts.end().counters.total_moved_bytes == 0


def test_half_precision_hidden_states_keep_their_dtype(plain: Segment) -> None:
    step = Step()
    step.hidden = step.hidden.bfloat16()
    with running(plain) as experts:
        output = step.run(experts)
    assert output.dtype == torch.bfloat16
    step.hidden = step.hidden.float()
    assert relative(output.float(), oracle(plain, step, 1)) < 8e-3  # bfloat16's last bit


def test_a_small_limit_of_bytes_under_way_gives_the_same(plain: Segment) -> None:
    step = Step(num_rows=9)
    with running(plain) as experts:
        expected = step.run(experts)
    limit = largest_expert_bytes(plain.manifest)
    with running(plain, max_in_flight_bytes=limit, cache_bytes=0) as experts:
        assert torch.equal(step.run(experts), expected)


class FreshSource(CountingSource):
    """Gives every read bytes of its own and sees how many of them are still held at each read."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self._given: list[weakref.ref[np.ndarray]] = []
        self.most_held = 0

    def fetch(self, requests: Any) -> list[torch.Tensor]:
        held = sum(array() is not None for array in self._given)
        self.most_held = max(self.most_held, held)
        arrays = [data.numpy().copy() for data in super().fetch(requests)]
        self._given += [weakref.ref(array) for array in arrays]
        return [torch.from_numpy(array) for array in arrays]


def test_a_streamed_expert_s_bytes_are_dropped_when_it_is_done(plain: Segment) -> None:
    """Released bytes are no longer counted: on a GPU, what is still held would pass the limit."""
    source = FreshSource(plain)
    limit = largest_expert_bytes(plain.manifest)
    with running(source, max_in_flight_bytes=limit, cache_bytes=0, fetch_threads=1) as experts:
        step = Step(num_rows=20)
        assert relative(step.run(experts), oracle(plain, step, 1)) < CLOSE
    assert len(source.calls) == NUM_EXPERTS
    # The one that was released just now, and the one that this thread's loop still names.
    assert 0 < source.most_held <= 2 * 2


class TestLoss:
    """What happens when records cannot be had."""

    def test_lost_factors_degrade_their_pairs_and_no_other(self, plain: Segment) -> None:
        step = Step(num_rows=9)
        restore = restore_mask(step.weights, 1)
        lost = int(step.ids[restore][0])
        source = LossySource(plain, [RecordRequest(ExpertKey(0, lost), "factors")])
        with running(source) as experts:
            output = step.run(experts)
            report = experts.end()
        rows = ((step.ids == lost) & restore).any(dim=1).nonzero().flatten().tolist()
        assert report.degraded_rows == dict.fromkeys(rows, 1)
        counters = report.counters
        assert counters.degraded_pairs == len(rows) > 0
        assert counters.restored_pairs == 9 - len(rows)
        assert counters.low_bit_pairs == 18
        assert relative(output, oracle(plain, step, 1, lost_factors=(lost,))) < CLOSE

    def test_lost_codes_name_the_layer_the_expert_and_its_rows(self, plain: Segment) -> None:
        step = Step(num_rows=20, layer=1)
        lost = [int(step.ids[0, 0]), int(step.ids[5, 1])]
        keys = [ExpertKey(1, expert) for expert in lost]
        source = LossySource(plain, [RecordRequest(key, "codes") for key in keys])
        with running(source) as experts:
            with pytest.raises(ExpertsFailed) as caught:
                step.run(experts)
            experts.check_integrity()
            failure = caught.value
            assert failure.layer == 1
            assert failure.failed == {
                key: tuple((step.ids == key.expert).any(dim=1).nonzero().flatten().tolist())
                for key in keys
            }
            assert failure.counters.total_moved_bytes > 0
            assert "no copy (test)" in str(failure)
            assert isinstance(failure.cause, ExpertUnavailableError)
            again = pickle.loads(pickle.dumps(failure))  # it may cross an actor's border
            assert (again.failed, again.counters) == (failure.failed, failure.counters)
            assert str(again) == str(failure)
            # The rows that were not hit go on.
            others = [row for row in range(20) if row not in failure.token_rows]
            assert others
            rest = step.rows(others)
            experts.begin(None)
            assert relative(rest.run(experts), oracle(plain, rest, 1)) < CLOSE

    def test_failing_any_one_fetch_is_repaired_or_told(self, plain: Segment) -> None:
        """A fetch of several records is asked for again, one by one; a lone one is lost."""
        steps = [Step(seed=seed, layer=layer) for seed in range(2) for layer in LAYERS]
        with running(plain, fetch_bytes=1) as experts:
            expected = [step.run(experts) for step in steps]
        for fail_call in range(200):
            error = ExpertUnavailableError("once (test)")
            source = FailingSource(plain, fail_call, error)
            with running(source, fetch_bytes=1, fetch_threads=1) as experts:
                for step, output in zip(steps, expected, strict=True):
                    got = run_again_if_failed(step, experts)
                    degraded = experts.end().degraded_rows
                    kept = [row for row in range(len(output)) if row not in degraded]
                    assert torch.equal(got[kept], output[kept])
                    assert not degraded or not torch.equal(got, output)
                    experts.check_integrity()
            if not source.failed:
                break
        assert 4 < fail_call < 199

    def test_bytes_of_the_wire_are_those_the_source_counted_meanwhile(self, plain: Segment) -> None:
        class WireSource(CountingSource):
            bytes_moved = (10, 1000)

            def before(self, requests: Sequence[RecordRequest]) -> None:
                self.bytes_moved = (20, self.bytes_moved[1] + 7 * len(requests))

        source = WireSource(plain)
        with running(source) as experts:
            Step().run(experts)
            counters = experts.end().counters
            assert counters.wire_bytes == 7 * sum(map(len, source.calls)) > 0
        with running(CountingSource(plain)) as experts:
            Step().run(experts)
            assert experts.end().counters.wire_bytes == 0

    def test_a_bug_in_the_source_is_not_swallowed(self, plain: Segment) -> None:
        with running(FailingSource(plain, 0, ZeroDivisionError("a bug"))) as experts:
            with pytest.raises(ZeroDivisionError):
                Step().run(experts)
            experts.check_integrity()


class TestNearData:
    """Who runs low-bit pairs, and what it costs."""

    def test_low_bit_policy_sends_every_pair_that_is_not_restored(self, plain: Segment) -> None:
        step, source = Step(num_rows=9), CountingSource(plain)
        near = InProcessNearData(plain)
        with running(source, near, near_data="low_bit") as experts:
            output = step.run(experts)
            counters = experts.end().counters
        assert counters.near_data_pairs == counters.low_bit_pairs == near.num_pairs == 18
        assert counters.restored_pairs == 9
        assert (counters.sent_bytes, counters.received_bytes) == near.bytes_moved
        assert counters.sent_bytes == 9 * HIDDEN * 4
        assert counters.received_bytes == 18 * HIDDEN * 4
        assert counters.moved_by_kind("codes") == source.bytes["codes"]
        expected = oracle(plain, step, 1)
        error = float((output - expected).norm() / expected.norm())
        assert 0 < error < INT8_CLOSE

    def test_all_runs_every_pair_there_and_copies_nothing(self, segment: Segment) -> None:
        step, source = Step(num_rows=9), CountingSource(segment)
        near = InProcessNearData(segment)
        with running(source, near, near_data="all", top_n=2) as experts:
            output = step.run(experts)
            report = experts.end()
        counters = report.counters
        assert counters.near_data_pairs == near.num_pairs == 27
        assert (counters.restored_pairs, counters.low_bit_pairs) == (18, 9)
        assert (counters.degraded_pairs, report.degraded_rows) == (0, {})
        assert counters.total_moved_bytes == 0 == sum(source.bytes.values())
        expected = oracle(segment, step, 2)
        assert relative(output, expected) > 0
        assert float((output - expected).norm() / expected.norm()) < INT8_CLOSE

    def test_a_compensator_lost_there_degrades_its_pairs_and_no_other(self, plain: Segment) -> None:
        step = Step(num_rows=9)
        restore = restore_mask(step.weights, 1)
        lost = int(step.ids[restore][0])
        source = LossySource(plain, [RecordRequest(ExpertKey(0, lost), "factors")])
        with running(plain, InProcessNearData(source, "reference"), near_data="all") as experts:
            output = step.run(experts)
            report = experts.end()
        rows = ((step.ids == lost) & restore).any(dim=1).nonzero().flatten().tolist()
        assert report.degraded_rows == dict.fromkeys(rows, 1)
        counters = report.counters
        assert counters.degraded_pairs == len(rows) > 0
        assert (counters.restored_pairs, counters.low_bit_pairs) == (9 - len(rows), 18)
        assert relative(output, oracle(plain, step, 1, lost_factors=(lost,))) < CLOSE

    def test_the_same_blocks_are_used_there_as_on_the_device(self, plain: Segment) -> None:
        """A share of the compensators: 3 of the 4 blocks of a store made by hand."""
        step, outputs = Step(num_rows=9), []
        for near_data in ("off", "all"):
            near = InProcessNearData(plain, "reference")
            with running(plain, near, near_data=near_data, factor_share=0.8) as experts:
                outputs.append(step.run(experts))
        assert relative(outputs[1], outputs[0]) < CLOSE
        assert relative(outputs[0], oracle(plain, step, 1)) > 1e-3

    def test_rows_that_nobody_there_needs_do_not_travel(self, plain: Segment) -> None:
        step, near = Step(num_rows=4), InProcessNearData(plain, "reference")
        with running(plain, near, near_data="low_bit") as experts:
            experts.begin(torch.tensor([False, True, False, True]))
            output = step.run(experts)
        assert near.bytes_moved[0] == 2 * HIDDEN * 4
        rest = step.rows([1, 3])
        assert relative(output[[1, 3]], oracle(plain, rest, 1)) < CLOSE

    def test_with_exact_near_data_the_answer_is_that_of_off(self, plain: Segment) -> None:
        step, near = Step(num_rows=9), InProcessNearData(plain, "reference")
        for policy in ({"near_data": "low_bit"}, {"near_data": "all"}, COST):
            with running(plain, near, **policy) as experts:
                output = step.run(experts)
            assert relative(output, oracle(plain, step, 1)) < CLOSE

    def test_low_bit_answers_do_not_depend_on_the_cache(self, plain: Segment) -> None:
        step, outputs = Step(num_rows=9), []
        for cache_bytes in (0, 1 << 30):
            near = InProcessNearData(plain)
            with running(plain, near, near_data="low_bit", cache_bytes=cache_bytes) as experts:
                outputs += [step.run(experts), step.run(experts)]
        assert all(torch.equal(output, outputs[0]) for output in outputs)

    def test_cost_policy_copies_what_is_cheaper_to_copy(self, plain: Segment) -> None:
        step = Step(num_rows=9)
        slow = {**COST, "top_n": 0}
        with running(plain, InProcessNearData(plain), **slow) as experts:
            step.run(experts)
            assert experts.end().counters.near_data_pairs == 27
        fast = {**slow, "link_bytes_per_s": 1e15}
        with running(plain, InProcessNearData(plain), **fast) as experts:
            step.run(experts)
            assert experts.end().counters.near_data_pairs == 0

    @pytest.mark.parametrize("policy", ["low_bit", "all"])
    def test_when_near_data_is_lost_its_experts_are_copied(
        self, plain: Segment, policy: str
    ) -> None:
        step, near = Step(num_rows=9), InProcessNearData(plain)
        near.error = ExpertUnavailableError("worker lost (test)")
        source = CountingSource(plain)
        with running(source, near, near_data=policy) as experts:
            output = step.run(experts)
            counters = experts.end().counters
        assert relative(output, oracle(plain, step, 1)) < CLOSE
        assert counters.near_data_pairs == 0
        assert (counters.restored_pairs, counters.low_bit_pairs) == (9, 18)
        assert counters.planned_bytes == dict(source.bytes)

    def test_near_data_and_codes_both_lost_fails_the_rows(self, plain: Segment) -> None:
        step, near = Step(num_rows=9), InProcessNearData(plain)
        near.error = ExpertUnavailableError("worker lost (test)")
        restore = restore_mask(step.weights, 1)
        key = ExpertKey(0, int(step.ids[~restore][0]))
        source = LossySource(plain, [RecordRequest(key, "codes")])
        with running(source, near, near_data="low_bit") as experts:
            with pytest.raises(ExpertsFailed) as caught:
                step.run(experts)
            assert set(caught.value.failed) == {key}
            rows = (step.ids == key.expert).any(dim=1).nonzero().flatten().tolist()
            assert sorted(caught.value.token_rows) == rows
            experts.check_integrity()

    def test_wanting_near_data_without_having_it_is_refused(self, plain: Segment) -> None:
        with (
            pytest.raises(ValueError, match="no near-data worker is connected"),
            running(plain, near_data="low_bit"),
        ):
            pass


COST = {"near_data": "cost", "link_bytes_per_s": 1000.0, "near_data_token_s": 0.1}


def test_integrity_check_sees_a_pin_that_was_left(plain: Segment) -> None:
    with running(plain) as experts:
        step = Step(num_rows=1)
        step.run(experts)
        request = RecordRequest(ExpertKey(0, int(step.ids[0, 0])), "codes")
        experts.cache.pin(request)
        with pytest.raises(AssertionError, match="1 pins"):
            experts.check_integrity()
        experts.cache.unpin([request])


def test_stores_of_any_folder_are_read_the_same(tmp_path: Path) -> None:
    """An expert without factors is low-bit even when it is in the Top-n."""
    build_store(tmp_path, layers=(0,), experts=NUM_EXPERTS, ffn=64, blocks="")
    with running(Segment(tmp_path), top_n=2) as experts:
        Step(num_rows=4).run(experts)
        counters = experts.end().counters
    assert (counters.restored_pairs, counters.low_bit_pairs, counters.degraded_pairs) == (0, 12, 0)
