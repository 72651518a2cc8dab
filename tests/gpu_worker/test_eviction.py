"""Goal: each policy's mark says what its description says. Method: short histories by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.eviction import CachePolicy, EvictionPolicy, Frequency, eviction_policy


def after(policy: EvictionPolicy, uses: list[tuple[int, float]]) -> float:
    mark = None
    for now, score in uses:
        mark = policy.mark(mark, now, score)
    assert mark is not None
    return mark


@pytest.mark.parametrize("name", get_args(CachePolicy))
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(1e-3, 8.0)), min_size=2, max_size=20).map(
        lambda uses: sorted(uses, key=lambda use: use[0])
    )
)
def test_a_mark_never_falls(name: CachePolicy, uses: list[tuple[int, float]]) -> None:
    """What the heaps of `UseHeat` rest on."""
    policy, mark = eviction_policy(name), -math.inf
    for count in range(1, len(uses) + 1):
        before, mark = mark, after(policy, uses[:count])
        assert mark >= before


def test_lru_knows_only_the_last_use_and_keeps_whatever_comes() -> None:
    for name in ("lru", "layer_lru"):
        policy = eviction_policy(name)  # type: ignore[arg-type]
        assert after(policy, [(1, 1.0), (2, 1.0), (7, 0.1)]) == after(policy, [(7, 1.0)]) == 7.0
        assert policy.margin == 0.0
    assert eviction_policy("lru").counts_uses
    assert not eviction_policy("layer_lru").counts_uses


def test_a_use_one_half_life_ago_is_worth_half_a_use_now() -> None:
    policy = Frequency(half_life=4.0)
    twice = after(policy, [(0, 1.0), (0, 1.0)])
    assert twice == pytest.approx(after(policy, [(4, 1.0)]))
    assert after(policy, [(0, 1.0), (4, 1.0)]) == pytest.approx(4 + 4 * math.log2(1.5))
    assert policy.margin == pytest.approx(4 * math.log2(policy.admit_over))


def test_uses_of_another_age_add_nothing_and_break_nothing() -> None:
    assert after(Frequency(half_life=1.0), [(0, 1.0), (100_000, 1.0)]) == 100_000


def test_score_counts_router_weight_and_lfu_does_not() -> None:
    score, lfu = eviction_policy("score"), eviction_policy("lfu")
    heavy, light = [(3, 0.75), (9, 0.75)], [(3, 0.25), (9, 0.25)]
    assert after(lfu, heavy) == after(lfu, light)
    assert after(score, heavy) - after(score, light) == pytest.approx(16 * math.log2(3))
    assert math.isfinite(after(score, [(3, 0.0)]))


def test_another_name_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="cache_policy: got 'mru', expected one of lfu, score"):
        eviction_policy("mru")  # type: ignore[arg-type]
