"""The experts kept on the device between steps: the records used most lately, under a budget.

Codes and factors are separate records, and a record is there in one length: a longer prefix of
factors takes a shorter one's place. Knows no file, no wire and not what a record is for.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

from expert_store.types import RecordRequest
from gpu_worker.expert_math import Record
from gpu_worker.use_heat import Name, UseHeat

ADMIT_OVER = 1.2
"""How much hotter than those it would evict a record must be to be kept."""


@dataclass(slots=True)
class _Slot:
    request: RecordRequest  # as it was fetched: how many blocks
    record: Record
    num_bytes: int
    num_pins: int


def _name(request: RecordRequest) -> Name:
    return request.key, request.kind


class ExpertCache:
    """At most `budget_bytes` of records on the device. Not thread-safe: the step's thread owns it.

    A record that came is kept only in the place of colder ones (`gpu_worker/use_heat.py`). Least
    recently used would be the worst choice: a step goes through the layers in a circle, and what it
    needs next is always what was used longest ago, so that a cache a little too small has no hit.

    A pinned record is in use and is not evicted. A budget of 0 keeps nothing; the step then holds
    its records itself and drops them.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes: got {budget_bytes}, expected 0 or more")
        self._budget_bytes = budget_bytes
        self._used_bytes = 0
        self._slots: dict[Name, _Slot] = {}
        self._heat = UseHeat()
        self._by_layer: dict[int, set[RecordRequest]] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, request: RecordRequest) -> bool:
        slot = self._slots.get(_name(request))
        return slot is not None and slot.request.covers(request)

    @property
    def budget_bytes(self) -> int:
        return self._budget_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def begin_turn(self, layer: int) -> None:
        """A step has come to this layer; uses of its records in earlier steps count less now."""
        self._heat.begin_turn(layer)

    def of_layer(self, layer: int) -> frozenset[RecordRequest]:
        """What is on the device for one layer, for planning."""
        return frozenset(self._by_layer.get(layer, ()))

    def pin(self, request: RecordRequest) -> Record:
        """The record, kept until `unpin`; a use of it. Of factors it may have more blocks."""
        slot = self._slots.get(_name(request))
        assert slot is not None, f"{request} was planned as on the device, but is not"
        assert slot.request.covers(request), f"{request} was planned, only {slot.request} is there"
        slot.num_pins += 1
        self._heat.use(_name(request))
        return slot.record

    def unpin(self, requests: Iterable[RecordRequest]) -> None:
        """End one use of each."""
        for request in requests:
            slot = self._slots[_name(request)]
            slot.num_pins -= 1
            assert slot.num_pins >= 0, f"{request} was unpinned once more than it was pinned"

    def put_pinned(self, request: RecordRequest, record: Record, num_bytes: int) -> bool:
        """Keep a record that just came and pin it; False when there is no place for it.

        Takes the place of its own shorter prefix, and then of records that are not pinned and
        colder; evicts none when that is not enough.
        """
        assert request not in self, f"{request} was copied although it is on the device"
        name = _name(request)
        self._heat.use(name)
        shorter = self._slots.get(name)
        if shorter is not None:
            assert shorter.num_pins == 0, f"{request} was copied while {shorter.request} is in use"
        victims = self._victims(name, num_bytes)
        if victims is None:
            return False
        for victim in victims:
            self._evict(victim)
        self._slots[name] = _Slot(request, record, num_bytes, num_pins=1)
        self._by_layer.setdefault(request.key.layer, set()).add(request)
        self._used_bytes += num_bytes
        self._heat.keep(name)
        return True

    def check_integrity(self, *, idle: bool = False) -> None:
        """AssertionError naming every term when the books do not balance; idle: nothing pinned."""
        held_bytes = sum(slot.num_bytes for slot in self._slots.values())
        indexed = set().union(*self._by_layer.values()) if self._by_layer else set()
        num_pins = sum(slot.num_pins for slot in self._slots.values())
        assert held_bytes == self._used_bytes <= self._budget_bytes, (
            f"expert cache: {len(self._slots)} records hold {held_bytes} bytes, the count says "
            f"{self._used_bytes}, the budget is {self._budget_bytes}"
        )
        held = {slot.request for slot in self._slots.values()}
        assert indexed == held, (
            f"expert cache: {len(self._slots)} records, but {len(indexed)} in the index by layer; "
            f"they differ in {sorted(map(str, indexed ^ held))}"
        )
        assert all(slot.num_pins >= 0 for slot in self._slots.values()), "negative pins"
        assert not idle or num_pins == 0, f"expert cache: {num_pins} pins while nothing runs"

    def _victims(self, name: Name, num_bytes: int) -> list[Name] | None:
        """What has to go for this record; None when it is not worth that, or does not fit."""
        victims, free_bytes = [], self._budget_bytes - self._used_bytes
        if name in self._slots:
            victims.append(name)
            free_bytes += self._slots[name].num_bytes
        if free_bytes >= num_bytes:
            return victims
        limit = self._heat.of(name) / ADMIT_OVER
        with closing(self._heat.coldest()) as coldest:
            for other in coldest:
                slot = self._slots[other]
                if self._heat.of(other) >= limit:
                    return None
                if slot.num_pins == 0 and other != name:
                    victims.append(other)
                    free_bytes += slot.num_bytes
                if free_bytes >= num_bytes:
                    return victims
        return None

    def _evict(self, name: Name) -> None:
        slot = self._slots.pop(name)
        self._heat.drop(name)
        self._by_layer[slot.request.key.layer].remove(slot.request)
        self._used_bytes -= slot.num_bytes
