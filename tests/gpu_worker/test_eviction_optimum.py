"""Goal: the bound is one, and exact where it says so.

Method: the best choice among all choices, by search, on short random histories; no policy of the
worker's cache finds more than the bound.
"""

from __future__ import annotations

from functools import cache
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.types import ExpertKey, RecordKind, RecordRequest
from gpu_worker.eviction import CachePolicy, eviction_policy
from gpu_worker.eviction_optimum import best_counts
from gpu_worker.expert_cache import CacheBudgets
from gpu_worker.trace_turns import LayerTurn, Need, replay_turns


def turn(layer: int, experts: list[int], sizes: list[int], kind: RecordKind = "codes") -> LayerTurn:
    needs = [Need(RecordRequest(ExpertKey(layer, one), kind), sizes[one]) for one in experts]
    return LayerTurn(layer, tuple(needs), dict.fromkeys(experts, 1.0))


def found_bytes(turns: list[LayerTurn], budgets: CacheBudgets, *, in_part: bool) -> int:
    return sum(best_counts(turns, budgets, in_part=in_part).hit_bytes.values())


def searched_bytes(turns: list[LayerTurn], budget: int) -> int:
    """Bytes found by the best of all ways to keep or drop whole records."""
    needs = [need for one in turns for need in one.needs]

    @cache
    def best(place: int, kept: frozenset[Need]) -> int:
        if place == len(needs):
            return 0
        need = needs[place]
        found = need.num_bytes if need in kept else 0
        held = [*(kept | {need})]
        choices = (
            frozenset(one for i, one in enumerate(held) if mask >> i & 1)
            for mask in range(1 << len(held))
        )
        fitting = (kept for kept in choices if sum(one.num_bytes for one in kept) <= budget)
        return found + max(best(place + 1, kept) for kept in fitting)

    return best(0, frozenset())


_histories = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=150, deadline=None)
@given(_histories, st.lists(st.integers(1, 5), min_size=3, max_size=3), st.integers(0, 12))
def test_the_optimum_lies_between_whole_records_and_parts(
    history: list[tuple[int, list[int]]], sizes: list[int], budget: int
) -> None:
    turns = [turn(layer, sorted(experts), sizes) for layer, experts in history]
    budgets = CacheBudgets(budget)
    best = searched_bytes(turns, budget)
    assert found_bytes(turns, budgets, in_part=False) <= best
    assert best <= found_bytes(turns, budgets, in_part=True)


@settings(max_examples=150, deadline=None)
@given(_histories, st.integers(0, 4))
def test_it_is_exact_for_records_of_one_size(
    history: list[tuple[int, list[int]]], num_records: int
) -> None:
    turns = [turn(layer, sorted(experts), [3, 3, 3]) for layer, experts in history]
    best, budgets = searched_bytes(turns, 3 * num_records), CacheBudgets(3 * num_records)
    assert found_bytes(turns, budgets, in_part=False) == best
    assert found_bytes(turns, budgets, in_part=True) == best


_long = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True),
        st.sampled_from(["codes", "factors"]),
    ),
    min_size=1,
    max_size=60,
)


@pytest.mark.parametrize("policy", get_args(CachePolicy))
@settings(max_examples=60, deadline=None)
@given(
    _long,
    st.lists(st.integers(1, 9), min_size=5, max_size=5),
    st.integers(0, 60),
    st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_no_policy_finds_more_than_the_bound(
    policy: CachePolicy,
    history: list[tuple[int, list[int], RecordKind]],
    sizes: list[int],
    budget: int,
    share: float | None,
) -> None:
    turns = [turn(layer, sorted(experts), sizes, kind) for layer, experts, kind in history]
    budgets = CacheBudgets(budget, share)
    found = replay_turns(turns, budgets, eviction_policy(policy))
    bound = best_counts(turns, budgets, in_part=True)
    assert found.asked == bound.asked
    assert found.asked_bytes == bound.asked_bytes
    assert sum(found.hit_bytes.values()) <= sum(bound.hit_bytes.values())
    if share is not None:
        for kind in found.asked:
            assert found.hit_bytes[kind] <= bound.hit_bytes[kind]


def test_a_part_of_a_record_is_found_but_no_hit() -> None:
    turns = [turn(0, [0], [4]), turn(0, [0], [4])]
    bound = best_counts(turns, CacheBudgets(3), in_part=True)
    assert (bound.hits, bound.hit_bytes, bound.asked_bytes) == (
        {"codes": 0},
        {"codes": 3},
        {"codes": 8},
    )
    assert bound.hit_share() == bound.hit_share("codes") == 3 / 8
    assert bound.hit_share("factors") == 0.0
    assert best_counts(turns, CacheBudgets(3), in_part=False).hit_bytes == {"codes": 0}
