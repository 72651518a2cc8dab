"""Which memory node runs which experts near the data: work spread by heat, bytes and cores.

A part of the placement (`cluster/segment_placement.py`), made once it is known who holds what.
"""

from __future__ import annotations

from functools import partial

from cluster.segment_layout import Layout
from cluster.segments import NodeSegment, Segments
from expert_store.types import ExpertKey

KEEP_RUNNER = 0.8
"""An expert is run elsewhere when that node, with it, would have less than so much of the work of
the one that runs it: another set of experts costs a worker a restart."""
MAX_SHARE_ROUNDS = 4


def share_near_data(layout: Layout, before: Segments | None) -> list[set[ExpertKey]]:
    """Which node runs which expert: one of its holders each, work spread by the nodes' cores.

    Work is heat times bytes: a use reads the codes once. The biggest goes first, to whoever would
    be done earliest; then each may go over to another of its holders that would be done much
    earlier. Who ran an expert before goes on with it unless that is so.
    """
    work = [0.0] * len(layout.nodes)
    ran = _ran(layout, before)
    runner = dict(ran)

    def heat(item: int) -> float:
        return layout.items[item].copy_heat * layout.items[item].wanted

    def cost(item: int) -> float:
        return heat(item) * layout.items[item].num_bytes

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
