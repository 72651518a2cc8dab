"""Goal: the memory tier grows when someone waits for it and shrinks when calm; heat is no size.

Method: arithmetic spelled out, decisions along a hand-made clock, and properties.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling_decision import Delays, Memory
from cluster.autoscaling_memory import (
    Extent,
    MemoryLoad,
    MemoryTargets,
    decide_memory,
)

FRESH = (Memory(), Memory())
AT_ONCE = Delays(0, 0, 0)
TARGETS = MemoryTargets(use=0.5, wait=0.1, calm_margin=1.0)


def load(link=(), ndp=(), link_wait=0.0, ndp_wait=0.0, most=9) -> MemoryLoad:
    return MemoryLoad(
        Extent(len(link), 1, most), Extent(len(ndp), 0, most), link, ndp, link_wait, ndp_wait
    )


def decide(given: MemoryLoad, memory=FRESH, now_s=0.0, delays=AT_ONCE):
    if memory is FRESH and delays is AT_ONCE:
        # The first decision takes nothing away: what runs counts as wanted until then.
        memory = decide_memory(given, FRESH, now_s - 1, targets=TARGETS, delays=delays).memory
    return decide_memory(given, memory, now_s, targets=TARGETS, delays=delays)


def test_a_saturated_link_that_someone_waits_for_gets_another_copy() -> None:
    # Two links, 90 % each, are 1.8 links' worth of bytes: 3.6 at half use.
    assert decide(load(link=(0.9, 0.9), link_wait=0.4)).store == 4
    assert decide(load(link=(0.9, 0.9), link_wait=0.05)).store == 2  # nobody waits
    assert decide(load(link=(0.9, 0.9), link_wait=0.4, most=3)).store == 3


def test_near_data_is_decided_by_its_own_use() -> None:
    decision = decide(load(link=(0.1,), ndp=(1.0, 0.8), ndp_wait=0.5))
    assert (decision.store, decision.ndp) == (1, 4)
    assert decide(load(link=(0.1,), ndp=(0.0, 0.0))).ndp == 0


def test_a_hot_node_is_no_reason_for_more_than_the_mean_needs() -> None:
    hot = load(link=(0.9, 0.2, 0.1, 0.0), link_wait=0.4)
    decision = decide(hot)
    assert decision.store == 3  # 1.2 links' worth, at half use


def test_down_only_after_calm() -> None:
    delays = Delays(up_s=0, calm_s=10, zero_s=10)
    busy, memory = load(link=(0.9, 0.9), link_wait=0.4), FRESH
    first = decide(busy, memory, 0.0, delays)
    assert first.store == 4
    memory, seen = first.memory, []
    for second in range(1, 14):
        quiet = load(link=(0.1, 0.1, 0.1, 0.1))
        step = decide(quiet, memory, float(second), delays)
        memory = step.memory
        seen.append(step.store)
    assert seen == [4] * 10 + [1] * 3


def test_nothing_known_changes_nothing() -> None:
    unknown = dataclasses.replace(load(), store=Extent(3, 1, 9), ndp=Extent(2, 0, 9))
    decision = decide(unknown)
    assert (decision.store, decision.ndp) == (3, 2)


shares = st.lists(st.floats(0, 1), min_size=1, max_size=8).map(tuple)


@given(shares, shares, st.floats(0, 1), st.floats(0, 1), st.integers(1, 12))
def test_within_limits_and_enough_for_who_waits(link, ndp, link_wait, ndp_wait, most) -> None:
    given = load(link, ndp, link_wait, ndp_wait, most)
    decision = decide(given)
    assert 1 <= decision.store <= most
    assert 0 <= decision.ndp <= most
    if link_wait > TARGETS.wait:
        assert decision.store == most or sum(link) / decision.store <= TARGETS.use + 1e-6


def test_nonsense_is_refused() -> None:
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="shares: got"):
            load(link=(wrong,))
    with pytest.raises(ValueError, match="expected 0 <= least <= most"):
        Extent(1, 3, 2)
    for change in ({"use": 0}, {"wait": 2}, {"calm_margin": True}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: got"):
            MemoryTargets(**change)
