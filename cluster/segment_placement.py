"""Which node holds which records: a pure function of sizes, nodes, heat and the placement before.

Every record has its copies on different nodes, hot experts more where memory is left, and what is
there stays there as far as it can. Knows no Ray; the result does not depend on the inputs' order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from cluster.near_data_shares import share_near_data
from cluster.segment_layout import Item, Layout
from cluster.segments import (
    ExpertSize,
    MemoryNode,
    Movement,
    NodeSegment,
    Record,
    SegmentError,
    SegmentRules,
    Segments,
)
from expert_store.types import ExpertKey

KEEP_HOT = 0.5
"""A further copy that is there stays until it is wanted half as much as one that is made: heat that
wavers would else move bytes back and forth."""


def place_segments(
    sizes: Sequence[ExpertSize],
    nodes: Sequence[MemoryNode],
    *,
    rules: SegmentRules | None = None,
    heat: Mapping[ExpertKey, float] | None = None,
    before: Segments | None = None,
) -> Segments:
    """What every node is to hold, and the experts it is to run near the data.

    `heat` are uses of each expert over some time, in any unit; None is the same for all. `before`
    is kept as far as it can be: what nodes that left held is copied again, a newcomer gets its
    share, nothing else moves. When room is so scarce that this does not go, all is placed anew.

    Raises SegmentError when the records do not fit, ValueError for nodes or heat that make no
    sense.
    """
    rules = rules or SegmentRules()
    nodes = sorted(nodes, key=lambda node: node.node_id)
    _check(sizes, nodes, heat)
    if not nodes:
        raise SegmentError("the records do not fit: there is no memory node. Add memory nodes")
    items = _items(sizes, rules, len(nodes), heat)
    _check_room(items, nodes)
    there = _there(items, nodes, before)
    layout = _repair(items, nodes, there, before) if before and before.nodes else None
    layout = layout or _fresh(items, nodes, with_hot=True) or _fresh(items, nodes, with_hot=False)
    if layout is None:
        raise _no_arrangement(items, nodes)
    required = [
        set(sorted(holders)[: item.copies] if len(holders) > item.copies else holders)
        for item, holders in zip(items, layout.holders, strict=True)
    ]
    _add_hot(layout, there)
    shares = share_near_data(layout, before)
    movement = _movement(layout, required, there, before)
    return Segments(_segments(layout, shares), movement)


def _fresh(items: Sequence[Item], nodes: Sequence[MemoryNode], *, with_hot: bool) -> Layout | None:
    """The copies that must be, and at the same time those of hot experts, which lies most evenly
    but may leave too little room; None then.
    """
    layout = Layout(items, nodes)
    for item in range(len(items)):
        if not _add_required(layout, item):
            return None
        if with_hot:
            _add_wanted(layout, item)
    return layout


def _repair(
    items: Sequence[Item],
    nodes: Sequence[MemoryNode],
    there: Sequence[frozenset[int]],
    before: Segments,
) -> Layout | None:
    """The copies that must be, on top of those that are there; None where they find no room."""
    layout = Layout(items, nodes)
    for item, nodes_there in enumerate(there):
        for _ in range(items[item].copies):
            node = layout.emptiest(item, sorted(nodes_there))
            if node is not None:
                layout.add(item, node)
    for item in range(len(items)):
        if not _add_required(layout, item):
            return None
    layout.fill([n for n, node in enumerate(nodes) if node.node_id not in before.nodes])
    return layout


def _add_required(layout: Layout, item: int) -> bool:
    while len(layout.holders[item]) < layout.items[item].copies:
        node = layout.emptiest(item)
        if node is None:
            node = layout.make_room(item)
        if node is None:
            return False
        layout.add(item, node)
    return True


def _add_wanted(layout: Layout, item: int) -> None:
    while len(layout.holders[item]) < layout.items[item].wanted:
        node = layout.coolest(item)
        if node is None:
            return
        layout.add(item, node)


def _add_hot(layout: Layout, there: Sequence[frozenset[int]]) -> None:
    """Further copies of hot experts, as far as there is room; first those that are there."""
    for item, hot in enumerate(layout.items):
        for node in sorted(there[item] - layout.holders[item]):
            if len(layout.holders[item]) < hot.kept and layout.fits(item, node):
                layout.add(item, node)
    for item in range(len(layout.items)):
        _add_wanted(layout, item)


def _segments(layout: Layout, shares: Sequence[set[ExpertKey]]) -> dict[str, NodeSegment]:
    found = {}
    for number, node in enumerate(layout.nodes):
        records = [layout.items[item].record for item in layout.loads[number].items]
        found[node.node_id] = NodeSegment(
            codes=frozenset(record.key for record in records if record.kind == "codes"),
            factors=frozenset(record.key for record in records if record.kind == "factors"),
            near_data=frozenset(shares[number]),
        )
    return found


def _movement(
    layout: Layout,
    required: Sequence[set[int]],
    there: Sequence[frozenset[int]],
    before: Segments | None,
) -> Movement:
    moved = hot = lost = 0
    for number, item in enumerate(layout.items):
        new = layout.holders[number] - there[number]
        moved += item.num_bytes * len(new & required[number])
        hot += item.num_bytes * len(new - required[number])
        lost += item.num_bytes * max(0, item.copies - len(there[number]))
    known = before.nodes if before is not None else {}
    share = sum(
        layout.targets[number]
        for number, node in enumerate(layout.nodes)
        if node.node_id not in known
    )
    return Movement(moved, max(lost, round(share)), hot)


def _items(
    sizes: Sequence[ExpertSize],
    rules: SegmentRules,
    num_nodes: int,
    heat: Mapping[ExpertKey, float] | None,
) -> list[Item]:
    """All records, the hottest first: who comes first has the widest choice."""
    if heat is None or not any(heat.values()):
        heat = {size.key: 1.0 for size in sizes}
    copies = min(rules.codes_copies, num_nodes)
    factors_copies = min(rules.factors_copies, num_nodes)
    limit = rules.hot_ratio * sum(heat.values()) / max(copies * len(sizes), 1)
    items = []
    for size in sizes:
        warm = heat.get(size.key, 0.0)
        wanted, kept = (
            min(num_nodes, max(copies, math.ceil(warm / most)))
            for most in (limit, KEEP_HOT * limit)
        )
        record = Record(size.key, "codes")
        items.append(Item(record, size.codes_bytes, copies, wanted, kept, warm / wanted))
        if size.factors_bytes:
            record, same = Record(size.key, "factors"), factors_copies
            items.append(Item(record, size.factors_bytes, same, same, same, 0.0))
    return sorted(items, key=lambda item: (-item.copy_heat, -item.num_bytes, item.record))


def _there(
    items: Sequence[Item], nodes: Sequence[MemoryNode], before: Segments | None
) -> list[frozenset[int]]:
    """For each item the nodes that hold it already."""
    held: dict[Record, list[int]] = {}
    if before is not None:
        for number, node in enumerate(nodes):
            for record in before.nodes.get(node.node_id, NodeSegment()).records:
                held.setdefault(record, []).append(number)
    return [frozenset(held.get(item.record, ())) for item in items]


def _check(
    sizes: Sequence[ExpertSize],
    nodes: Sequence[MemoryNode],
    heat: Mapping[ExpertKey, float] | None,
) -> None:
    names = [node.node_id for node in nodes]
    if len(set(names)) < len(names):
        twice = next(a for a, b in itertools.pairwise(names) if a == b)
        raise ValueError(f"nodes: {twice} is there twice, expected every node once")
    keys = {size.key for size in sizes}
    if len(keys) < len(sizes):
        raise ValueError(f"sizes: {len(sizes)} of {len(keys)} experts, expected each expert once")
    for key, value in (heat or {}).items():
        if key not in keys:
            raise ValueError(f"heat: {key} is not among the {len(keys)} experts to place")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"heat of {key}: got {value}, expected a number from 0")


def _check_room(items: Sequence[Item], nodes: Sequence[MemoryNode]) -> None:
    whole = sum(item.num_bytes for item in items)
    wanted = sum(item.num_bytes * item.copies for item in items)
    # A second copy on the same node would be none: more room than one of each is of no use.
    room = sum(min(node.room_bytes, whole) for node in nodes)
    if wanted > room:
        raise SegmentError(
            f"the records do not fit: their copies take {wanted} bytes (one of each: {whole}), and "
            f"{len(nodes)} nodes have room for {room}: {wanted - room} are missing. Add memory "
            "nodes, give them more room (store.node_bytes), or lower store.copies"
        )


def _no_arrangement(items: Sequence[Item], nodes: Sequence[MemoryNode]) -> SegmentError:
    wanted = sum(item.num_bytes * item.copies for item in items)
    room = sum(node.room_bytes for node in nodes)
    largest = max(item.num_bytes for item in items)
    return SegmentError(
        f"the records find no room: {wanted} bytes of copies in {room} bytes of {len(nodes)} nodes "
        f"leave too little play for records of up to {largest} bytes. Add a memory node, or give "
        f"each node some such records more room (store.node_bytes)"
    )
