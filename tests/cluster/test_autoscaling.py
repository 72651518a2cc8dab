"""Goal: the replica count follows the documented rules, and Serve's context is read rightly.

Method: arithmetic spelled out, hypothesis properties (monotone, bounded, just enough, nothing that
is needed taken away), decisions along a hand-made clock, and a context in place of Serve's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling import (
    ANSWER_TOKENS,
    ARRIVALS,
    BUSY_SHARE,
    POLICY_IMPORT_PATH,
    PROMPT_TOKENS,
    RUNNING_SEQUENCES,
    STEPS,
    WAIT_SHARE,
    WAITING_SEQUENCES,
    WAITING_TOKENS,
    GpuWorkerPolicy,
    snapshot_of,
)
from cluster.autoscaling_decision import Delays, Memory, Settings, decide, settle, wanted
from cluster.autoscaling_rules import (
    LoadSnapshot,
    ServiceTimes,
    Targets,
    Waiting,
    Worker,
    counts_fit,
    predict,
    slowdown,
)

SERVICE = ServiceTimes(
    step_s=0.02, sequence_s=0.002, prompt_token_s=0.001, prompt_tokens=100, answer_tokens=50
)
WORKER = Worker(slots=8, prefill_chunk=256)
COUNTS = Settings(Targets(sequences_per_replica=8, waiting_tokens_per_replica=1000))
SECONDS = Settings(Targets(ttft_s=1.0, per_token_s=0.05, headroom=1.0, calm_margin=1.0), SERVICE)
loads = st.floats(0, 1e4, allow_nan=False)


def snapshot(low=0, high=10, **load: float) -> LoadSnapshot:
    values = {
        "running_sequences": 0.0,
        "waiting_sequences": 0.0,
        "waiting_tokens": 0.0,
        "queued_requests": 0.0,
        **load,
    }
    return LoadSnapshot(min_replicas=low, max_replicas=high, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (snapshot(low=1), 1),  # idle: the minimum
        (snapshot(), 0),  # idle with scale to zero
        (snapshot(running_sequences=8), 1),
        (snapshot(running_sequences=9), 2),
        (snapshot(running_sequences=4, waiting_sequences=4, queued_requests=1), 2),
        (snapshot(waiting_tokens=1001, running_sequences=1), 2),
        (snapshot(running_sequences=1000), 10),  # never more than allowed
        (snapshot(low=3, running_sequences=1), 3),
    ],
)
def test_counts(load: LoadSnapshot, expected: int) -> None:
    assert wanted(load, 0.0, COUNTS)[0] == expected


@given(loads, loads, loads, st.integers(1, 40))
def test_counts_are_just_enough(running: float, waiting: float, tokens: float, high: int) -> None:
    load = snapshot(
        1, high, running_sequences=running, waiting_sequences=waiting, waiting_tokens=tokens
    )
    num, _ = wanted(load, 0.0, COUNTS)
    assert counts_fit(load, COUNTS.targets, num) or num == high
    assert num == 1 or not counts_fit(load, COUNTS.targets, num - 1)


def test_waiting_is_the_documented_arithmetic() -> None:
    # 2 requests/s on one worker: p = 200, d = 100 tokens/s, chunks of 100.
    left = 1 - 200 * (0.001 + 0.02 / 100)
    running = 100 * 0.02 / (left - 100 * 0.002)
    decode_s = 0.02 + 0.002 * running
    token_s = 0.001 + (0.02 + decode_s) / 100
    got = predict(snapshot(waiting_tokens=300.0), 2.0, 1, SERVICE, WORKER)
    assert got.per_token_s == pytest.approx(decode_s / left)
    assert got.ttft_s == pytest.approx(300 * token_s + 100 * token_s / (1 - 200 * token_s))


def test_waiting_without_end() -> None:
    endless = Waiting(math.inf, math.inf)
    assert (
        predict(snapshot(), 20.0, 1, SERVICE, WORKER) == endless
    )  # prompts alone take 24 s each s
    assert predict(snapshot(arrivals_per_s=1.0), 1.0, 0, SERVICE, WORKER) == endless
    assert predict(snapshot(), 3.2, 1, SERVICE, Worker(slots=1)) == endless  # more than a slot runs
    assert predict(snapshot(), 0.0, 0, SERVICE, WORKER) == Waiting(0, 0)


def test_sequences_over_the_slots_wait_for_one() -> None:
    free = predict(snapshot(running_sequences=8), 1.0, 1, SERVICE, WORKER)
    full = predict(snapshot(running_sequences=10), 1.0, 1, SERVICE, WORKER)
    # Two more than the slots, each ends after 50 steps of 36 ms, eight at a time.
    assert full.ttft_s - free.ttft_s == pytest.approx(2 * 50 * 0.036 / 8)


@given(
    rate=st.floats(0, 30),
    running=st.floats(0, 100),
    tokens=st.floats(0, 1e5),
    num=st.integers(1, 30),
)
def test_another_replica_never_makes_waiting_longer(rate, running, tokens, num) -> None:
    load = snapshot(running_sequences=running, waiting_tokens=tokens)
    fewer = predict(load, rate, num, SERVICE, WORKER)
    more = predict(load, rate, num + 1, SERVICE, WORKER)
    assert more.ttft_s <= fewer.ttft_s
    assert more.per_token_s <= fewer.per_token_s


@given(rate=st.floats(0, 30), running=st.floats(0.1, 100), high=st.integers(1, 20))
def test_seconds_are_just_enough(rate: float, running: float, high: int) -> None:
    load = snapshot(1, high, running_sequences=running)
    num, enough = wanted(load, rate, SECONDS)
    waits = [predict(load, rate, n, SERVICE, WORKER) for n in (num - 1, num)]
    assert num == high or waits[1].within(SECONDS.targets)
    assert num == 1 or not waits[0].within(SECONDS.targets)
    assert enough == num  # calm_margin 1
    careful = dataclasses.replace(
        SECONDS, targets=dataclasses.replace(SECONDS.targets, calm_margin=0.7)
    )
    assert wanted(load, rate, careful)[1] >= num


def test_slow_steps_count_as_what_they_take() -> None:
    # 30 steps, 100 answer and 100 prompt tokens a second: 0.6 + 0.2 + 0.1 = 0.9 s when as fitted.
    load = snapshot(steps_per_s=30, answer_tokens_per_s=100, prompt_tokens_per_s=100)
    assert slowdown(load, SERVICE) == 1.0  # nobody reports
    twice = dataclasses.replace(load, reporting_replicas=2, busy_share=0.9)
    assert slowdown(twice, SERVICE) == pytest.approx(2.0)
    idle = dataclasses.replace(twice, busy_share=0.01)
    assert slowdown(idle, SERVICE) == 1.0
    assert (
        wanted(dataclasses.replace(twice, running_sequences=4), 4.0, SECONDS)[0]
        > (
            wanted(dataclasses.replace(twice, running_sequences=4, busy_share=0.45), 4.0, SECONDS)[
                0
            ]
        )
    )


def run(settings: Settings, load: LoadSnapshot, seconds: float, memory: Memory, start: float = 0.0):
    """Targets decided every second, each the next one's present."""
    targets = []
    for second in range(int(seconds)):
        decision = decide(load, memory, start + second, settings)
        memory = decision.memory
        load = dataclasses.replace(load, target_replicas=decision.num_replicas)
        targets.append(decision.num_replicas)
    return targets, memory


def test_up_after_a_while_and_down_after_calm() -> None:
    settings = dataclasses.replace(COUNTS, delays=Delays(up_s=3, calm_s=10, zero_s=20))
    busy = snapshot(running_sequences=20, target_replicas=1)
    targets, memory = run(settings, busy, 6, Memory())
    assert targets == [1, 1, 1, 3, 3, 3]
    quiet = snapshot(target_replicas=3, reporting_replicas=3)
    targets, _ = run(settings, quiet, 30, memory, start=6)
    # The last wish for three was at 5; none at all has been enough since 6.
    assert targets == [3] * 10 + [0] * 20


def test_one_busy_moment_keeps_what_it_needs_for_the_calm_time() -> None:
    settings = dataclasses.replace(COUNTS, delays=Delays(up_s=0, calm_s=10, zero_s=10))
    _, memory = run(settings, snapshot(running_sequences=1, target_replicas=4), 8, Memory())
    burst = snapshot(running_sequences=17, target_replicas=4)
    decision = decide(burst, memory, 8.0, settings)
    assert decision.num_replicas == 4
    quiet = dataclasses.replace(burst, running_sequences=1)
    targets, _ = run(settings, quiet, 14, decision.memory, start=9)
    assert targets == [4, 4] + [3] * 8 + [1] * 4


def test_the_last_replica_waits_longer() -> None:
    settings = dataclasses.replace(COUNTS, delays=Delays(up_s=0, calm_s=2, zero_s=6))
    idle = snapshot(target_replicas=1, reporting_replicas=1)
    targets, _ = run(settings, idle, 9, Memory())
    assert targets == [1] * 7 + [0] * 2


def test_the_first_replica_is_not_ended_while_it_starts() -> None:
    settings = dataclasses.replace(COUNTS, delays=Delays(up_s=0, calm_s=2, zero_s=2))
    targets, memory = run(settings, snapshot(target_replicas=1), 60, Memory())
    assert targets == [1] * 60
    started = snapshot(target_replicas=1, reporting_replicas=1)
    targets, _ = run(settings, started, 6, memory, start=60)
    assert targets == [1, 1, 0, 0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=60), st.integers(0, 9))
def test_nothing_needed_is_taken_away_and_memory_stays_small(wishes, target) -> None:
    memory, delays = Memory(), Delays(up_s=2, calm_s=5, zero_s=9)
    for now, (up, more) in enumerate(wishes):
        num, memory = settle(up, up + more, memory, target, now_s=float(now), delays=delays)
        assert num >= min(up, target)
        target = num
        assert len(memory.enough) <= 14
        assert Memory.of(json.loads(json.dumps(memory.as_state()))) == memory


def test_a_rise_is_seen_ahead() -> None:
    def final(lead_s: float) -> int:
        targets = dataclasses.replace(SECONDS.targets, lead_s=lead_s, smooth_s=10.0)
        settings = dataclasses.replace(SECONDS, targets=targets, delays=Delays(0, 100, 100))
        memory, num = Memory(), 1
        for second in range(60):
            rate = 0.2 * second
            load = snapshot(1, 50, running_sequences=1, arrivals_per_s=rate, target_replicas=num)
            decision = decide(load, memory, float(second), settings)
            memory, num = decision.memory, decision.num_replicas
        return num

    now = wanted(snapshot(1, 50, running_sequences=1), 0.2 * 59, SECONDS)[0]
    later = wanted(snapshot(1, 50, running_sequences=1), 0.2 * (59 + 20), SECONDS)[0]
    assert final(0.0) < now  # an average lags
    assert now < final(20.0) <= later


def test_a_saturated_tier_is_no_reason_for_more_workers() -> None:
    targets = dataclasses.replace(COUNTS.targets, tier_limit=0.8)
    settings = dataclasses.replace(COUNTS, targets=targets, delays=Delays(0, 0, 0))
    load = snapshot(running_sequences=40, target_replicas=2, wait_share=0.9)
    held = decide(load, Memory(), 0.0, settings)
    assert (held.num_replicas, held.held) == (2, True)
    free = decide(dataclasses.replace(load, wait_share=0.7), Memory(), 0.0, settings)
    assert (free.num_replicas, free.held) == (5, False)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["running_sequences", "waiting_tokens", "arrivals_per_s"])
def test_impossible_load_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        snapshot(**{field: value})


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="min_replicas 3, max_replicas 2"):
        snapshot(low=3, high=2)


IN_SECONDS: dict[str, Any] = {"ttft_s": 1, **dataclasses.asdict(SERVICE)}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        *[
            ({"sequences_per_replica": v}, "sequences_per_replica")
            for v in (0, -1, "8", None, True)
        ],
        *[({"ttft_s": v}, "ttft_s: got") for v in (0, -1, math.nan, math.inf, "1")],
        ({"headroom": 0}, "headroom: got 0, expected 0.1 to 10"),
        ({"tier_limit": 2}, "tier_limit: got 2, expected 0.05 to 1"),
        ({"ttft_s": 1}, "service: got nothing, but ttft_s"),
        ({"step_s": 0.1}, "answer_tokens: got nothing, but step_s"),
        ({**IN_SECONDS, "step_s": 0}, "step_s: got 0"),
        ({**IN_SECONDS, "slots": 0}, "slots: got 0"),
        ({**IN_SECONDS, "prefill_chunk": 2.5}, "prefill_chunk: got 2.5"),
        ({"upscale_delay_s": -1}, "up_s: got -1, expected 0 to 86400"),
        ({"sequences": 3}, "sequences: unknown to the policy; it knows answer_tokens"),
    ],
)
def test_impossible_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GpuWorkerPolicy(**kwargs)


def context(metrics, running=("a", "b"), total_running=0.0, queued=0.0, low=1, high=10, state=None):
    return SimpleNamespace(
        running_replicas=list(running),
        aggregated_metrics=metrics,
        total_running_requests=total_running,
        total_queued_requests=queued,
        target_num_replicas=2,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
        policy_state=state,
        current_time=100.0,
    )


def test_context_sums_over_running_replicas_only() -> None:
    metrics = {
        RUNNING_SEQUENCES: {"a": 3.0, "b": 4.0, "gone": 100.0},
        WAITING_SEQUENCES: {"a": 1.0, "b": 0.0, "gone": 100.0},
        WAITING_TOKENS: {"a": 50.0, "gone": 1e6},
        ARRIVALS: {"a": 1.0, "b": 2.0},
        PROMPT_TOKENS: {"a": 10.0},
        ANSWER_TOKENS: {"a": 20.0, "b": 1.0},
        STEPS: {"b": 6.0},
        BUSY_SHARE: {"a": 0.5, "b": 1.0},
        WAIT_SHARE: {"a": 0.4, "b": 0.0},
    }
    got = snapshot_of(context(metrics, queued=2.5, total_running=77.0))
    assert got == LoadSnapshot(
        7.0, 1.0, 50.0, 2.5, 1, 10, 2, 2, 3.0, 10.0, 21.0, 6.0, busy_share=0.75, wait_share=0.2
    )


@pytest.mark.parametrize("metrics", [None, {}, {"other": {"a": 9.0}}, {RUNNING_SEQUENCES: {}}])
def test_without_reports_serves_own_count_stands_in(metrics) -> None:
    got = snapshot_of(context(metrics, total_running=12.0, queued=3.0))
    assert got == LoadSnapshot(12.0, 0.0, 0.0, 3.0, 1, 10, target_replicas=2)


def test_policy_is_built_from_json_and_remembers_through_serve() -> None:
    text = '{"sequences_per_replica": 2, "upscale_delay_s": 0, "ttft_s": null}'
    policy = GpuWorkerPolicy(**json.loads(text))
    num, state = policy(context({RUNNING_SEQUENCES: {"a": 5.0, "b": 0.0}}))
    assert num == 3
    assert type(num) is int
    # Serve adds entries of its own, and hands back all of it.
    later, again = policy(context({}, state={**pickle.loads(pickle.dumps(state)), "__other": 1}))
    assert later == 2  # the target of the context: three were wanted a moment ago
    assert Memory.of(again).enough[0][1] == 3


def test_import_path_names_the_class() -> None:
    module, _, name = POLICY_IMPORT_PATH.partition(":")
    assert (module, name) == (GpuWorkerPolicy.__module__, GpuWorkerPolicy.__name__)
