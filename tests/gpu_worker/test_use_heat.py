"""Goal: heat is the decayed count of uses, and kept records come coldest first.

Method: random uses and turns against plain arithmetic with exact halves; numbers that would
overflow.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.types import ExpertKey
from gpu_worker.use_heat import MAX_ENTRIES_PER_RECORD, Name, UseHeat

NAMES: list[Name] = [
    (ExpertKey(layer, expert), kind)
    for layer in range(2)
    for expert in range(2)
    for kind in ("codes", "factors")
]
_operations = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.sampled_from([0, 1])),
        st.tuples(st.sampled_from(["use", "keep", "drop"]), st.sampled_from(NAMES)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(_operations)
def test_heat_is_the_decayed_count_of_uses(operations: list) -> None:
    heat, plain, kept = UseHeat(half_life=1.0), dict.fromkeys(NAMES, 0.0), set()
    for verb, what in operations:
        if verb == "turn":
            heat.begin_turn(what)
            for name in NAMES:
                plain[name] *= 0.5 if name[0].layer == what else 1.0
        elif verb == "use":
            heat.use(what)
            plain[what] += 1.0
        elif (verb == "keep") is (what not in kept):
            getattr(heat, verb)(what)
            (kept.add if verb == "keep" else kept.remove)(what)
        assert {name: heat.of(name) for name in NAMES} == plain
        expected = sorted(kept, key=lambda name: (plain[name], name))
        assert list(heat.coldest()) == expected
        assert list(heat.coldest()) == expected, "asking changes nothing"


def test_asking_for_some_of_the_coldest_changes_nothing() -> None:
    heat = UseHeat()
    for uses, name in enumerate(NAMES):
        heat.keep(name)
        for _ in range(uses):
            heat.use(name)
    coldest = heat.coldest()
    assert [next(coldest), next(coldest)] == NAMES[:2]
    coldest.close()
    assert list(heat.coldest()) == NAMES


def test_a_record_that_comes_back_is_there_once() -> None:
    heat = UseHeat()
    for _ in range(3):
        heat.keep(NAMES[0])
        heat.use(NAMES[0])
        heat.drop(NAMES[0])
    heat.keep(NAMES[0])
    heat.drop(NAMES[0])
    heat.keep(NAMES[0])
    assert list(heat.coldest()) == list(heat.coldest()) == [NAMES[0]]


def test_uses_leave_nothing_behind() -> None:
    """While everything fits nobody asks for the coldest, for millions of uses."""
    heat = UseHeat()
    for name in NAMES:
        heat.keep(name)
    for _ in range(1000):
        for name in NAMES:
            heat.use(name)
    entries = sum(len(heap) for heap in heat._heaps.values())
    assert entries <= MAX_ENTRIES_PER_RECORD * len(NAMES)
    assert list(heat.coldest()) == NAMES


@pytest.mark.parametrize("half_life", [0.25, 1.0, 16.0])
def test_a_long_life_overflows_nothing(half_life: float) -> None:
    """A layer that has many turns, and one that has none, keep their order."""
    heat = UseHeat(half_life)
    often, once, elsewhere = NAMES[0], NAMES[1], NAMES[4]
    for name in (often, once, elsewhere):
        heat.keep(name)
        heat.use(name)
    for _ in range(40_000):
        heat.begin_turn(0)
        heat.use(often)
    assert heat.of(often) == pytest.approx(1 / (1 - 0.5 ** (1 / half_life)), rel=1e-6)
    assert heat.of(once) == pytest.approx(0.0, abs=1e-9)
    assert list(heat.coldest()) == [once, elsewhere, often]
