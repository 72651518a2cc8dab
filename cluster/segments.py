"""Who holds which records, as nouns: what must be held, where there is room, and what came out.

Decided in `cluster/segment_placement.py`. Knows no Ray and no actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from expert_store.types import ExpertKey, Manifest, RecordKind


class SegmentError(ValueError):
    """The records do not fit; the message says how many bytes are missing and what to do."""


@dataclass(frozen=True, slots=True)
class ExpertSize:
    """The bytes of one expert's two records; `factors_bytes` 0 where it has no compensator."""

    key: ExpertKey
    codes_bytes: int
    factors_bytes: int = 0

    def __post_init__(self) -> None:
        if self.codes_bytes < 1 or self.factors_bytes < 0:
            raise ValueError(
                f"{self.key}: got {self.codes_bytes} bytes of codes and {self.factors_bytes} of "
                "factors, expected at least 1 and 0"
            )


@dataclass(frozen=True, slots=True)
class MemoryNode:
    """A node that can hold records: `room_bytes` of them, and how fast it is.

    `link_bytes_s` and `cores` only count against those of the other nodes: twice the link gets
    twice the heat, twice the cores twice the near-data work. Without cores it runs none.
    """

    node_id: str
    room_bytes: int
    link_bytes_s: float = 1e9
    cores: float = 1.0

    def __post_init__(self) -> None:
        if self.room_bytes < 0 or self.link_bytes_s <= 0 or self.cores < 0:
            raise ValueError(
                f"node {self.node_id}: got room_bytes {self.room_bytes}, link_bytes_s "
                f"{self.link_bytes_s}, cores {self.cores}; expected none negative, the link "
                "above 0"
            )


@dataclass(frozen=True, slots=True)
class SegmentRules:
    """How many copies.

    - codes_copies, factors_copies: of every record, on different nodes; fewer where there are
      fewer nodes.
    - hot_ratio: an expert's codes get another copy, where memory is left, until none of its copies
      is used more than so many times as often as the mean copy; infinity is no such copy.
    """

    codes_copies: int = 2
    factors_copies: int = 2
    hot_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.codes_copies < 1 or self.factors_copies < 1:
            raise ValueError(
                f"copies: got {self.codes_copies} of codes and {self.factors_copies} of factors, "
                "expected at least 1"
            )
        if not self.hot_ratio >= 1:
            raise ValueError(f"hot_ratio: got {self.hot_ratio}, expected at least 1")


class Record(NamedTuple):
    """One record of the store."""

    key: ExpertKey
    kind: RecordKind


@dataclass(frozen=True, slots=True)
class NodeSegment:
    """What one node holds, and the experts that it runs near the data: some of `codes`."""

    codes: frozenset[ExpertKey] = frozenset()
    factors: frozenset[ExpertKey] = frozenset()
    near_data: frozenset[ExpertKey] = frozenset()

    @property
    def records(self) -> Iterator[Record]:
        for key in self.codes:
            yield Record(key, "codes")
        for key in self.factors:
            yield Record(key, "factors")


@dataclass(frozen=True, slots=True)
class Movement:
    """Bytes that nodes must newly hold, against the placement before.

    `moved_bytes` are those of the copies that must be and of their balance, `hot_bytes` those of
    further copies of hot experts. `least_bytes` is what no placement could do without: copies that
    went with nodes that left, or the newcomers' fair share of all, whichever is more.
    """

    moved_bytes: int
    least_bytes: int
    hot_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Segments:
    """A placement: what every node holds (by node id, every node is named), what it took."""

    nodes: Mapping[str, NodeSegment] = field(default_factory=dict)
    movement: Movement = Movement(0, 0)

    def holders(self, record: Record) -> frozenset[str]:
        """The nodes that hold a record."""
        return frozenset(
            node
            for node, segment in self.nodes.items()
            if record.key in (segment.codes if record.kind == "codes" else segment.factors)
        )


def expert_sizes(manifest: Manifest, *, together: bool = False) -> tuple[ExpertSize, ...]:
    """The sizes of a store's records, by expert.

    `together` counts an expert's factors with its codes: they then lie on the same nodes.
    """
    sizes = []
    for key, info in sorted(manifest.experts.items()):
        factors = info.factors.num_bytes if info.factors is not None else 0
        codes = info.codes.num_bytes
        sizes.append(
            ExpertSize(key, codes + factors) if together else ExpertSize(key, codes, factors)
        )
    return tuple(sizes)
