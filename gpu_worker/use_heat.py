"""How much each record was used lately, and which of the kept ones least: asked on every miss.

Knows no bytes and no budget. A layer has its turns, one a step; a policy makes marks of uses.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator, Iterable, Sequence

from expert_store.types import RecordKind
from gpu_worker.eviction import EvictionPolicy, Name

_Entry = tuple[float, Name]
KINDS: tuple[RecordKind, ...] = ("codes", "factors")


class _Order:
    """The kept records of one kind: a heap per layer, and the least heat of each.

    Every kept record has one entry, with its mark when it was last looked at. Marks only rise, so
    an entry never stands behind its place, a use need not touch the heap, and the top is right as
    soon as its entry is. `floors` are at most the heats of their layers' coldest records.
    """

    def __init__(self) -> None:
        self.heaps: list[list[_Entry]] = []  # by layer
        self.floors: list[float] = []  # by layer; inf where nothing is kept
        self.queued: set[Name] = set()  # who has an entry, kept or not
        self.kept: set[Name] = set()

    def ensure(self, layer: int) -> None:
        while len(self.heaps) <= layer:
            self.heaps.append([])
            self.floors.append(math.inf)


class UseHeat:
    """Heat is the policy's mark, counted from the clock of the record's layer, in turns."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._clocks: list[int] = []  # by layer; turns, or 0 where time is the number of uses
        self._num_uses = 0
        self._marks: dict[Name, float] = {}
        self._orders = {kind: _Order() for kind in KINDS}

    def begin_turn(self, layer: int) -> None:
        """A step has come to this layer; uses of its records in earlier turns count less now."""
        self._ensure(layer)
        if self._policy.counts_uses:
            return
        self._clocks[layer] += 1
        for order in self._orders.values():
            self._settle(order, layer)

    def use(self, name: Name, score: float = 1.0) -> None:
        """One use, now, whether the record is kept or not."""
        self._num_uses += 1
        layer = name[0]
        if layer >= len(self._clocks):
            self._ensure(layer)
        now = self._num_uses if self._policy.counts_uses else self._clocks[layer]
        self._marks[name] = self._policy.mark(self._marks.get(name), now, score)

    def of(self, name: Name) -> float:
        """-inf for a record that was never used."""
        mark = self._marks.get(name)
        return -math.inf if mark is None else mark - self._clocks[name[0]]

    def keep(self, name: Name) -> None:
        """The record is kept from now on, and among those that `coldest` gives."""
        layer, _, kind = name
        self._ensure(layer)
        order = self._orders[kind]
        order.kept.add(name)
        if name not in order.queued:
            order.queued.add(name)
            mark = self._marks.setdefault(name, -math.inf)
            heapq.heappush(order.heaps[layer], (mark, name))
            self._settle(order, layer)

    def drop(self, name: Name) -> None:
        """It is kept no more; its heat stays known."""
        self._orders[name[2]].kept.remove(name)

    def floor(self, kinds: Iterable[RecordKind]) -> float:
        """No kept record of these kinds is colder; inf when none is kept."""
        return min(min(self._orders[kind].floors, default=math.inf) for kind in kinds)

    def coldest(self, kinds: Sequence[RecordKind] = KINDS) -> Generator[Name, None, None]:
        """The kept records by rising heat; of equal ones the first by kind, layer and expert.

        To be closed, or run to its end, before anything else is called.
        """
        given: list[_Entry] = []
        try:
            while (entry := self._pop(kinds)) is not None:
                given.append(entry)
                yield entry[1]
        finally:
            for entry in given:
                layer, _, kind = entry[1]
                heapq.heappush(self._orders[kind].heaps[layer], entry)
                self._settle(self._orders[kind], layer)

    def _pop(self, kinds: Sequence[RecordKind]) -> _Entry | None:
        """Take the coldest entry out, putting those on its way there right."""
        while (floor := self.floor(kinds)) < math.inf:
            order = next(order for kind in kinds if floor in (order := self._orders[kind]).floors)
            layer = order.floors.index(floor)
            heap = order.heaps[layer]
            mark, name = heap[0]
            if name not in order.kept:
                heapq.heappop(heap)
                order.queued.remove(name)
            elif mark < self._marks[name]:
                heapq.heapreplace(heap, (self._marks[name], name))
            else:
                heapq.heappop(heap)
                self._settle(order, layer)
                return mark, name
            self._settle(order, layer)
        return None

    def _settle(self, order: _Order, layer: int) -> None:
        heap = order.heaps[layer]
        order.floors[layer] = heap[0][0] - self._clocks[layer] if heap else math.inf

    def _ensure(self, layer: int) -> None:
        while len(self._clocks) <= layer:
            self._clocks.append(0)
        for order in self._orders.values():
            order.ensure(layer)
