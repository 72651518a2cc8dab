"""The experts kept on the device between steps: the records used most lately, under budgets.

Codes and factors are separate records, and a record is there in one length: a longer prefix of
factors takes a shorter one's place. Knows no file, no wire and not what a record is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from expert_store.types import RecordKind, RecordRequest
from gpu_worker.eviction import EvictionPolicy, Frequency, Name
from gpu_worker.expert_math import Record
from gpu_worker.use_heat import KINDS, UseHeat


@dataclass(frozen=True, slots=True)
class CacheBudgets:
    """Device bytes for records: `total_bytes`, of which factors have `factor_share` (0 to 1) and
    codes the rest. Without a share both compete for all of it, which finds more than a fixed share
    does (benchmarks/results/cache.md).

    Raises ValueError naming the field, what was given and what is allowed.
    """

    total_bytes: int
    factor_share: float | None = None

    def __post_init__(self) -> None:
        if self.total_bytes < 0:
            raise ValueError(f"total_bytes: got {self.total_bytes}, expected 0 or more")
        if self.factor_share is not None and not 0 <= self.factor_share <= 1:
            raise ValueError(f"factor_share: got {self.factor_share}, expected 0 to 1 or None")

    def pools(self) -> dict[tuple[RecordKind, ...], int]:
        """Kinds that share a budget -> its bytes."""
        if self.factor_share is None:
            return {KINDS: self.total_bytes}
        factors = int(self.total_bytes * self.factor_share)
        return {("codes",): self.total_bytes - factors, ("factors",): factors}


@dataclass(slots=True)
class _Slot:
    request: RecordRequest  # as it was fetched: how many blocks
    record: Record
    num_bytes: int
    num_pins: int


@dataclass(slots=True)
class _Pool:
    """A budget, the kinds of records that share it, and what they hold of it."""

    kinds: tuple[RecordKind, ...]
    budget_bytes: int
    used_bytes: int = 0


def _name(request: RecordRequest) -> Name:
    return request.key.layer, request.key.expert, request.kind


class ExpertCache:
    """Records on the device within budgets. Not thread-safe: the step's thread owns it.

    A record that came is kept only in the place of colder ones, by a policy of
    `gpu_worker/eviction.py` (unless given, that of a worker's default).

    A pinned record is in use and is not evicted. A budget of 0 keeps nothing; the step then holds
    its records itself and drops them.
    """

    def __init__(self, budgets: CacheBudgets, policy: EvictionPolicy | None = None) -> None:
        policy = Frequency() if policy is None else policy
        self.wants_scores = policy.wants_scores
        self._margin = policy.margin
        self._heat = UseHeat(policy)
        self._scores: Mapping[int, float] = {}
        self._slots: dict[Name, _Slot] = {}
        self._by_layer: dict[int, set[RecordRequest]] = {}
        self._held_by_layer: dict[int, frozenset[RecordRequest]] = {}
        self.set_budgets(budgets)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, request: RecordRequest) -> bool:
        slot = self._slots.get(_name(request))
        return slot is not None and slot.request.covers(request)

    @property
    def budgets(self) -> CacheBudgets:
        return self._budgets

    @property
    def used_bytes(self) -> int:
        """Of all budgets together."""
        return sum(pool.used_bytes for pool in self._pools)

    def used_bytes_of(self, kind: RecordKind) -> int:
        """Bytes of the records of one kind."""
        return sum(slot.num_bytes for name, slot in self._slots.items() if name[2] == kind)

    def set_budgets(self, budgets: CacheBudgets) -> None:
        """Other budgets from now on: the coldest of what no longer fits goes at once.

        What is pinned stays. Where that alone is over its budget it goes when it is unpinned.
        """
        self._budgets = budgets
        self._pools = [_Pool(kinds, num_bytes) for kinds, num_bytes in budgets.pools().items()]
        self._pool_of = {kind: pool for pool in self._pools for kind in pool.kinds}
        self._heat.set_groups(pool.kinds for pool in self._pools)
        for name, slot in self._slots.items():
            self._pool_of[name[2]].used_bytes += slot.num_bytes
        for pool in self._pools:
            self._shrink(pool)

    def begin_turn(self, layer: int, scores: Mapping[int, float] | None = None) -> None:
        """A step has come to this layer; uses of its records in earlier steps count less now.

        `scores` says by expert how much router weight the step's tokens gave it, for policies that
        want it; an expert that is not in it counts 1.
        """
        self._scores = scores or {}
        self._heat.begin_turn(layer)

    def of_layer(self, layer: int) -> frozenset[RecordRequest]:
        """What is on the device for one layer, for planning."""
        held = self._held_by_layer.get(layer)
        if held is None:
            held = self._held_by_layer[layer] = frozenset(self._by_layer.get(layer, ()))
        return held

    def pin(self, request: RecordRequest) -> Record:
        """The record, kept until `unpin`; a use of it. Of factors it may have more blocks."""
        name = _name(request)
        slot = self._slots.get(name)
        assert slot is not None, f"{request} was planned as on the device, but is not"
        assert slot.request.covers(request), f"{request} was planned, only {slot.request} is there"
        slot.num_pins += 1
        self._use(name)
        return slot.record

    def unpin(self, requests: Iterable[RecordRequest]) -> None:
        """End one use of each."""
        for request in requests:
            slot = self._slots[_name(request)]
            slot.num_pins -= 1
            assert slot.num_pins >= 0, f"{request} was unpinned once more than it was pinned"
        for pool in self._pools:
            self._shrink(pool)

    def put_pinned(self, request: RecordRequest, record: Record, num_bytes: int) -> bool:
        """Keep a record that just came and pin it; False when there is no place for it.

        Takes the place of its own shorter prefix, and then of records that are not pinned and
        colder; evicts none when that is not enough.
        """
        name = _name(request)
        self._use(name)
        shorter = self._slots.get(name)
        if shorter is not None:
            assert not shorter.request.covers(request), (
                f"{request} was copied although it is on the device"
            )
            assert shorter.num_pins == 0, f"{request} was copied while {shorter.request} is in use"
        victims = self._victims(name, num_bytes)
        if victims is None:
            return False
        for victim in victims:
            self._evict(victim)
        self._slots[name] = _Slot(request, record, num_bytes, num_pins=1)
        self._by_layer.setdefault(request.key.layer, set()).add(request)
        self._held_by_layer.pop(request.key.layer, None)
        self._pool_of[request.kind].used_bytes += num_bytes
        self._heat.keep(name)
        return True

    def check_integrity(self, *, idle: bool = False) -> None:
        """AssertionError naming every term when the books do not balance; idle: nothing pinned."""
        for pool in self._pools:
            slots = [slot for name, slot in self._slots.items() if name[2] in pool.kinds]
            held_bytes = sum(slot.num_bytes for slot in slots)
            pinned_bytes = sum(slot.num_bytes for slot in slots if slot.num_pins)
            limit = max(pool.budget_bytes, pinned_bytes)
            assert held_bytes == pool.used_bytes <= limit, (
                f"expert cache: {len(slots)} records of {' and '.join(pool.kinds)} hold "
                f"{held_bytes} bytes, the count says {pool.used_bytes}, the budget is "
                f"{pool.budget_bytes}, {pinned_bytes} are pinned"
            )
        indexed = set().union(*self._by_layer.values()) if self._by_layer else set()
        num_pins = sum(slot.num_pins for slot in self._slots.values())
        held = {slot.request for slot in self._slots.values()}
        assert indexed == held, (
            f"expert cache: {len(self._slots)} records, but {len(indexed)} in the index by layer; "
            f"they differ in {sorted(map(str, indexed ^ held))}"
        )
        for layer, told in self._held_by_layer.items():
            there = self._by_layer.get(layer, set())
            assert told == there, f"expert cache: layer {layer} is told as {told}, holds {there}"
        assert all(slot.num_pins >= 0 for slot in self._slots.values()), "negative pins"
        assert not idle or num_pins == 0, f"expert cache: {num_pins} pins while nothing runs"

    def _use(self, name: Name) -> None:
        self._heat.use(name, self._scores.get(name[1], 1.0))

    def _victims(self, name: Name, num_bytes: int) -> list[Name] | None:
        """What has to go for this record; None when it is not worth that, or does not fit."""
        pool = self._pool_of[name[2]]
        victims, free_bytes = [], pool.budget_bytes - pool.used_bytes
        if name in self._slots:
            victims.append(name)
            free_bytes += self._slots[name].num_bytes
        if free_bytes >= num_bytes:
            return victims
        if num_bytes > pool.budget_bytes:
            return None
        limit = self._heat.of(name) - self._margin
        colder = self._coldest(pool, num_bytes - free_bytes, limit, besides=name)
        return None if colder is None else victims + colder

    def _shrink(self, pool: _Pool) -> None:
        """Evict the coldest, pinned ones aside, until the pool is within its budget."""
        if pool.used_bytes > pool.budget_bytes:
            excess = pool.used_bytes - pool.budget_bytes
            for name in self._coldest(pool, excess, math.inf) or self._unpinned(pool):
                self._evict(name)

    def _unpinned(self, pool: _Pool) -> list[Name]:
        return [
            name
            for name, slot in self._slots.items()
            if name[2] in pool.kinds and not slot.num_pins
        ]

    def _coldest(
        self, pool: _Pool, num_bytes: int, limit: float, besides: Name | None = None
    ) -> list[Name] | None:
        """The coldest records of a pool that are not pinned and together have `num_bytes`; None
        when those below `limit` have less."""
        looked_at, found = [], []
        while num_bytes > 0 and (name := self._heat.pop_colder(pool.kinds[0], limit)) is not None:
            looked_at.append(name)
            slot = self._slots[name]
            if slot.num_pins == 0 and name != besides:
                found.append(name)
                num_bytes -= slot.num_bytes
        self._heat.put_back(looked_at)
        return found if num_bytes <= 0 else None

    def _evict(self, name: Name) -> None:
        slot = self._slots.pop(name)
        self._heat.drop(name)
        self._by_layer[name[0]].remove(slot.request)
        self._held_by_layer.pop(name[0], None)
        self._pool_of[name[2]].used_bytes -= slot.num_bytes
