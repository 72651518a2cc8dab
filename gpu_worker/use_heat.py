"""How much each record was used lately: what the expert cache keeps records by.

Knows no bytes and no budget. A layer has its turns, one a step, and time is counted in them.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator

from expert_store.types import ExpertKey, RecordKind

Name = tuple[ExpertKey, RecordKind]
"""A record, whatever its length."""
_Entry = tuple[float, Name]

HALF_LIFE = 16.0
"""Turns of its layer after which a use counts half."""
MAX_ENTRIES_PER_RECORD = 8
_RESCALE_AFTER = 256  # half-lives; a float holds four times as many


class UseHeat:
    """Every use adds 1, which halves in `half_life` turns of the record's layer.

    Numbers are kept scaled by 2^(turns / half-life): a turn then changes none of them, and those of
    the records that are kept stay in a heap, layer by layer.
    """

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._half_life = half_life
        self._turns: dict[int, int] = {}
        self._scaled: dict[Name, float] = {}
        self._kept: dict[int, set[Name]] = {}
        self._heaps: dict[int, list[_Entry]] = {}

    def begin_turn(self, layer: int) -> None:
        """A step has come to this layer."""
        turns = self._turns.get(layer, 0) + 1
        self._turns[layer] = turns
        if turns >= _RESCALE_AFTER * self._half_life:
            self._rescale(layer)

    def use(self, name: Name) -> None:
        """One use, now, whether the record is kept or not."""
        self._scaled[name] = self._scaled.get(name, 0.0) + self._unit(name[0].layer)
        if name in self._kept.get(name[0].layer, ()):
            self._push(name)

    def of(self, name: Name) -> float:
        """Uses of a record, those of long ago counting less."""
        return self._scaled.get(name, 0.0) / self._unit(name[0].layer)

    def keep(self, name: Name) -> None:
        """The record is kept from now on, and among those that `coldest` gives."""
        self._kept.setdefault(name[0].layer, set()).add(name)
        self._push(name)

    def drop(self, name: Name) -> None:
        """It is kept no more; its heat stays known."""
        self._kept[name[0].layer].remove(name)

    def coldest(self) -> Generator[Name, None, None]:
        """The kept records by rising heat; of equal ones the first by layer, expert and kind.

        To be closed, or run to its end, before anything else is called.
        """
        given: set[_Entry] = set()
        try:
            while (layer := self._coldest_layer()) is not None:
                entry = heapq.heappop(self._heaps[layer])
                if entry not in given:  # dropped and kept again, a record is there twice
                    given.add(entry)
                    yield entry[1]
        finally:
            for entry in given:
                heapq.heappush(self._heaps[entry[1][0].layer], entry)

    def _coldest_layer(self) -> int | None:
        """The layer whose heap has the coldest record at its top; None when all are empty."""
        tops = []
        for layer, heap in self._heaps.items():
            while heap and not self._is_current(heap[0]):
                heapq.heappop(heap)
            if heap:
                tops.append((heap[0][0] / self._unit(layer), layer))
        return min(tops)[1] if tops else None

    def _is_current(self, entry: _Entry) -> bool:
        """Whether the record is kept and was not used since; a later entry stands for it then."""
        scaled, name = entry
        return name in self._kept[name[0].layer] and self._scaled[name] == scaled

    def _push(self, name: Name) -> None:
        layer = name[0].layer
        heap = self._heaps.setdefault(layer, [])
        heapq.heappush(heap, (self._scaled.setdefault(name, 0.0), name))
        # Every use leaves an entry behind, which nobody removes while nothing is evicted.
        if len(heap) > MAX_ENTRIES_PER_RECORD * len(self._kept[layer]):
            self._rebuild(layer)

    def _rebuild(self, layer: int) -> None:
        self._heaps[layer] = [(self._scaled[name], name) for name in self._kept[layer]]
        heapq.heapify(self._heaps[layer])

    def _unit(self, layer: int) -> float:
        """What a use counts now."""
        return float(2.0 ** (self._turns.get(layer, 0) / self._half_life))

    def _rescale(self, layer: int) -> None:
        """Count the layer's turns from here, before its numbers grow too large."""
        unit = self._unit(layer)
        self._turns[layer] = 0
        for name in [name for name in self._scaled if name[0].layer == layer]:
            self._scaled[name] /= unit
        if layer in self._kept:
            self._rebuild(layer)
