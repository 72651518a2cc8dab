"""Goal: a plan covers every active pair once, moves exactly the bytes that are missing, and follows
its policy.

Method: properties over random routings, caches and policies; hand-made cases for each policy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.cost_model import LayerCosts, LinkCost, NearCost, RunCost
from gpu_worker.planner import DispatchPlan, Policy, plan, plan_local, predict
from gpu_worker.record_sizes import PlannedCopy, RecordSizes
from gpu_worker.routing import Routing

LAYER = 3
NUM_EXPERTS = 6
KEYS = [ExpertKey(LAYER, expert) for expert in range(NUM_EXPERTS)]
# The last expert has rank 0: no factors.
SIZES = RecordSizes(
    codes={key: 1000 + key.expert for key in KEYS},
    factors={key: 100 + key.expert for key in KEYS[:-1]},
)
COSTS = LayerCosts(LinkCost(bytes_per_s=1000.0), RunCost(pair_s=0.0), NearCost(RunCost(pair_s=0.4)))
COST = Policy("cost", costs=COSTS)


def routing_of(
    ids: list[list[int]], restore: list[list[bool]], active: list[bool] | None = None
) -> Routing:
    ids_TK = torch.tensor(ids, dtype=torch.int64)
    return Routing(
        ids_TK,
        torch.full(ids_TK.shape, 0.5),
        torch.tensor(restore, dtype=torch.bool),
        torch.zeros(ids_TK.shape, dtype=torch.bool),
        torch.tensor(active if active is not None else [True] * len(ids), dtype=torch.bool),
    )


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    num_columns, num_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    flags = st.lists(st.booleans(), min_size=num_columns, max_size=num_columns)
    ids = [draw(st.permutations(range(NUM_EXPERTS)))[:num_columns] for _ in range(num_tokens)]
    restore = [draw(flags) for _ in range(num_tokens)]
    active = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    everything = [RecordRequest(key, "codes") for key in SIZES.codes]
    everything += [RecordRequest(key, "factors") for key in SIZES.factors]
    return {
        "routing": routing_of(ids, restore, active),
        "on_device": frozenset(draw(st.sets(st.sampled_from(everything)))),
        "policy": draw(st.sampled_from([Policy("off"), Policy("low_bit"), COST])),
    }


def pairs_of(dispatch: DispatchPlan) -> list[tuple[int, int, int]]:
    works = (*dispatch.resident, *dispatch.streamed, *dispatch.remote)
    return [
        (row, column, work.key.expert)
        for work in works
        for row, column in zip(work.token_rows, work.columns, strict=True)
    ]


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_active_pair_is_planned_once_and_every_missing_record_is_copied_once(
    case: dict[str, Any],
) -> None:
    routing, on_device = case["routing"], case["on_device"]
    dispatch = plan(LAYER, routing, on_device=on_device, sizes=SIZES, policy=case["policy"])

    expected = [
        (row, column, int(routing.topk_ids_TK[row, column]))
        for row in range(routing.topk_ids_TK.shape[0])
        for column in range(routing.topk_ids_TK.shape[1])
        if routing.active_T[row]
    ]
    assert Counter(pairs_of(dispatch)) == Counter(expected)

    needed = set()
    for work in (*dispatch.resident, *dispatch.streamed):
        needed.add(RecordRequest(work.key, "codes"))
        if work.num_restored:
            needed.add(RecordRequest(work.key, "factors"))
    assert {copy.request for copy in dispatch.copies} == needed - on_device
    assert set(dispatch.hits) == needed & on_device
    assert len(dispatch.copies) + len(dispatch.hits) == len(needed)
    assert all(copy.num_bytes == SIZES.bytes_of(copy.request) for copy in dispatch.copies)
    missing = {copy.request.key for copy in dispatch.copies}
    assert all(work.key in missing for work in dispatch.streamed)
    assert all(work.key not in missing for work in dispatch.resident)

    for work in (*dispatch.resident, *dispatch.streamed, *dispatch.remote):
        for row, column, restored in zip(work.token_rows, work.columns, work.restored, strict=True):
            wanted = bool(routing.restore_TK[row, column]) and work.key in SIZES.factors
            assert restored is wanted
    assert all(work.num_restored == 0 for work in dispatch.remote)
    for works in (dispatch.resident, dispatch.streamed, dispatch.remote):
        assert [work.key for work in works] == sorted(work.key for work in works)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_low_bit_policy_depends_on_the_router_alone(case: dict[str, Any]) -> None:
    policy = Policy("low_bit")
    with_cache = plan(
        LAYER, case["routing"], on_device=case["on_device"], sizes=SIZES, policy=policy
    )
    without = plan(LAYER, case["routing"], on_device=frozenset(), sizes=SIZES, policy=policy)
    assert with_cache.remote == without.remote
    local = (*with_cache.resident, *with_cache.streamed)
    assert all(all(work.restored) for work in local)


def test_low_bit_policy_splits_one_expert_between_device_and_near_data() -> None:
    routing = routing_of([[0], [0]], [[True], [False]])
    dispatch = plan(LAYER, routing, on_device=frozenset(), sizes=SIZES, policy=Policy("low_bit"))
    (local,), (remote,) = dispatch.streamed, dispatch.remote
    assert (local.key, local.token_rows, local.restored) == (KEYS[0], (0,), (True,))
    assert (remote.key, remote.token_rows, remote.restored) == (KEYS[0], (1,), (False,))
    assert dispatch.copy_bytes("codes") == 1000
    assert dispatch.copy_bytes("factors") == 100


def test_fewer_blocks_than_wanted_are_fetched_anew_and_more_are_used() -> None:
    sizes = replace(SIZES, num_blocks={KEYS[0]: 2})
    routing = routing_of([[0]], [[True]])
    codes, wanted = RecordRequest(KEYS[0], "codes"), RecordRequest(KEYS[0], "factors", 2)
    for held, is_there in ((None, True), (3, True), (2, True), (1, False), (0, False)):
        on_device = frozenset([codes, RecordRequest(KEYS[0], "factors", held)])
        dispatch = plan(LAYER, routing, on_device=on_device, sizes=sizes, policy=Policy("off"))
        assert dispatch.hits == ((codes, wanted) if is_there else (codes,))
        copies = () if is_there else (PlannedCopy(wanted, 100),)
        assert dispatch.copies == copies
        assert bool(dispatch.resident) is is_there
    # The whole record is more than any prefix.
    on_device = frozenset([codes, wanted])
    dispatch = plan(LAYER, routing, on_device=on_device, sizes=SIZES, policy=Policy("off"))
    assert dispatch.copies == (PlannedCopy(RecordRequest(KEYS[0], "factors"), 100),)


def test_off_policy_copies_everything() -> None:
    routing = routing_of([[0, 5]], [[True, True]])
    dispatch = plan(LAYER, routing, on_device=frozenset(), sizes=SIZES, policy=Policy("off"))
    assert dispatch.remote == ()
    assert dispatch.copy_bytes("codes") == 2005
    assert dispatch.copy_bytes("factors") == 100  # expert 5 has none
    assert (dispatch.num_pairs(), dispatch.num_restored()) == (2, 1)


def test_cost_policy_weighs_seconds_of_copying_against_seconds_of_near_data() -> None:
    """1000 bytes at 1000 bytes/s take 1 s: as long as 2.5 tokens at 0.4 s."""
    for num_tokens, is_remote in ((2, True), (3, False)):
        routing = routing_of([[0]] * num_tokens, [[False]] * num_tokens)
        dispatch = plan(LAYER, routing, on_device=frozenset(), sizes=SIZES, policy=COST)
        assert bool(dispatch.remote) is is_remote


def test_cost_policy_counts_residents_and_codes_that_come_anyway_as_free() -> None:
    codes = frozenset([RecordRequest(KEYS[0], "codes")])
    low_bit = routing_of([[0]], [[False]])
    assert plan(LAYER, low_bit, on_device=codes, sizes=SIZES, policy=COST).remote == ()
    shared = routing_of([[0], [0]], [[True], [False]])
    assert plan(LAYER, shared, on_device=frozenset(), sizes=SIZES, policy=COST).remote == ()


def test_cost_policy_keeps_link_and_near_data_busy_together() -> None:
    """Two experts of 1 s to copy or 0.8 s near data: one each way ends after 1 s, not 1.6 or 2."""
    routing = routing_of([[0, 1], [1, 0]], [[False, False], [False, False]])
    dispatch = plan(LAYER, routing, on_device=frozenset(), sizes=SIZES, policy=COST)
    assert (len(dispatch.streamed), len(dispatch.remote)) == (1, 1)
    # The larger expert goes near data: it saves more of the link for the same time there.
    assert dispatch.remote[0].key == KEYS[1]
    assert predict(dispatch, SIZES, COST).total_s == pytest.approx(1.0)


def test_a_prediction_is_of_what_the_plan_copies_and_runs() -> None:
    near = NearCost(RunCost(pair_s=0.4), call_s=0.1, act_bytes_per_s=10.0)
    costs = LayerCosts(LinkCost(1000.0, call_s=0.5), RunCost(pair_s=0.01), near, fixed_s=0.2)
    policy = Policy("low_bit", costs=costs, row_bytes=4)
    routing = routing_of([[0, 1], [0, 2]], [[True, False], [True, True]])
    held = frozenset([RecordRequest(KEYS[0], "codes"), RecordRequest(KEYS[0], "factors")])
    time = predict(plan(LAYER, routing, on_device=held, sizes=SIZES, policy=policy), SIZES, policy)
    assert time.link_s == pytest.approx(0.5 + (1002 + 102) / 1000)  # expert 2; 0 is resident
    assert (time.tail_s, time.device_s) == (pytest.approx(0.01), pytest.approx(0.03))
    assert time.near_s == pytest.approx(0.1 + 0.4 + 8 / 10)  # a row there and one back
    assert time.total_s == pytest.approx(0.2 + time.link_s + 0.01)


def test_cost_policy_without_costs_is_refused() -> None:
    for costs in (None, replace(COSTS, near=None)):
        with pytest.raises(ValueError, match="near_data 'cost' needs those of link and near data"):
            Policy("cost", costs=costs)


def test_plan_local_brings_lost_remote_work_to_the_device() -> None:
    routing = routing_of([[0, 1]], [[False, False]])
    dispatch = plan(LAYER, routing, on_device=frozenset(), sizes=SIZES, policy=Policy("low_bit"))
    on_device = frozenset([RecordRequest(KEYS[1], "codes")])
    again = plan_local(dispatch.remote, on_device=on_device, sizes=SIZES)
    assert Counter(pairs_of(again)) == Counter(pairs_of(dispatch))
    assert again.remote == ()
    assert [copy.request for copy in again.copies] == [RecordRequest(KEYS[0], "codes")]


def test_an_expert_that_the_store_lacks_is_named() -> None:
    routing = routing_of([[NUM_EXPERTS]], [[False]])
    with pytest.raises(ValueError, match=f"layer {LAYER} expert {NUM_EXPERTS} is not in the st"):
        plan(LAYER, routing, on_device=frozenset(), sizes=SIZES, policy=Policy("off"))


def test_padding_rows_alone_plan_nothing() -> None:
    routing = routing_of([[0], [1]], [[True], [True]], active=[False, False])
    dispatch = plan(LAYER, routing, on_device=frozenset(), sizes=SIZES, policy=Policy("off"))
    assert dispatch == DispatchPlan((), (), (), (), ())
