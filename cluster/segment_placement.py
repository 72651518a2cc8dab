"""Which node holds which records: a pure function of sizes, nodes, heat and the placement before.

Every record has its copies on different nodes, hot experts more where memory is left, and what is
there stays there as far as it can. Knows no Ray; the result does not depend on the inputs' order.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

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
KEEP_RUNNER = 0.8
"""An expert is run elsewhere when that node, with it, would have less than so much of the work of
the one that runs it: another set of experts costs a worker a restart."""
MAX_SHARE_ROUNDS = 4


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
    items = _items(sizes, rules, len(nodes), heat)
    _check_room(items, nodes)
    there = _there(items, nodes, before)
    layout = _attempt(items, nodes, there, before) or _attempt(items, nodes, None, None)
    if layout is None:
        raise _no_arrangement(items, nodes)
    required = [set(holders) for holders in layout.holders]
    _add_hot(layout, there, rules.hot_ratio)
    shares = _share_near_data(layout, before)
    movement = _movement(layout, required, there, before)
    return Segments(_segments(layout, shares), movement)


def _attempt(
    items: Sequence[Item],
    nodes: Sequence[MemoryNode],
    there: Sequence[frozenset[int]] | None,
    before: Segments | None,
) -> Layout | None:
    """The copies that must be, on top of those that are there; None where they find no room."""
    layout = Layout(items, nodes)
    if there is not None:
        for item, nodes_there in enumerate(there):
            for _ in range(items[item].copies):
                node = layout.emptiest(item, sorted(nodes_there))
                if node is not None:
                    layout.add(item, node)
    for item, wanted in enumerate(items):
        while len(layout.holders[item]) < wanted.copies:
            to = layout.emptiest(item)
            if to is None:
                to = layout.make_room(item)
            if to is None:
                return None
            layout.add(item, to)
    if before is not None and before.nodes:
        layout.fill([n for n, node in enumerate(nodes) if node.node_id not in before.nodes])
    return layout


def _add_hot(layout: Layout, there: Sequence[frozenset[int]], hot_ratio: float) -> None:
    """Further copies of codes, where each copy would else be used too much; kept ones first."""
    codes = [i for i, item in enumerate(layout.items) if item.record.kind == "codes"]
    copies = sum(layout.items[i].copies for i in codes)
    limit = hot_ratio * sum(layout.items[i].heat for i in codes) / max(copies, 1)
    for item in codes:
        for node in sorted(there[item] - layout.holders[item]):
            if _per_copy(layout, item) > KEEP_HOT * limit and layout.fits(item, node):
                layout.add(item, node)
    wanted = [(-_per_copy(layout, item), item) for item in codes]
    heapq.heapify(wanted)
    while wanted and -wanted[0][0] > limit:
        item = wanted[0][1]
        coolest = layout.coolest(item)
        if coolest is None:
            heapq.heappop(wanted)
            continue
        layout.add(item, coolest)
        heapq.heapreplace(wanted, (-_per_copy(layout, item), item))


def _per_copy(layout: Layout, item: int) -> float:
    return layout.items[item].heat / len(layout.holders[item])


def _share_near_data(layout: Layout, before: Segments | None) -> list[set[ExpertKey]]:
    """Which node runs which expert: one of its holders each, work spread by the nodes' cores.

    Work is heat times bytes: a use reads the codes once. The biggest goes first, to whoever would
    be done earliest; then each may go over to another of its holders that would be done much
    earlier. Who ran an expert before goes on with it unless that is so.
    """
    work = [0.0] * len(layout.nodes)
    ran = _ran(layout, before)
    runner = dict(ran)

    def cost(item: int) -> float:
        return layout.items[item].heat * layout.items[item].num_bytes

    def end(item: int, node: int) -> tuple[float, int]:
        own = 0.0 if runner.get(item) == node else cost(item)
        return (work[node] + own) / layout.nodes[node].cores, node

    for item, node in ran.items():
        work[node] += cost(item)
    codes = [i for i, item in enumerate(layout.items) if item.record.kind == "codes"]
    for item in sorted(codes, key=lambda i: (-cost(i), i)) * MAX_SHARE_ROUNDS:
        able = [node for node in layout.holders[item] if layout.nodes[node].cores > 0]
        if not able:
            continue
        best, was = min(able, key=partial(end, item)), runner.get(item)
        if was is not None:
            stay = KEEP_RUNNER if ran.get(item) == was else 1.0
            if best == was or end(item, best)[0] >= stay * end(item, was)[0]:
                continue
            work[was] -= cost(item)
        work[best] += cost(item)
        runner[item] = best
    shares: list[set[ExpertKey]] = [set() for _ in layout.nodes]
    for item, node in runner.items():
        shares[node].add(layout.items[item].record.key)
    return shares


def _ran(layout: Layout, before: Segments | None) -> dict[int, int]:
    """The node that ran each expert before, where it still can."""
    known = before.nodes if before is not None else {}
    numbers = {
        key: number
        for number, node in enumerate(layout.nodes)
        if node.cores > 0
        for key in known.get(node.node_id, NodeSegment()).near_data
    }
    return {
        item: numbers[each.record.key]
        for item, each in enumerate(layout.items)
        if each.record.kind == "codes" and numbers.get(each.record.key, -1) in layout.holders[item]
    }


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
    if heat is not None and not any(heat.values()):
        heat = None
    items = []
    for size in sizes:
        warm = 1.0 if heat is None else heat.get(size.key, 0.0)
        copies = min(rules.codes_copies, num_nodes)
        items.append(Item(Record(size.key, "codes"), size.codes_bytes, copies, warm))
        if size.factors_bytes:
            copies = min(rules.factors_copies, num_nodes)
            items.append(Item(Record(size.key, "factors"), size.factors_bytes, copies, 0.0))
    return sorted(items, key=lambda item: (-item.heat, -item.num_bytes, item.record))


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
    if not nodes or wanted > room:
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
