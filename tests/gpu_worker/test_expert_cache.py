"""Goal: the cache keeps to its budget, never evicts what is in use, and keeps what is most used.

Method: random operations against a naive list with the same rules, integrity checked after each;
then the books are falsified and the check must see it. Heat itself is tested in test_use_heat.py.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.types import Compensator, ExpertKey, RecordRequest, RepairForm
from gpu_worker.eviction import CachePolicy, Name, eviction_policy
from gpu_worker.expert_cache import CacheBudgets, ExpertCache
from gpu_worker.use_heat import KINDS, UseHeat
from kernels.types import GatedRepair, LowRank

_EMPTY = LowRank(torch.empty(0, dtype=torch.uint8), (), 64, 64, 3)
_FORM = RepairForm(3, "affine", ())
NAMES = [
    RecordRequest(ExpertKey(layer, expert), kind)
    for layer in range(2)
    for expert in range(3)
    for kind in ("codes", "factors")
]


def name(request: RecordRequest) -> Name:
    return request.key.layer, request.key.expert, request.kind


def cache_of(num_bytes: int) -> ExpertCache:
    return ExpertCache(CacheBudgets(num_bytes))


def record(request: RecordRequest, num_bytes: int = 1) -> Compensator:
    return Compensator(request.key, GatedRepair(_EMPTY, _EMPTY, _EMPTY), num_bytes, _FORM)


class NaiveCache:
    """The same rules over plain lists: request -> [bytes, pins]."""

    def __init__(self, budgets: CacheBudgets, policy: CachePolicy) -> None:
        self.budgets = budgets
        self.margin = eviction_policy(policy).margin
        self.rows: dict[RecordRequest, list[int]] = {}
        self.heat = UseHeat(eviction_policy(policy))

    def order(self, request: RecordRequest) -> tuple[float, Name]:
        return self.heat.of(name(request)), name(request)

    def pool(self, request: RecordRequest) -> tuple[list[RecordRequest], int]:
        """The records that share its budget, coldest first, and the budget."""
        ((kinds, budget),) = [
            pool for pool in self.budgets.pools().items() if request.kind in pool[0]
        ]
        return sorted((r for r in self.rows if r.kind in kinds), key=self.order), budget

    def put(self, request: RecordRequest, num_bytes: int) -> bool:
        self.heat.use(name(request))
        kept, budget = self.pool(request)
        limit = self.heat.of(name(request)) - self.margin
        idle = [r for r in kept if self.heat.of(name(r)) < limit and not self.rows[r][1]]
        evicted: list[RecordRequest] = []
        while sum(self.rows[r][0] for r in kept if r not in evicted) + num_bytes > budget:
            if not idle:
                return False
            evicted.append(idle.pop(0))
        self.rows = {r: row for r, row in self.rows.items() if r not in evicted}
        self.rows[request] = [num_bytes, 1]
        return True

    def shrink(self) -> None:
        for one in [NAMES[0], NAMES[1]]:
            kept, budget = self.pool(one)
            idle = [r for r in kept if not self.rows[r][1]]
            while idle and sum(self.rows[r][0] for r in self.pool(one)[0]) > budget:
                del self.rows[idle.pop(0)]


_budgets = st.builds(CacheBudgets, st.integers(0, 30), st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]))
_operations = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.sampled_from(NAMES), st.integers(0, 12)),
        st.tuples(st.just("unpin"), st.sampled_from(NAMES), st.just(0)),
        st.tuples(st.just("turns"), st.sampled_from(NAMES), st.integers(1, 20)),
        st.tuples(st.just("budgets"), _budgets, st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(get_args(CachePolicy)), _budgets, _operations)
def test_cache_does_what_the_naive_one_does(
    policy: CachePolicy, budgets: CacheBudgets, operations: list
) -> None:
    cache = ExpertCache(budgets, eviction_policy(policy))
    naive = NaiveCache(budgets, policy)
    for verb, what, number in operations:
        if verb == "budgets":
            naive.budgets = what
            naive.shrink()
            cache.set_budgets(what)
        elif verb == "turns":
            for _ in range(number):
                cache.begin_turn(what.key.layer)
                naive.heat.begin_turn(what.key.layer)
        elif verb == "unpin":
            row = naive.rows.get(what)
            if row is not None and row[1] > 0:
                row[1] -= 1
                naive.shrink()
                cache.unpin([what])
        elif what in naive.rows:
            naive.rows[what][1] += 1
            naive.heat.use(name(what))
            assert cache.pin(what).key == what.key
        else:
            kept = cache.put_pinned(what, record(what), number)
            assert kept is naive.put(what, number)
        cache.check_integrity()
        assert {one for one in NAMES if one in cache} == set(naive.rows)
        assert cache.used_bytes == sum(row[0] for row in naive.rows.values())
        for kind in KINDS:
            of_kind = [row[0] for r, row in naive.rows.items() if r.kind == kind]
            assert cache.used_bytes_of(kind) == sum(of_kind)
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
    """All records in every step, in a cache for half of them: LRU never finds one."""
    half = len(NAMES) // 2
    assert hits(cache_of(half), [NAMES] * 20) == 19 * half
    for_half = CacheBudgets(half)
    assert hits(ExpertCache(for_half, eviction_policy("lru")), [NAMES] * 20) == 0


def test_what_is_used_more_stays_and_what_was_used_long_ago_goes() -> None:
    cache = cache_of(1)
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
    cache = cache_of(0)
    assert not cache.put_pinned(NAMES[0], record(NAMES[0]), 1)
    assert len(cache) == 0
    cache.check_integrity(idle=True)


def test_a_record_in_use_is_not_evicted_for_another() -> None:
    cache = cache_of(10)
    assert cache.put_pinned(NAMES[0], record(NAMES[0]), 6)
    assert not cache.put_pinned(NAMES[1], record(NAMES[1]), 6)
    cache.unpin([NAMES[0]])
    age(cache)
    assert cache.put_pinned(NAMES[1], record(NAMES[1]), 6)
    assert NAMES[0] not in cache


def test_nothing_is_evicted_when_that_would_not_be_enough() -> None:
    cache = cache_of(10)
    for name in NAMES[:2]:
        cache.put_pinned(name, record(name), 5)
    cache.unpin([NAMES[0]])
    age(cache)
    assert not cache.put_pinned(NAMES[2], record(NAMES[2]), 6)
    assert NAMES[0] in cache


def test_integrity_names_what_does_not_balance() -> None:
    cache = cache_of(10)
    cache.put_pinned(NAMES[0], record(NAMES[0]), 4)
    with pytest.raises(AssertionError, match="1 pins while nothing runs"):
        cache.check_integrity(idle=True)
    cache._pools[0].used_bytes += 1
    with pytest.raises(AssertionError, match="hold 4 bytes, the count says 5, the budget is 10"):
        cache.check_integrity()
    cache._pools[0].used_bytes -= 1
    cache._by_layer[0].clear()
    with pytest.raises(AssertionError, match="0 in the index"):
        cache.check_integrity()
    cache._by_layer[0].add(NAMES[0])
    cache._held_by_layer[0] = frozenset()
    with pytest.raises(AssertionError, match="layer 0 is told as"):
        cache.check_integrity()


def test_each_kind_keeps_to_its_own_budget() -> None:
    cache = ExpertCache(CacheBudgets(10, 0.3))
    codes, factors = NAMES[0], NAMES[1]
    assert not cache.put_pinned(factors, record(factors), 4)
    assert cache.put_pinned(factors, record(factors), 3)
    assert not cache.put_pinned(codes, record(codes), 8)
    assert cache.put_pinned(codes, record(codes), 7)
    assert (cache.used_bytes_of("codes"), cache.used_bytes_of("factors")) == (7, 3)
    cache.check_integrity()
    cache._pools[1].used_bytes += 1
    with pytest.raises(AssertionError, match="1 records of factors hold 3 bytes, the count says 4"):
        cache.check_integrity()


def test_a_budget_moves_while_records_are_in_use() -> None:
    cache = ExpertCache(CacheBudgets(10, 0.5))
    codes, factors, other = NAMES[0], NAMES[1], NAMES[3]
    for request, num_bytes in ((codes, 5), (factors, 3), (other, 2)):
        assert cache.put_pinned(request, record(request), num_bytes)
    cache.unpin([other])
    cache.set_budgets(CacheBudgets(10, 0.0))
    assert (codes in cache, factors in cache, other in cache) == (True, True, False)
    cache.check_integrity()
    cache.unpin([factors])
    assert factors not in cache, "it had no budget any more, only a use"
    cache.unpin([codes])
    assert codes in cache
    cache.set_budgets(CacheBudgets(0))
    assert len(cache) == 0
    cache.check_integrity(idle=True)


def test_a_heavy_use_stays_and_a_light_one_goes_where_scores_count() -> None:
    cache = ExpertCache(CacheBudgets(1), eviction_policy("score"))
    assert cache.wants_scores
    heavy, light = NAMES[0], NAMES[2]
    for request, score in ((heavy, 0.9), (light, 0.2)):
        cache.begin_turn(0, {request.key.expert: score})
        if cache.put_pinned(request, record(request), 1):
            cache.unpin([request])
    assert heavy in cache
    cache.begin_turn(0, {light.key.expert: 1.5})
    assert cache.put_pinned(light, record(light), 1)
    assert heavy not in cache


FACTORS = ExpertKey(0, 0)


def blocks(count: int | None) -> RecordRequest:
    return RecordRequest(FACTORS, "factors", count)


def test_a_longer_prefix_takes_the_place_of_a_shorter_one() -> None:
    cache = cache_of(10)
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
    cache = cache_of(10)
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
    cache = cache_of(10)
    with pytest.raises(AssertionError, match="planned as on the device"):
        cache.pin(NAMES[0])
    cache.put_pinned(NAMES[0], record(NAMES[0]), 1)
    with pytest.raises(AssertionError, match="although it is on the device"):
        cache.put_pinned(NAMES[0], record(NAMES[0]), 1)
    cache.unpin([NAMES[0]])
    with pytest.raises(AssertionError, match="once more than it was pinned"):
        cache.unpin([NAMES[0]])
    with pytest.raises(ValueError, match="total_bytes: got -1"):
        CacheBudgets(-1)
    with pytest.raises(ValueError, match="factor_share: got 1.5"):
        CacheBudgets(1, 1.5)
