"""Goal: heat is the policy's mark by the record's clock, and kept records come coldest first.

Method: random uses and turns against plain arithmetic, under every policy; then what the heaps
leave behind.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.types import RecordKind
from gpu_worker.eviction import Frequency, Name, Recency
from gpu_worker.use_heat import KINDS, UseHeat

NAMES: list[Name] = [
    (layer, expert, kind) for layer in range(2) for expert in range(2) for kind in KINDS
]
_operations = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.sampled_from([0, 1])),
        st.tuples(st.sampled_from(["use", "keep", "drop"]), st.sampled_from(NAMES)),
    ),
    max_size=40,
)


def rank(heats: dict[Name, float], names: set[Name]) -> list[Name]:
    """By rising heat; of equal ones by layer, expert and kind."""
    return sorted(names, key=lambda name: (heats[name], name))


def coldest(heat: UseHeat, kind: RecordKind = "codes", limit: float = math.inf) -> list[Name]:
    """All of one group, put back afterwards."""
    found = []
    while (name := heat.pop_colder(kind, limit)) is not None:
        found.append(name)
    heat.put_back(found)
    return found


@settings(max_examples=300, deadline=None)
@given(_operations)
def test_a_use_counts_half_after_a_half_life(operations: list) -> None:
    """Sums of halves are exact in floating point, so the order must be that of the plain sums."""
    heat, kept = UseHeat(Frequency(half_life=1.0)), set()
    plain = dict.fromkeys(NAMES, 0.0)
    for verb, what in operations:
        if verb == "turn":
            heat.begin_turn(what)
            for name in NAMES:
                plain[name] *= 0.5 if name[0] == what else 1.0
        elif verb == "use":
            heat.use(what)
            plain[what] += 1.0
        elif (verb == "keep") is (what not in kept):
            getattr(heat, verb)(what)
            (kept.add if verb == "keep" else kept.remove)(what)
        for name in NAMES:
            expected = math.log2(plain[name]) if plain[name] else -math.inf
            assert heat.of(name) == pytest.approx(expected, abs=1e-9)
        found = coldest(heat)
        assert set(found) == kept
        told = [plain[name] for name in found]
        assert all(a <= b * (1 + 1e-9) for a, b in zip(told, told[1:], strict=False))
        assert coldest(heat) == found, "asking changes nothing"


@settings(max_examples=300, deadline=None)
@given(_operations, st.booleans())
def test_the_latest_use_counts_alone(operations: list, counts_uses: bool) -> None:
    heat, kept = UseHeat(Recency(counts_uses)), set()
    turns, uses, last = [0, 0], 0, dict.fromkeys(NAMES, -math.inf)
    for verb, what in operations:
        if verb == "turn":
            heat.begin_turn(what)
            turns[what] += 1
        elif verb == "use":
            heat.use(what)
            uses += 1
            last[what] = uses if counts_uses else turns[what[0]]
        elif (verb == "keep") is (what not in kept):
            getattr(heat, verb)(what)
            (kept.add if verb == "keep" else kept.remove)(what)
        heats = {n: at - (0 if counts_uses else turns[n[0]]) for n, at in last.items()}
        assert {name: heat.of(name) for name in NAMES} == heats
        assert coldest(heat) == rank(heats, kept)
        for limit in (-3.0, 0.0, 2.0):
            below = {name for name in kept if heats[name] < limit}
            assert coldest(heat, limit=limit) == rank(heats, below)
        heat.set_groups((kind,) for kind in KINDS)
        for kind in KINDS:
            expected = {name for name in kept if name[2] == kind}
            assert coldest(heat, kind) == rank(heats, expected)
        heat.set_groups([KINDS])


def test_asking_for_some_of_the_coldest_changes_nothing() -> None:
    heat = UseHeat(Frequency())
    order = rank(dict.fromkeys(NAMES, 0.0), set(NAMES))
    for uses, name in enumerate(order):
        heat.keep(name)
        for _ in range(uses):
            heat.use(name)
    taken = [heat.pop_colder("codes", math.inf), heat.pop_colder("factors", math.inf)]
    assert taken == order[:2]
    assert coldest(heat) == order[2:], "what was taken out is not given twice"
    heat.put_back(order[:2])
    assert coldest(heat) == order


def test_a_record_that_comes_back_is_there_once() -> None:
    heat = UseHeat(Frequency())
    for _ in range(3):
        heat.keep(NAMES[0])
        heat.use(NAMES[0])
        heat.drop(NAMES[0])
    heat.keep(NAMES[0])
    heat.drop(NAMES[0])
    heat.keep(NAMES[0])
    assert coldest(heat) == coldest(heat) == [NAMES[0]]


def test_a_record_has_one_entry_however_often_it_is_used() -> None:
    """While everything fits nobody asks for the coldest, for millions of uses."""
    heat = UseHeat(Frequency())
    for _ in range(100):
        for name in NAMES:
            heat.keep(name)
            heat.use(name)
            heat.drop(name)
    for name in NAMES:
        heat.keep(name)
    entries = [len(heap) for heap in heat._groups[0].heaps]
    assert sum(entries) == len(NAMES)


@pytest.mark.parametrize("half_life", [0.25, 1.0, 16.0])
def test_a_long_life_overflows_nothing(half_life: float) -> None:
    """A layer that has many turns, and one that has none, keep their order."""
    heat = UseHeat(Frequency(half_life))
    often, once, elsewhere = (0, 0, "codes"), (0, 1, "codes"), (1, 0, "codes")
    for name in (often, once, elsewhere):
        heat.keep(name)
        heat.use(name)
    for _ in range(40_000):
        heat.begin_turn(0)
        heat.use(often)
    often_used = 1 / (1 - 0.5 ** (1 / half_life))
    assert heat.of(often) == pytest.approx(half_life * math.log2(often_used), abs=1e-6)
    assert heat.of(once) == pytest.approx(-40_000)
    assert coldest(heat) == [once, elsewhere, often]
