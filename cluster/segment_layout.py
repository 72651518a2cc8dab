"""Copies of records on nodes while a placement is made: loads, who fits, moves that make room.

Owns the arithmetic of bytes and heat; `cluster/segment_placement.py` says in which order. Nodes and
items are numbered here, in an order that does not depend on the caller's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from cluster.segments import MemoryNode, Record

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: Fibonacci hashing
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Item:
    """A record to place: its bytes, copies that must be, copies that its heat is worth and up to
    which those that are there stay (at least as many each), and how much each of these is used.
    """

    record: Record
    num_bytes: int
    copies: int
    wanted: int
    kept: int
    copy_heat: float


@dataclass(slots=True)
class _Load:
    """What one node has taken on."""

    items: set[int] = field(default_factory=set)
    num_bytes: int = 0
    heat: float = 0.0
    layer_heat: dict[int, float] = field(default_factory=dict)

    def warm(self, layer: int, heat: float) -> None:
        self.heat += heat
        self.layer_heat[layer] = self.layer_heat.get(layer, 0.0) + heat


class Layout:
    """Copies of `items` on `nodes`, both sorted by the caller. No node ever holds more than fits.

    `targets` are the bytes that each node should hold, of the copies that must be.
    """

    def __init__(self, items: Sequence[Item], nodes: Sequence[MemoryNode]) -> None:
        self.items, self.nodes = items, nodes
        self.holders: list[set[int]] = [set() for _ in items]
        self.loads = [_Load() for _ in nodes]
        self.targets = fair_shares(items, nodes)
        self._item_seeds = [zlib.crc32(repr(item.record).encode()) for item in items]
        self._node_seeds = [zlib.crc32(node.node_id.encode()) << 32 for node in nodes]
        # Nodes this close to one another in bytes are told apart by heat.
        self._window = max((item.num_bytes for item in items), default=0)

    def add(self, item: int, node: int) -> None:
        """One more copy. It must fit and not be there yet."""
        assert node not in self.holders[item], (item, node)
        self.holders[item].add(node)
        load = self.loads[node]
        load.items.add(item)
        load.num_bytes += self.items[item].num_bytes
        load.warm(self.layer_of(item), self.items[item].copy_heat)
        assert load.num_bytes <= self.nodes[node].room_bytes, (load, self.nodes[node])

    def remove(self, item: int, node: int) -> None:
        """One copy less."""
        self.holders[item].remove(node)
        load = self.loads[node]
        load.items.remove(item)
        load.num_bytes -= self.items[item].num_bytes
        load.warm(self.layer_of(item), -self.items[item].copy_heat)

    def fits(self, item: int, node: int) -> bool:
        """Whether a node has room for an item that it does not hold."""
        has_room = self.items[item].num_bytes <= self.room_bytes(node)
        return has_room and node not in self.holders[item]

    def room_bytes(self, node: int) -> int:
        """What is left of a node's room."""
        return self.nodes[node].room_bytes - self.loads[node].num_bytes

    def fullness(self, node: int) -> float:
        """Bytes against the node's target; 1 is what it should hold."""
        return self.loads[node].num_bytes / max(self.targets[node], 1)

    def layer_of(self, item: int) -> int:
        """The decoder layer of a record's expert."""
        return self.items[item].record.key.layer

    def warmth(self, item: int, node: int) -> tuple[float, float, int, int]:
        """How much a node has to read already, against its link, to compare nodes by: in the item's
        layer, then in all. A step reads layer by layer, and waits for the busiest node of each.
        """
        load, link = self.loads[node], self.nodes[node].link_bytes_s
        of_layer = load.layer_heat.get(self.layer_of(item), 0.0)
        return of_layer / link, load.heat / link, self._draw(item, node), node

    def emptiest(self, item: int, among: Iterable[int] | None = None) -> int | None:
        """The node for one more copy: the least full one; of those about as full the coolest."""
        nodes = range(len(self.nodes)) if among is None else among
        fitting = [node for node in nodes if self.fits(item, node)]
        if not fitting:
            return None
        least = min(map(self.fullness, fitting))
        near = [
            node
            for node in fitting
            if self.loads[node].num_bytes <= least * self.targets[node] + self._window
        ]
        return min(near, key=partial(self.warmth, item))

    def coolest(self, item: int) -> int | None:
        """The node with the least heat against its link among those with room for the item."""
        fitting = [node for node in range(len(self.nodes)) if self.fits(item, node)]
        return min(fitting, key=partial(self.warmth, item), default=None)

    def make_room(self, item: int) -> int | None:
        """Move one other copy away so that `item` fits on a node, which is given; None if none can.

        Of the moves that do, one of the fewest bytes.
        """
        best: tuple[int, int, int, int] | None = None
        for node, load in enumerate(self.loads):
            if node in self.holders[item]:
                continue
            missing = self.items[item].num_bytes - self.room_bytes(node)
            for other in load.items:
                size = self.items[other].num_bytes
                if size < missing or (best is not None and size >= best[0]):
                    continue
                to = self.emptiest(other)
                if to is not None:
                    best = size, other, node, to
        if best is None:
            return None
        _, other, node, to = best
        self.remove(other, node)
        self.add(other, to)
        return node

    def fill(self, newcomers: Sequence[int]) -> None:
        """Move copies from the fullest other nodes to newcomers until those have their share."""
        for newcomer in newcomers:
            others = [node for node in range(len(self.nodes)) if node not in newcomers]
            queues = {node: self._by_heat(node, newcomer) for node in others}
            while self._take(newcomer, queues):
                pass

    def _take(self, newcomer: int, queues: dict[int, list[int]]) -> bool:
        """One copy for a newcomer; False when it has its share or no other node has too much."""
        over = [node for node, queue in queues.items() if queue and self.fullness(node) > 1]
        if not over:
            return False
        donor = max(over, key=lambda node: (self.fullness(node), node))
        load = self.loads[newcomer]
        total_heat = sum(each.heat for each in self.loads)
        total_bytes = sum(each.num_bytes for each in self.loads)
        is_cool = load.heat * total_bytes <= load.num_bytes * total_heat
        item = queues[donor].pop(0 if is_cool else -1)
        size = self.items[item].num_bytes
        if load.num_bytes + size / 2 > self.targets[newcomer]:
            # Another item may be smaller; this one is not asked about again.
            return True
        if self.fits(item, newcomer) and donor in self.holders[item]:
            self.remove(item, donor)
            self.add(item, newcomer)
        return True

    def _by_heat(self, node: int, newcomer: int) -> list[int]:
        """What a node holds and the newcomer does not, hottest first."""
        held = [item for item in self.loads[node].items if newcomer not in self.holders[item]]
        return sorted(held, key=lambda item: (-self.items[item].copy_heat, item))

    def _draw(self, item: int, node: int) -> int:
        """A lot that decides between equals. By their numbers, nodes would hold the same records in
        pairs, and all that one of a pair did would fall to the other when it is lost.
        """
        return (((self._item_seeds[item] | self._node_seeds[node]) * _GOLDEN) & _MASK) >> 32


def fair_shares(items: Sequence[Item], nodes: Sequence[MemoryNode]) -> list[float]:
    """The bytes that each node should hold: by its room, at most one copy of everything."""
    whole = sum(item.num_bytes for item in items)
    left = float(sum(item.num_bytes * item.copies for item in items))
    shares = [0.0] * len(nodes)
    open_nodes = [node for node, each in enumerate(nodes) if each.room_bytes]
    while open_nodes:
        room = sum(nodes[node].room_bytes for node in open_nodes)
        full = [n for n in open_nodes if left * nodes[n].room_bytes / room >= whole]
        if not full:
            for node in open_nodes:
                shares[node] = left * nodes[node].room_bytes / room
            return shares
        for node in full:
            shares[node] = float(whole)
        left = max(0.0, left - whole * len(full))
        open_nodes = [node for node in open_nodes if node not in full]
    return shares
