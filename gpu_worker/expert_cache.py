"""The experts kept on the device between steps: records under a byte budget, LRU.

Codes and factors are separate records, and a record is there in one length: a longer prefix of
factors takes a shorter one's place. Knows no file, no wire and not what a record is for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from expert_store.types import ExpertKey, RecordKind, RecordRequest
from gpu_worker.expert_math import Record


@dataclass(slots=True)
class _Slot:
    request: RecordRequest  # as it was fetched: how many blocks
    record: Record
    num_bytes: int
    num_pins: int


_Name = tuple[ExpertKey, RecordKind]


def _name(request: RecordRequest) -> _Name:
    return request.key, request.kind


class ExpertCache:
    """At most `budget_bytes` of records on the device. Not thread-safe: the step's thread owns it.

    A pinned record is in use and is not evicted. A budget of 0 keeps nothing; the step then holds
    its records itself and drops them.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes: got {budget_bytes}, expected 0 or more")
        self._budget_bytes = budget_bytes
        self._used_bytes = 0
        self._slots: OrderedDict[_Name, _Slot] = OrderedDict()
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

    def of_layer(self, layer: int) -> frozenset[RecordRequest]:
        """What is on the device for one layer, for planning."""
        return frozenset(self._by_layer.get(layer, ()))

    def pin(self, request: RecordRequest) -> Record:
        """The record, most recently used from now on, and kept until `unpin`.

        Of factors it may have more blocks than asked for.
        """
        slot = self._slots.get(_name(request))
        assert slot is not None, f"{request} was planned as on the device, but is not"
        assert slot.request.covers(request), f"{request} was planned, only {slot.request} is there"
        slot.num_pins += 1
        self._slots.move_to_end(_name(request))
        return slot.record

    def unpin(self, requests: Iterable[RecordRequest]) -> None:
        """End one use of each."""
        for request in requests:
            slot = self._slots[_name(request)]
            slot.num_pins -= 1
            assert slot.num_pins >= 0, f"{request} was unpinned once more than it was pinned"

    def put_pinned(self, request: RecordRequest, record: Record, num_bytes: int) -> bool:
        """Keep a record that just came and pin it; False when it does not fit beside those in use.

        Evicts the record's own shorter prefix, and then the least recently used records that are
        not pinned; none when that is not enough.
        """
        assert request not in self, f"{request} was copied although it is on the device"
        victims, free_bytes = [], self._budget_bytes - self._used_bytes
        shorter = self._slots.get(_name(request))
        if shorter is not None:
            assert shorter.num_pins == 0, f"{request} was copied while {shorter.request} is in use"
            victims.append(_name(request))
            free_bytes += shorter.num_bytes
        for name, slot in self._slots.items():
            if free_bytes >= num_bytes:
                break
            if slot.num_pins == 0 and slot is not shorter:
                victims.append(name)
                free_bytes += slot.num_bytes
        if free_bytes < num_bytes:
            return False
        for name in victims:
            self._evict(name)
        self._slots[_name(request)] = _Slot(request, record, num_bytes, num_pins=1)
        self._by_layer.setdefault(request.key.layer, set()).add(request)
        self._used_bytes += num_bytes
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

    def _evict(self, name: _Name) -> None:
        slot = self._slots.pop(name)
        self._by_layer[slot.request.key.layer].remove(slot.request)
        self._used_bytes -= slot.num_bytes
