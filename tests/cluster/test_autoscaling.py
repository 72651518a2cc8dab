"""Goal: the replica count follows the documented formula, and Serve's context is read rightly.

Method: a table with the arithmetic spelled out, hypothesis properties (monotone, bounded, idle is
the minimum, just enough), and a hand-made context in place of Serve's.
"""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling import (
    POLICY_IMPORT_PATH,
    RUNNING_SEQUENCES,
    WAITING_SEQUENCES,
    WAITING_TOKENS,
    GpuWorkerPolicy,
    LoadSnapshot,
    Targets,
    desired_replicas,
    snapshot_of,
)

TARGETS = Targets(sequences_per_replica=8, waiting_tokens_per_replica=1000)


def snapshot(running=0.0, waiting=0.0, tokens=0.0, queued=0.0, low=1, high=10) -> LoadSnapshot:
    return LoadSnapshot(running, waiting, tokens, queued, low, high)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (snapshot(), 1),  # idle: the minimum
        (snapshot(low=0), 0),  # idle with scale to zero
        (snapshot(low=0, queued=1), 1),  # one queued request wakes a replica
        (snapshot(running=8), 1),  # 8 / 8 = 1 exactly
        (snapshot(running=8, waiting=0.5), 2),  # 8.5 / 8 = 1.06
        (snapshot(running=8, waiting=4, queued=5), 3),  # 17 / 8 = 2.1
        (snapshot(running=1, tokens=3500), 4),  # tokens lead: 3500 / 1000 = 3.5
        (snapshot(running=32, tokens=3500), 4),  # both say 4: not added up
        (snapshot(running=1e9), 10),  # the maximum
        (snapshot(running=3, low=4), 4),  # the minimum holds under load too
        (snapshot(running=1e300, tokens=1e300, high=3), 3),
    ],
)
def test_formula(load: LoadSnapshot, expected: int) -> None:
    assert desired_replicas(load, TARGETS) == expected


loads = st.floats(min_value=0, max_value=1e7, allow_nan=False)
targets = st.builds(
    Targets, st.floats(min_value=0.1, max_value=1e4), st.floats(min_value=0.1, max_value=1e6)
)
snapshots = st.tuples(loads, loads, loads, loads, st.integers(0, 20), st.integers(0, 50)).map(
    lambda t: LoadSnapshot(*t[:4], min_replicas=t[4], max_replicas=max(1, t[4] + t[5]))
)


@given(snapshots, targets, loads, loads, loads, loads)
def test_more_load_never_asks_for_fewer(load, target, running, waiting, tokens, queued) -> None:
    more = LoadSnapshot(
        load.running_sequences + running,
        load.waiting_sequences + waiting,
        load.waiting_tokens + tokens,
        load.queued_requests + queued,
        load.min_replicas,
        load.max_replicas,
    )
    assert desired_replicas(more, target) >= desired_replicas(load, target)


@given(snapshots, targets)
def test_stays_within_limits_and_is_just_enough(load, target) -> None:
    num = desired_replicas(load, target)
    assert isinstance(num, int)
    assert load.min_replicas <= num <= load.max_replicas
    sequences = load.running_sequences + load.waiting_sequences + load.queued_requests
    fits = lambda n: (  # noqa: E731
        sequences / target.sequences_per_replica <= n
        and load.waiting_tokens / target.waiting_tokens_per_replica <= n
    )
    assert fits(num) or num == load.max_replicas, "too few for the load"
    assert num == load.min_replicas or not fits(num - 1), "one fewer would do"


@given(targets, st.integers(0, 20))
def test_idle_goes_to_the_minimum(target, low) -> None:
    assert desired_replicas(snapshot(low=low, high=low + 5), target) == low


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["running", "waiting", "tokens", "queued"])
def test_impossible_load_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        snapshot(**{field: value})


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="min_replicas 3, max_replicas 2"):
        snapshot(low=3, high=2)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "8", None, True])
def test_impossible_targets_are_refused(value) -> None:
    with pytest.raises(ValueError, match="sequences_per_replica"):
        GpuWorkerPolicy(sequences_per_replica=value)
    with pytest.raises(ValueError, match="waiting_tokens_per_replica"):
        GpuWorkerPolicy(waiting_tokens_per_replica=value)


def context(metrics, running=("a", "b"), total_running=0.0, queued=0.0, low=1, high=10):
    return SimpleNamespace(
        running_replicas=list(running),
        aggregated_metrics=metrics,
        total_running_requests=total_running,
        total_queued_requests=queued,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
    )


def test_context_sums_over_running_replicas_only() -> None:
    metrics = {
        RUNNING_SEQUENCES: {"a": 3.0, "b": 4.0, "gone": 100.0},
        WAITING_SEQUENCES: {"a": 1.0, "b": 0.0, "gone": 100.0},
        WAITING_TOKENS: {"a": 50.0, "gone": 1e6},
    }
    got = snapshot_of(context(metrics, queued=2.5, total_running=77.0))
    assert got == LoadSnapshot(7.0, 1.0, 50.0, 2.5, 1, 10)


@pytest.mark.parametrize("metrics", [None, {}, {"other": {"a": 9.0}}, {RUNNING_SEQUENCES: {}}])
def test_without_reports_serves_own_count_stands_in(metrics) -> None:
    got = snapshot_of(context(metrics, total_running=12.0, queued=3.0))
    assert got == LoadSnapshot(12.0, 0.0, 0.0, 3.0, 1, 10)


def test_policy_is_built_from_json_and_returns_what_serve_expects() -> None:
    policy = GpuWorkerPolicy(**json.loads('{"sequences_per_replica": 2}'))
    decision = policy(context({RUNNING_SEQUENCES: {"a": 5.0, "b": 0.0}}))
    assert decision == (3, {})
    assert type(decision[0]) is int


def test_import_path_names_the_class() -> None:
    module, _, name = POLICY_IMPORT_PATH.partition(":")
    assert (module, name) == (GpuWorkerPolicy.__module__, GpuWorkerPolicy.__name__)
