"""What moves when a memory node joins or leaves, and how evenly heat lies, by computation alone.

`python -m benchmarks.placement` writes benchmarks/results/placement.md. The placement is the one
that the cluster runs (`cluster/segment_placement.py`); bytes are counted, nothing is copied.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.record import RESULTS, provenance, table
from cluster.plan.shapes import SHAPES, ModelShape
from cluster.segment_placement import place_segments
from cluster.segments import (
    ExpertSize,
    MemoryNode,
    NodeSegment,
    SegmentRules,
    Segments,
    expert_sizes,
)
from cluster.stores import bundled_store
from expert_store.format import load_manifest
from expert_store.types import ExpertKey

REPORT = RESULTS / "placement.md"
SEED = 20261122
COPIES = 2
PLAY = 1.25
"""Room of all nodes together, against what the copies take, with one node more or less."""
CODES_BITS, FACTOR_BITS, RANK = 2.5, 3.5, 32
"""A weight of 2-bit codes and of 3-bit factors, with scales and zeros of groups of 64; rank 32 for
each of the three matrices."""
CLUSTERS = (3, 8, 32)
BALANCE_NODES = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A store's sizes, and how often each expert is used."""

    name: str
    sizes: tuple[ExpertSize, ...]
    heat: Mapping[ExpertKey, float]

    @property
    def copies_bytes(self) -> int:
        return COPIES * sum(size.codes_bytes + size.factors_bytes for size in self.sizes)

    def nodes(self, num_nodes: int) -> list[MemoryNode]:
        """Equal nodes with room for the copies when one of them has left."""
        largest = max(size.codes_bytes for size in self.sizes)
        room = PLAY * self.copies_bytes / max(num_nodes - 1, 1)
        return [MemoryNode(f"node-{n:03}", int(room) + largest) for n in range(num_nodes)]


@dataclass(frozen=True, slots=True)
class Move:
    """One change of the nodes. `anew_bytes` move where the placement before is not looked at."""

    name: str
    after: Segments
    anew_bytes: int
    seconds: float


def shaped(shape: ModelShape) -> tuple[ExpertSize, ...]:
    """The records of a model of this shape."""
    codes = int(shape.expert_weights * CODES_BITS / 8)
    factors = int(3 * RANK * (shape.hidden + shape.expert_ffn) * FACTOR_BITS / 8)
    layers = range(shape.num_dense_layers, shape.num_layers)
    return tuple(
        ExpertSize(ExpertKey(layer, expert), codes, factors)
        for layer in layers
        for expert in range(shape.num_experts)
    )


def zipf(sizes: Sequence[ExpertSize]) -> dict[ExpertKey, float]:
    """In every layer the n-th most used expert is used 1/n as often as the first."""
    rng = random.Random(SEED)
    ranks: dict[int, list[int]] = {}
    for size in sizes:
        ranks.setdefault(size.key.layer, []).append(len(ranks.get(size.key.layer, ())) + 1)
    for order in ranks.values():
        rng.shuffle(order)
    return {size.key: 1.0 / ranks[size.key.layer].pop() for size in sizes}


def cases() -> list[Case]:
    found = [("mixtral-mini (its manifest)", expert_sizes(load_manifest(bundled_store())))]
    names = ("Mixtral-8x7B", "Qwen3-30B-A3B", "DeepSeek-MoE-16B")
    found += [(name, shaped(SHAPES[name])) for name in names]
    return [Case(name, sizes, zipf(sizes)) for name, sizes in found]


def moves(case: Case, num_nodes: int) -> list[Move]:
    """One node more, one less; `num_nodes` before."""
    nodes = case.nodes(num_nodes)
    before = place_segments(case.sizes, nodes, heat=case.heat)
    newcomer = MemoryNode("node-new", nodes[0].room_bytes)
    changes = {
        f"{num_nodes} → {num_nodes + 1}": [*nodes, newcomer],
        f"{num_nodes} → {num_nodes - 1}": nodes[1:],
    }
    found = []
    for name, after_nodes in changes.items():
        start = time.perf_counter()
        after = place_segments(case.sizes, after_nodes, heat=case.heat, before=before)
        seconds = time.perf_counter() - start
        anew = place_segments(case.sizes, after_nodes, heat=case.heat)
        found.append(Move(name, after, new_bytes(case, before, anew), seconds))
    return found


def new_bytes(case: Case, before: Segments, after: Segments) -> int:
    """Bytes that nodes hold after and did not before."""
    codes = {size.key: size.codes_bytes for size in case.sizes}
    factors = {size.key: size.factors_bytes for size in case.sizes}
    return sum(
        sum(codes[key] for key in segment.codes - held.codes)
        + sum(factors[key] for key in segment.factors - held.factors)
        for node, segment in after.nodes.items()
        for held in [before.nodes.get(node, NodeSegment())]
    )


def unevenness(
    segments: Segments,
    weight: Callable[[ExpertKey], float],
    what: str,
    layer: int | None = None,
) -> float:
    """The most loaded node against the mean, in one layer or in all."""
    loads = [
        sum(weight(key) for key in getattr(segment, what) if layer in (None, key.layer))
        for segment in segments.nodes.values()
    ]
    return max(loads) * len(loads) / sum(loads)


def balance_row(case: Case, hot_ratio: float) -> list[str]:
    nodes = case.nodes(BALANCE_NODES)
    rules = SegmentRules(COPIES, COPIES, hot_ratio)
    found = place_segments(case.sizes, nodes, heat=case.heat, rules=rules)
    holders: dict[ExpertKey, int] = {}
    for segment in found.nodes.values():
        for key in segment.codes:
            holders[key] = holders.get(key, 0) + 1
    codes = {size.key: size.codes_bytes for size in case.sizes}
    layers = sorted({size.key.layer for size in case.sizes})

    def share(key: ExpertKey) -> float:
        return case.heat[key] / holders[key]

    reads = unevenness(found, share, "codes")
    work = unevenness(found, lambda key: case.heat[key] * codes[key], "near_data")
    per_copy = [case.heat[key] / count for key, count in holders.items()]
    mean = sum(case.heat.values()) / (COPIES * len(case.heat))
    return [
        case.name,
        "no" if hot_ratio == float("inf") else "yes",
        f"{found.movement.hot_bytes / case.copies_bytes:.1%}",
        f"{max(per_copy) / mean:.2f}",
        f"{reads:.3f}",
        f"{fmean(unevenness(found, share, 'codes', layer) for layer in layers):.3f}",
        f"{work:.3f}",
    ]


def movement_rows(found: Sequence[Case]) -> list[list[str]]:
    rows = []
    for case in found:
        for num_nodes in CLUSTERS:
            for move in moves(case, num_nodes):
                movement = move.after.movement
                rows.append([
                    case.name,
                    move.name,
                    f"{case.copies_bytes / 1e6:,.1f}",
                    f"{movement.moved_bytes / 1e6:,.2f}",
                    f"{movement.least_bytes / 1e6:,.2f}",
                    f"{movement.moved_bytes / movement.least_bytes:.3f}",
                    f"{movement.hot_bytes / 1e6:,.2f}",
                    f"{move.anew_bytes / 1e6:,.1f}",
                    f"{move.seconds:.2f}",
                ])  # fmt: skip
        print(f"{case.name}: moved", flush=True)
    return rows


def page(found: Sequence[Case]) -> str:
    movement = table(
        ["model", "nodes", "all copies, MB", "moved, MB", "least, MB", "moved / least",
         "for hot experts, MB", "placed anew, MB", "computed in, s"],
        movement_rows(found),
    )  # fmt: skip
    balance = table(
        ["model", "hot copies", "bytes more", "hottest copy / mean copy", "reads, max / mean",
         "reads of one layer, max / mean", "near-data work, max / mean"],
        [balance_row(case, ratio) for case in found for ratio in (float("inf"), 2.0)],
    )  # fmt: skip
    return "\n\n".join([
        "# Placement of experts on memory nodes",
        f"`python -m benchmarks.placement`: {provenance()}",
        f"Every record lies on {COPIES} nodes. Sizes: mixtral-mini's own manifest; the others by "
        f"shape, {CODES_BITS} bits a weight of codes and rank {RANK} at {FACTOR_BITS} bits. "
        "Heat is assumed: in each layer the n-th most used expert is used 1/n as often as the "
        "first, in an order drawn once. The nodes are equal and have 25 % more room than the "
        "copies take when one has left.",
        "## Bytes moved when a node joins or leaves",
        "`least` is what no placement could do without: for a newcomer its fair share of all "
        "copies, for a leaver the copies that went with it (less those of hot experts that have "
        "enough others). `placed anew` is what would move if the placement before were not looked "
        "at. Bytes of hot experts' further copies are counted apart.",
        movement,
        f"## How evenly heat lies on {BALANCE_NODES} nodes",
        "Reads: an expert's heat is shared equally by its copies; a step reads layer by layer, so "
        "the unevenness within a layer (mean over the layers) is what it waits for. Near-data "
        "work: an expert is run by one of its holders, its work is heat times bytes.",
        balance,
    ]) + "\n"  # fmt: skip


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    REPORT.write_text(page(cases()))
    print(f"wrote {REPORT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
