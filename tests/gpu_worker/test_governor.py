"""Goal: the governor gives way to pressure and to nothing else, never leaves its ladder, comes back
to full quality when the pressure is gone, and does not swing between two rungs.

Method: properties of the pure controller over random states and steps; a simulated link whose speed
changes; a whole engine over a real store behind a simulated link.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.segment import Segment
from expert_store.types import RecordKind
from gpu_worker import governor as governing
from gpu_worker.build import build_engine
from gpu_worker.config import WorkerConfig
from gpu_worker.cost_model import LinkCost
from gpu_worker.counters import StepCounters
from gpu_worker.engine import Engine
from gpu_worker.experts import StoreExperts
from gpu_worker.governor import GovernorState, StepTime, advance
from gpu_worker.messages import Event, Finished, GenerateRequest, ModelDescription
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as Request
from gpu_worker.service import EngineService
from tests.gpu_worker.plain_engine import play
from tests.gpu_worker.simulated_time import SimulatedClock, SimulatedSource
from tests.tiny_checkpoints import write_tiny_checkpoint

RUNGS = (1.0, 0.75, 0.5, 0.25, 0.0)
TARGET_S = 0.1

seconds = st.floats(0, 1.0)
step_times = st.builds(
    lambda step_s, part, full: StepTime(step_s, part * step_s, full),
    seconds,
    st.floats(0, 1),
    seconds,
)
states = st.builds(
    GovernorState,
    rung=st.integers(0, len(RUNGS) - 1),
    recent=st.lists(step_times, max_size=governing.WINDOW).map(tuple),
    calm=st.integers(0, 3000),
    patience=st.integers(governing.PATIENCE, governing.MAX_PATIENCE),
    on_trial=st.booleans(),
)


def go(
    state: GovernorState, seen: Sequence[StepTime], rungs: Sequence[float] = RUNGS
) -> GovernorState:
    for step in seen:
        state = advance(state, step, target_s=TARGET_S, factor_bytes=rungs)
    return state


@settings(deadline=None)
@given(states, st.lists(step_times, max_size=40))
def test_it_never_leaves_the_ladder(state: GovernorState, steps: list[StepTime]) -> None:
    for step in steps:
        state = go(state, [step])
        assert 0 <= state.rung < len(RUNGS)
        assert len(state.recent) <= governing.WINDOW
        assert governing.PATIENCE <= state.patience <= governing.MAX_PATIENCE


@settings(max_examples=300, deadline=None)
@given(states, step_times, seconds)
def test_a_longer_step_never_gives_better_quality(
    state: GovernorState, step: StepTime, more_s: float
) -> None:
    # All of the longer step's surplus was waiting.
    longer = replace(step, step_s=step.step_s + more_s, wait_s=step.wait_s + more_s)
    assert go(state, [longer]).rung >= go(state, [step]).rung


@settings(max_examples=30, deadline=None)
@given(states)
def test_it_comes_back_to_full_quality_when_the_pressure_is_gone(state: GovernorState) -> None:
    calm = StepTime(step_s=TARGET_S / 10, wait_s=0.0, full_factors_s=0.0)
    steps = len(RUNGS) * (governing.MAX_PATIENCE + governing.WINDOW)
    assert go(state, [calm] * steps).rung == 0


@settings(max_examples=15, deadline=None)
@given(states)
def test_even_when_nothing_is_known_of_the_link_any_more(state: GovernorState) -> None:
    """On the last rung nothing is fetched: an old, slow link is believed only for so long."""
    calm = StepTime(step_s=TARGET_S / 10, wait_s=0.0, full_factors_s=100.0)
    steps = len(RUNGS) * governing.BLIND * (governing.MAX_PATIENCE + governing.WINDOW)
    assert go(state, [calm] * steps).rung == 0


def test_slow_steps_that_do_not_wait_for_bytes_cost_no_quality() -> None:
    busy = StepTime(step_s=5 * TARGET_S, wait_s=0.01 * TARGET_S, full_factors_s=0.0)
    assert go(GovernorState(), [busy] * 100).rung == 0


def test_one_step_that_waited_for_something_else_costs_no_quality() -> None:
    usual = StepTime(0.8 * TARGET_S, 0.5 * TARGET_S, 0.3 * TARGET_S)
    stalled = StepTime(50 * TARGET_S, 49 * TARGET_S, 0.3 * TARGET_S)
    assert go(GovernorState(), ([usual] * 7 + [stalled]) * 20).rung == 0


def test_it_goes_down_as_far_as_needed_at_once_and_no_farther() -> None:
    """1.3 of the target, 0.6 of it for factors: half of them brings 1.0."""
    slow = StepTime(1.3 * TARGET_S, 0.6 * TARGET_S, 0.6 * TARGET_S)
    state = go(GovernorState(), [slow] * governing.MIN_SEEN)
    assert RUNGS[state.rung] == 0.5
    # A target that no rung can keep: as near as the limits allow.
    hopeless = StepTime(9 * TARGET_S, 8 * TARGET_S, 0.6 * TARGET_S)
    assert go(state, [hopeless] * governing.MIN_SEEN).rung == len(RUNGS) - 1


def test_quality_is_not_given_up_for_next_to_nothing() -> None:
    """Twice the target, and waiting for codes: all factors are a twentieth of the target."""
    codes = StepTime(2 * TARGET_S, 1.5 * TARGET_S, 0.05 * TARGET_S)
    assert go(GovernorState(), [codes] * 100).rung == 0
    # A quarter of it is worth it, but only as far as the last tenth.
    some = StepTime(2 * TARGET_S, 1.5 * TARGET_S, 0.25 * TARGET_S)
    assert RUNGS[go(GovernorState(), [some] * governing.MIN_SEEN).rung] == 0.25


def test_rungs_that_save_codes_are_tried_one_by_one() -> None:
    rungs, state = (1.0, 0.0, 0.0, 0.0), GovernorState(rung=1)
    codes = StepTime(2 * TARGET_S, 1.5 * TARGET_S, 0.2 * TARGET_S)
    seen = []
    for _ in range(3 * governing.MIN_SEEN):
        state = go(state, [codes], rungs)
        seen.append(state.rung)
    assert sorted(set(seen)) == [1, 2, 3]
    # Also from above the last factors, when those are next to nothing.
    some = replace(codes, full_factors_s=0.05 * TARGET_S)
    assert go(GovernorState(), [some] * governing.MIN_SEEN, rungs).rung == 2


@dataclass
class Link:
    """Steps of 20 ms, besides 30 ms of factors at full speed and quality."""

    speed: float = 1.0

    def step(self, share: float) -> StepTime:
        wait_s = 0.03 * share / self.speed
        return StepTime(0.02 + wait_s, wait_s, 0.03 / self.speed)


def test_a_cut_link_lowers_quality_and_its_return_raises_it_without_swinging() -> None:
    link, state, rungs = Link(), GovernorState(), []
    for speed in (1.0, 0.3, 1.0):
        link.speed = speed
        for _ in range(300):
            state = go(state, [link.step(RUNGS[state.rung])])
            rungs.append(state.rung)
    assert set(rungs[:300]) == {0}
    # 0.1 s for all factors: 0.8 of them fit; the prefix of 0.75 it is.
    assert set(rungs[320:600]) == {1}
    assert rungs[650] == rungs[-1] == 0
    changes = sum(a != b for a, b in zip(rungs, rungs[1:], strict=False))
    assert changes == 2


def test_a_rung_that_fails_again_and_again_is_tried_less_and_less() -> None:
    """What the link is believed to do is wrong: each trial of the better rung breaks the target."""
    link, state, trials = Link(speed=0.05), GovernorState(), []
    for index in range(4000):
        step = replace(link.step(RUNGS[state.rung]), full_factors_s=TARGET_S)
        after = go(state, [step])
        if after.rung < state.rung:
            trials.append(index)
        state = after
    gaps = [b - a for a, b in zip(trials, trials[1:], strict=False)]
    assert len(trials) < 40
    assert gaps[-1] > 10 * gaps[0]


async def last_event(events: AsyncIterator[Event]) -> Event:
    *_, last = [event async for event in events]
    return last


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("governed")
    model = write_tiny_checkpoint("mixtral", folder / "model", hidden=128, ffn=128)
    compress(model, folder / "store", CompressionConfig(recipe="paper", avg_rank=64), jobs=1)
    return folder / "store"


@dataclass
class Run:
    engine: Engine
    source: SimulatedSource
    clock: SimulatedClock

    def answer(self, name: str, num_tokens: int = 24) -> Any:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
        return play(self.engine, {0: [Request(name, (5, 6, 7), params)]})[name]


FAST, CUT = LinkCost(1e9), LinkCost(2e6)


@pytest.fixture
def run(store: Path) -> Iterator[Run]:
    """A target that the cut link breaks with whole compensators and just keeps without any."""
    clock = SimulatedClock()
    source = SimulatedSource(Segment(store), clock, FAST)
    # Nothing is cached: every token fetches its experts, 2 of them in each of the model's layers.
    codes = source.manifest.experts[min(source.manifest.experts)].codes.num_bytes
    num_layers = len(source.manifest.model.moe_layers)
    config = WorkerConfig(
        device="cpu",
        dtype="float32",
        cache_bytes=0,
        fetch_threads=0,
        target_step_s=1.02 * 2 * num_layers * codes / CUT.bytes_per_s,
    )
    engine = build_engine(store, source, None, config, clock=clock)
    yield Run(engine, source, clock)
    engine.close()


def test_an_engine_under_a_cut_link_gives_up_factors_says_so_and_comes_back(run: Run) -> None:
    governor = run.engine.governor
    assert governor is not None
    before = run.answer("before")
    assert before[-1].quality is None
    at_full = run.source.bytes["factors"]
    run.source.link = CUT
    for index in range(4):
        run.answer(f"cut {index}")
    already = run.source.bytes["factors"]
    during = run.answer("during")
    assert governor.rung > 0
    assert during[-1].quality == str(governor.setting)
    assert run.source.bytes["factors"] - already < 0.7 * at_full  # a rung of 2/3
    run.source.link = FAST
    for index in range(20):
        run.answer(f"back {index}")
    after = run.answer("after")
    assert after[-1].quality is None
    assert [event.token_id for event in after] == [event.token_id for event in before]


def test_a_service_counts_governed_tokens_and_shows_the_knobs(run: Run) -> None:
    run.source.link = CUT
    for index in range(4):
        run.answer(f"cut {index}")
    service = EngineService(run.engine, ModelDescription("m", "mixtral", 64, 0))
    try:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        request = GenerateRequest("r", params, prompt=(5, 6, 7))
        last = asyncio.run(last_event(service.generate(request)))
        assert isinstance(last, Finished)
        assert last.quality is not None
        stats = service.load()
    finally:
        service.close()
    assert stats.governed_tokens == 3 + 4  # the prompt, and all but the last token of the answer
    assert stats.knobs["rung"] > 0
    assert stats.knobs["factor_share"] < 1


def test_the_cache_follows_the_governor(store: Path) -> None:
    """Where factors have a part of their own, codes get what governed factors leave."""
    clock = SimulatedClock()
    source = SimulatedSource(Segment(store), clock, CUT)
    config = WorkerConfig(
        device="cpu",
        dtype="float32",
        cache_bytes=100_000,
        factor_cache_share=0.3,
        target_step_s=1e-9,
    ).resolve(source.manifest)
    experts = StoreExperts(source, config, clock=clock)
    governor = experts.costing.governor
    assert governor is not None
    assert experts.cache.budgets.factor_share == 0.3
    moved: dict[tuple[str, RecordKind], int] = {("test", "factors"): 10**6}
    for _ in range(20):
        governor.decoded(1.0, StepCounters(wait_s=1.0, moved_bytes=moved), 1)
    experts.begin(None)
    experts.close()
    assert governor.rung == governor.num_rungs - 1
    assert experts.cache.budgets.factor_share == 0.0
