"""Goal: a worker learns at its start, and again while it runs, what its link and its near-data
worker cost, and sends experts where the layer ends soonest; losses change costs, not answers.

Method: real records and kernels behind a link and a worker whose time is simulated, so that what
should be found is known exactly. Overlapping fetches are timed on threads that wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.errors import ExpertUnavailableError
from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.config import WorkerConfig
from gpu_worker.cost_model import ExpertLoad, LayerCosts, LinkCost, NearCost, RunCost
from gpu_worker.cost_table import CopyTime, CostTable
from gpu_worker.experts import StoreExperts
from gpu_worker.meters import MAX_PERIOD_S, MeteredSource
from gpu_worker.record_sizes import RecordSizes
from tests.gpu_worker.simulated_time import SimulatedClock, SimulatedNearData, SimulatedSource
from tests.gpu_worker.sources import CountingSource, LossySource
from tests.gpu_worker.steps import HIDDEN, NUM_EXPERTS, Step
from tests.hand_store import build_store

FAST, SLOW = LinkCost(1e9, call_s=0.0001), LinkCost(1e5, call_s=0.001)
WORKER = NearCost(RunCost(pair_s=0.001, bytes_per_s=1e8), call_s=0.0004)


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Segment:
    folder: Path = tmp_path_factory.mktemp("store")
    build_store(folder, layers=(0, 1), experts=NUM_EXPERTS, hidden=HIDDEN, ffn=64)
    return Segment(folder)


class Simulation:
    """Experts behind a simulated link and worker, fetching on the step's own thread."""

    def __init__(self, segment: Segment, link: LinkCost, **config: Any) -> None:
        self.clock = SimulatedClock()
        self.source = SimulatedSource(segment, self.clock, link)
        self.near = SimulatedNearData(segment, self.clock, WORKER)
        settings: dict[str, Any] = {"near_data": "cost", "top_n": 0, "cache_bytes": 0, **config}
        resolved = WorkerConfig(device="cpu", dtype="float32", fetch_threads=0, **settings).resolve(
            segment.manifest
        )
        self.experts = StoreExperts(self.source, resolved, self.near, clock=self.clock)

    @property
    def costs(self) -> LayerCosts:
        table = self.experts.costing.table
        assert table is not None
        return table.costs()

    def near_pairs(self, step: Step) -> int:
        """Run one step of one layer; how many of its pairs ran near data."""
        self.experts.begin(None)
        step.run(self.experts)
        return self.experts.end().counters.near_data_pairs


def test_start_up_finds_the_cost_of_link_and_near_data(segment: Segment) -> None:
    costs = Simulation(segment, SLOW).costs
    assert costs.link.bytes_per_s == pytest.approx(SLOW.bytes_per_s, rel=1e-6)
    assert costs.link.call_s == pytest.approx(SLOW.call_s, rel=1e-6)
    codes_bytes = segment.manifest.experts[ExpertKey(0, 0)].codes.num_bytes
    assert costs.near is not None
    expert_s = costs.near.run.seconds(1, codes_bytes)
    assert expert_s == pytest.approx(WORKER.run.seconds(1, codes_bytes), rel=0.05)
    assert costs.near.call_s == pytest.approx(WORKER.call_s, rel=0.2)
    assert costs.near.run.seconds(200, codes_bytes) == pytest.approx(0.2, rel=0.05)


def test_what_takes_long_is_measured_once(segment: Segment) -> None:
    """Starting must not take minutes on a link that is slow, only because it is measured."""
    run = Simulation(segment, LinkCost(5e3), near_data_token_s=1.0)
    # Many experts, one expert, and one to run on the device.
    assert [len(call) for call in run.source.calls] == [NUM_EXPERTS, 1, 1]
    assert run.costs.link.bytes_per_s == pytest.approx(5e3, rel=1e-6)


def test_given_costs_are_where_it_begins_and_nothing_is_measured(segment: Segment) -> None:
    run = Simulation(segment, SLOW, link_bytes_per_s=5e6, near_data_token_s=0.25)
    assert run.costs.link.bytes_per_s == 5e6
    assert run.costs.near is not None
    assert run.costs.near.run == RunCost(0.25)
    assert run.near.num_pairs == 0


def test_a_slow_link_sends_experts_near_data_and_a_fast_one_does_not(segment: Segment) -> None:
    step = Step(num_rows=2)
    assert Simulation(segment, SLOW).near_pairs(step) > 0
    assert Simulation(segment, FAST).near_pairs(step) == 0


def test_a_link_that_is_cut_in_mid_run_is_noticed_and_its_return_too(segment: Segment) -> None:
    step, run = Step(num_rows=2), Simulation(segment, FAST)
    assert run.near_pairs(step) == 0
    run.source.link = SLOW
    for _ in range(60):
        cut = run.near_pairs(step)
    assert cut > 0
    run.source.link = FAST
    for _ in range(600):
        back = run.near_pairs(step)
    assert back == 0


def test_a_worker_that_is_lost_is_asked_less_and_less_and_tried_again(segment: Segment) -> None:
    step, run = Step(num_rows=2), Simulation(segment, SLOW)
    expected = step.run(run.experts)
    run.near.lost = ExpertUnavailableError("worker lost (test)")
    for _ in range(40):
        run.experts.begin(None)
        output = step.run(run.experts)
        assert run.experts.end().counters.near_data_pairs == 0
    assert float((output - expected).abs().max()) < 0.05 * float(expected.abs().max())
    dearest = run.costs.near
    run.near.lost = None
    assert sum(run.near_pairs(step) for _ in range(600)) > 0
    assert dearest is not None
    assert dearest.call_s > WORKER.call_s


def test_of_a_compensator_cut_short_near_data_is_charged_what_it_reads(segment: Segment) -> None:
    """What a call is said to have cost is what the plan said that it would cost."""
    step = Step(num_rows=2)
    run = Simulation(segment, SLOW, near_data="all", top_n=1, factor_share=0.5, target_step_s=1e6)
    table = run.experts.costing.table
    seen: list[Sequence[ExpertLoad]] = []
    assert table is not None
    table.ran_near = lambda loads, seconds: seen.append(loads)  # type: ignore[method-assign]
    assert run.near_pairs(step) == step.ids.numel()
    sizes = RecordSizes.of(segment.manifest, 0.5)
    (loads,) = seen
    restored = {int(e) for e in step.ids.gather(1, step.weights.argmax(dim=1)[:, None])}
    keys = [ExpertKey(0, expert) for expert in sorted(set(step.ids.flatten().tolist()))]
    assert [load.run_bytes for load in loads] == [
        sizes.codes[key] + (sizes.factors[key] if key.expert in restored else 0) for key in keys
    ]
    whole = RecordSizes.of(segment.manifest).factors
    assert all(sizes.factors[key] < whole[key] for key in keys if key.expert in restored)


def test_predicted_and_real_time_of_layers_are_counted_and_agree(segment: Segment) -> None:
    step, run = Step(num_rows=2), Simulation(segment, SLOW, near_data="off", target_step_s=1e6)
    for _ in range(30):
        run.experts.begin(None)
        step.run(run.experts)
    counters = run.experts.end().counters
    # Computing takes no time on the simulated clock: what is left is the copies' alone.
    assert counters.layer_s > 0
    assert counters.predicted_s == pytest.approx(counters.layer_s, rel=0.2)


def test_without_a_setting_that_needs_costs_nothing_is_measured(segment: Segment) -> None:
    source = CountingSource(segment)
    config = WorkerConfig(device="cpu", dtype="float32").resolve(segment.manifest)
    experts = StoreExperts(source, config)
    assert experts.costing.table is None
    assert source.calls == []
    Step().run(experts)
    counters = experts.end().counters
    experts.close()
    assert (counters.predicted_s, counters.layer_s) == (0, 0)


def test_a_tier_that_cannot_be_measured_is_no_reason_not_to_start(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    lost = [RecordRequest(key, "codes") for key in segment.manifest.experts if key.layer == 0]
    clock = SimulatedClock()
    near = SimulatedNearData(segment, clock, WORKER)
    near.lost = ExpertUnavailableError("worker lost (test)")
    config = WorkerConfig(near_data="cost", device="cpu", dtype="float32")
    source = LossySource(segment, lost)
    experts = StoreExperts(source, config.resolve(segment.manifest), near, clock=clock)
    assert "the link could not be measured" in caplog.text
    assert "near data could not be measured" in caplog.text
    output = Step(layer=1).run(experts)
    experts.close()
    assert bool(output.isfinite().all())


class _Meeting(CountingSource):
    """Two fetches that are under way at the same time, each taking `seconds`."""

    def __init__(self, inner: Segment, clock: SimulatedClock, seconds: float) -> None:
        super().__init__(inner)
        self._clock, self._seconds = clock, seconds
        self._meeting = threading.Barrier(2, action=self._pass)

    def _pass(self) -> None:
        self._clock.now_s += self._seconds

    def before(self, requests: Sequence[RecordRequest]) -> None:
        self._meeting.wait(timeout=30)


class _Seen(CostTable):
    def __init__(self) -> None:
        super().__init__(LayerCosts(LinkCost(1e6), RunCost(0.0)))
        self.copies: list[CopyTime] = []

    def copied(self, seen: CopyTime) -> None:
        self.copies.append(seen)


def test_fetches_at_the_same_time_are_one_use_of_the_link(segment: Segment) -> None:
    clock, table = SimulatedClock(), _Seen()
    source = MeteredSource(_Meeting(segment, clock, 0.1), table, clock=clock)
    requests = [RecordRequest(ExpertKey(0, expert), "codes") for expert in range(2)]
    fetched: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda r=request: fetched.extend(source.fetch([r])))  # type: ignore[misc]
        for request in requests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    num_bytes = sum(data.numel() for data in fetched)
    # Both ended before either was counted, or one after the other: the sums are the same.
    assert sum(seen.num_bytes for seen in table.copies) == num_bytes
    assert sum(seen.seconds for seen in table.copies) == pytest.approx(0.1)
    assert sum(seen.num_calls for seen in table.copies) == 2


def test_a_fetch_that_fails_says_nothing_of_the_link_s_speed(segment: Segment) -> None:
    clock, table = SimulatedClock(), _Seen()
    lost = RecordRequest(ExpertKey(0, 0), "codes")
    source = MeteredSource(
        LossySource(SimulatedSource(segment, clock, FAST), [lost]), table, clock=clock
    )
    with pytest.raises(ExpertUnavailableError):
        source.fetch([lost])
    assert table.copies == []
    data = source.fetch([RecordRequest(ExpertKey(0, 1), "codes")])[0]
    assert [seen.num_bytes for seen in table.copies] == [data.numel()]


def test_fetches_that_never_cease_to_overlap_are_told_of_all_the_same(segment: Segment) -> None:
    clock, table = SimulatedClock(), _Seen()
    source = MeteredSource(segment, table, clock=clock)
    with source._lock:  # one is under way for ever
        source._num_open += 1
        source._begin(clock())
    request = RecordRequest(ExpertKey(0, 1), "codes")
    for _ in range(10):
        clock.now_s += MAX_PERIOD_S / 4
        source.fetch([request])
    assert [seen.num_calls for seen in table.copies] == [4, 4]
