"""Goal: the cache keeps to its budget, never evicts what is in use, and keeps what is most used.

Method: random operations against a naive list with the same rules, integrity checked after each;
then the books are falsified and the check must see it. Heat itself is tested in test_use_heat.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.types import Compensator, ExpertKey, RecordRequest, RepairForm
from gpu_worker.expert_cache import ADMIT_OVER, ExpertCache
from gpu_worker.use_heat import UseHeat
from kernels.types import GatedRepair, LowRank

_EMPTY = LowRank(torch.empty(0, dtype=torch.uint8), (), 64, 64, 3)
_FORM = RepairForm(3, "affine", ())
NAMES = [
    RecordRequest(ExpertKey(layer, expert), kind)
    for layer in range(2)
    for expert in range(3)
    for kind in ("codes", "factors")
]


def record(request: RecordRequest, num_bytes: int = 1) -> Compensator:
    return Compensator(request.key, GatedRepair(_EMPTY, _EMPTY, _EMPTY), num_bytes, _FORM)


class NaiveCache:
    """The same rules over plain lists: request -> [bytes, pins]."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.rows: dict[RecordRequest, list[int]] = {}
        self.heat = UseHeat()

    def hot(self, request: RecordRequest) -> float:
        return self.heat.of((request.key, request.kind))

    def use(self, request: RecordRequest) -> None:
        self.heat.use((request.key, request.kind))

    def put(self, request: RecordRequest, num_bytes: int) -> bool:
        self.use(request)
        kept = dict(self.rows)
        colder = [r for r, row in kept.items() if self.hot(r) < self.hot(request) / ADMIT_OVER]
        idle = [r for r in colder if not kept[r][1]]
        idle.sort(key=lambda r: (self.hot(r), r.key, r.kind))
        while sum(row[0] for row in kept.values()) + num_bytes > self.budget:
            if not idle:
                return False
            del kept[idle.pop(0)]
        self.rows = {**kept, request: [num_bytes, 1]}
        return True


_operations = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.sampled_from(NAMES), st.integers(0, 12)),
        st.tuples(st.just("unpin"), st.sampled_from(NAMES), st.just(0)),
        st.tuples(st.just("turns"), st.sampled_from(NAMES), st.integers(1, 20)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 30), _operations)
def test_cache_does_what_the_naive_one_does(budget: int, operations: list) -> None:
    cache, naive = ExpertCache(budget), NaiveCache(budget)
    for verb, request, number in operations:
        row = naive.rows.get(request)
        if verb == "turns":
            for _ in range(number):
                cache.begin_turn(request.key.layer)
                naive.heat.begin_turn(request.key.layer)
        elif verb == "unpin":
            if row is not None and row[1] > 0:
                row[1] -= 1
                cache.unpin([request])
        elif row is not None:
            row[1] += 1
            naive.use(request)
            assert cache.pin(request).key == request.key
        else:
            kept = cache.put_pinned(request, record(request), number)
            assert kept is naive.put(request, number)
        cache.check_integrity()
        assert {name for name in NAMES if name in cache} == set(naive.rows)
        assert cache.used_bytes == sum(row[0] for row in naive.rows.values())
        for layer in range(2):
            expected = {request for request in naive.rows if request.key.layer == layer}
            assert cache.of_layer(layer) == expected


def hits(cache: ExpertCache, steps: list[list[RecordRequest]]) -> int:
    """Play steps, each through the layers in order; how many records were there when needed."""
    found = 0
    for step in steps:
        for layer in sorted({request.key.layer for request in step}):
            cache.begin_turn(layer)
            for request in (r for r in step if r.key.layer == layer):
                if request in cache:
                    found += 1
                    cache.pin(request)
                    cache.unpin([request])
                elif cache.put_pinned(request, record(request), 1):
                    cache.unpin([request])
    return found


def test_a_circle_that_does_not_fit_still_hits_what_does() -> None:
    """All records in every step, in a cache for half of them: LRU would never find one."""
    half = len(NAMES) // 2
    assert hits(ExpertCache(half), [NAMES] * 20) == 19 * half


def test_what_is_used_more_stays_and_what_was_used_long_ago_goes() -> None:
    cache = ExpertCache(1)
    old, new = NAMES[0], NAMES[4]
    assert hits(cache, [[old]] * 5) == 4
    assert hits(cache, [[new]]) == 0
    assert old in cache, "used five times as much"
    hits(cache, [[new]] * 40)
    assert new in cache
    assert old not in cache


def age(cache: ExpertCache) -> None:
    """So many turns that nothing which was used is hot any more."""
    for layer in range(2):
        for _ in range(200):
            cache.begin_turn(layer)


def test_a_budget_of_zero_keeps_nothing() -> None:
    cache = ExpertCache(0)
    assert not cache.put_pinned(NAMES[0], record(NAMES[0]), 1)
    assert len(cache) == 0
    cache.check_integrity(idle=True)


def test_a_record_in_use_is_not_evicted_for_another() -> None:
    cache = ExpertCache(10)
    assert cache.put_pinned(NAMES[0], record(NAMES[0]), 6)
    assert not cache.put_pinned(NAMES[1], record(NAMES[1]), 6)
    cache.unpin([NAMES[0]])
    age(cache)
    assert cache.put_pinned(NAMES[1], record(NAMES[1]), 6)
    assert NAMES[0] not in cache


def test_nothing_is_evicted_when_that_would_not_be_enough() -> None:
    cache = ExpertCache(10)
    for name in NAMES[:2]:
        cache.put_pinned(name, record(name), 5)
    cache.unpin([NAMES[0]])
    age(cache)
    assert not cache.put_pinned(NAMES[2], record(NAMES[2]), 6)
    assert NAMES[0] in cache


def test_integrity_names_what_does_not_balance() -> None:
    cache = ExpertCache(10)
    cache.put_pinned(NAMES[0], record(NAMES[0]), 4)
    with pytest.raises(AssertionError, match="1 pins while nothing runs"):
        cache.check_integrity(idle=True)
    cache._used_bytes += 1
    with pytest.raises(AssertionError, match="hold 4 bytes, the count says 5, the budget is 10"):
        cache.check_integrity()
    cache._used_bytes -= 1
    cache._by_layer[0].clear()
    with pytest.raises(AssertionError, match="0 in the index"):
        cache.check_integrity()


FACTORS = ExpertKey(0, 0)


def blocks(count: int | None) -> RecordRequest:
    return RecordRequest(FACTORS, "factors", count)


def test_a_longer_prefix_takes_the_place_of_a_shorter_one() -> None:
    cache = ExpertCache(10)
    cache.put_pinned(blocks(2), record(blocks(2)), 4)
    cache.unpin([blocks(2)])
    assert blocks(2) in cache
    assert blocks(1) in cache
    assert blocks(3) not in cache
    assert blocks(None) not in cache
    with pytest.raises(AssertionError, match="num_blocks=3.* was planned, only .*num_blocks=2"):
        cache.pin(blocks(3))
    longer = record(blocks(3))
    assert cache.put_pinned(blocks(3), longer, 6)
    assert (cache.of_layer(0), cache.used_bytes, len(cache)) == ({blocks(3)}, 6, 1)
    # A read of fewer blocks finds it too; pins of either length count together.
    assert cache.pin(blocks(1)) is longer
    cache.unpin([blocks(3), blocks(1)])
    cache.check_integrity(idle=True)


def test_a_prefix_that_does_not_fit_leaves_the_shorter_one() -> None:
    cache = ExpertCache(10)
    cache.put_pinned(NAMES[2], record(NAMES[2]), 5)
    cache.put_pinned(blocks(2), record(blocks(2)), 4)
    cache.unpin([blocks(2)])
    assert not cache.put_pinned(blocks(None), record(blocks(None)), 6)
    assert cache.of_layer(0) == {NAMES[2], blocks(2)}
    cache.unpin([NAMES[2]])
    age(cache)
    assert cache.put_pinned(blocks(None), record(blocks(None)), 6)
    assert cache.of_layer(0) == {blocks(None)}
    cache.check_integrity()


def test_misuse_is_an_assertion() -> None:
    cache = ExpertCache(10)
    with pytest.raises(AssertionError, match="planned as on the device"):
        cache.pin(NAMES[0])
    cache.put_pinned(NAMES[0], record(NAMES[0]), 1)
    with pytest.raises(AssertionError, match="although it is on the device"):
        cache.put_pinned(NAMES[0], record(NAMES[0]), 1)
    cache.unpin([NAMES[0]])
    with pytest.raises(AssertionError, match="once more than it was pinned"):
        cache.unpin([NAMES[0]])
    with pytest.raises(ValueError, match="budget_bytes: got -1"):
        ExpertCache(-1)
