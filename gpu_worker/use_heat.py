"""How much each record was used lately, and which of the kept ones least: asked on every miss.

Knows no bytes and no budget. A layer has its turns, one a step; a policy makes marks of uses.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from expert_store.types import RecordKind
from gpu_worker.eviction import EvictionPolicy, Name

_Entry = tuple[float, Name]
KINDS: tuple[RecordKind, ...] = ("codes", "factors")


class _Group:
    """Kept records that are compared with one another: a heap per layer, and the least heat of it.

    Every kept record has one entry, with its mark when it was last looked at. Marks only rise, so
    an entry never stands behind its place, a use need not touch the heap, and the top is right as
    soon as its own entry is. `floors` are at most the heats of their layers' coldest records.
    """

    __slots__ = ("floors", "heaps", "queued")

    def __init__(self) -> None:
        self.heaps: list[list[_Entry]] = []  # by layer
        self.floors: list[float] = []  # by layer; inf where nothing is kept
        self.queued: set[Name] = set()  # who has an entry, whether still kept or not

    def ensure(self, num_layers: int) -> None:
        while len(self.heaps) < num_layers:
            self.heaps.append([])
            self.floors.append(math.inf)


class UseHeat:
    """Heat is the policy's mark, counted from the clock of the record's layer, in turns.

    Records are compared within groups of kinds; at first all are one group.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._clocks: list[int] = []  # by layer; turns, or 0 where time is the number of uses
        self._num_uses = 0
        self._marks: dict[Name, float] = {}
        self._kept: set[Name] = set()
        self.set_groups([KINDS])

    def set_groups(self, groups: Iterable[tuple[RecordKind, ...]]) -> None:
        """Compare the kept records within these groups of kinds from now on."""
        self._group_of: dict[RecordKind, _Group] = {}
        self._groups: list[_Group] = []
        for kinds in groups:
            self._groups.append(_Group())
            self._group_of |= dict.fromkeys(kinds, self._groups[-1])
        self._ensure(len(self._clocks))
        self.put_back(self._kept)

    def begin_turn(self, layer: int) -> None:
        """A step has come to this layer; uses of its records in earlier turns count less now."""
        self._ensure(layer + 1)
        if self._policy.counts_uses:
            return
        self._clocks[layer] += 1
        for group in self._groups:
            self._settle(group, layer)

    def use(self, name: Name, score: float = 1.0) -> None:
        """One use, now, whether the record is kept or not."""
        layer = name[0]
        if layer >= len(self._clocks):
            self._ensure(layer + 1)
        self._num_uses += 1
        now = self._num_uses if self._policy.counts_uses else self._clocks[layer]
        self._marks[name] = self._policy.mark(self._marks.get(name), now, score)

    def of(self, name: Name) -> float:
        """-inf for a record that was never used."""
        mark = self._marks.get(name)
        return -math.inf if mark is None else mark - self._clocks[name[0]]

    def keep(self, name: Name) -> None:
        """The record is kept from now on, and among those that `pop_colder` gives."""
        self._kept.add(name)
        self.put_back((name,))

    def drop(self, name: Name) -> None:
        """It is kept no more; its heat stays known."""
        self._kept.remove(name)

    def pop_colder(self, kind: RecordKind, limit: float) -> Name | None:
        """Take out the coldest kept record of this kind's group, if its heat is below `limit`.

        Of equal ones the first by layer, expert and kind. It is given no more until `put_back`.
        """
        group = self._group_of[kind]
        floors = group.floors
        while floors and (floor := min(floors)) < limit:
            layer = floors.index(floor)
            heap = group.heaps[layer]
            mark, name = heap[0]
            current = self._marks[name]
            if name in self._kept and mark < current:
                heapq.heapreplace(heap, (current, name))
                self._settle(group, layer)
                continue
            heapq.heappop(heap)
            group.queued.remove(name)
            self._settle(group, layer)
            if name in self._kept:
                return name
        return None

    def put_back(self, names: Iterable[Name]) -> None:
        """Records that were taken out are again among those that `pop_colder` gives."""
        for name in names:
            layer, _, kind = name
            group = self._group_of[kind]
            if name in self._kept and name not in group.queued:
                self._ensure(layer + 1)
                group.queued.add(name)
                mark = self._marks.setdefault(name, -math.inf)
                heapq.heappush(group.heaps[layer], (mark, name))
                self._settle(group, layer)

    def _settle(self, group: _Group, layer: int) -> None:
        heap = group.heaps[layer]
        group.floors[layer] = heap[0][0] - self._clocks[layer] if heap else math.inf

    def _ensure(self, num_layers: int) -> None:
        """Layers are numbered from 0; those in between that have no experts cost a number each."""
        while len(self._clocks) < num_layers:
            self._clocks.append(0)
        for group in self._groups:
            group.ensure(num_layers)
