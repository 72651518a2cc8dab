"""Whether a store is spread over the memory nodes, and over which: pure functions of the config.

Knows no Ray; the nodes are passed in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.placement import Need, Node, PlacementError, explain_missing
from cluster.segments import ExpertSize, MemoryNode, NodeSegment, SegmentRules, Segments
from cluster.settings import NdpSettings, StoreSettings, split_label
from cluster.tier_actors import Found
from expert_store.types import ExpertKey

ROOM_SHARE = 0.6
"""Of the memory that Ray knows of a node: actors, the object store's copies and the system's own
take the rest."""
LINK_LABEL = "moetier.io/link-gbps"
"""Node label: Gbit/s of its link. Hot experts go rather to nodes with fast ones."""
USUAL_LINK_BYTES_S = 1e9


@dataclass(frozen=True, slots=True)
class SpreadRules:
    """What a spread store is made of: its records' sizes and the config's two sections."""

    sizes: tuple[ExpertSize, ...]
    store: StoreSettings
    ndp: NdpSettings

    @property
    def segments(self) -> SegmentRules:
        """How many copies. Factors lie with their codes: they are counted in `sizes`."""
        return SegmentRules(codes_copies=self.store.copies)

    def memory_nodes(self, nodes: Iterable[Node]) -> tuple[MemoryNode, ...]:
        """The nodes that can hold records. Only those with ndp.label run experts (`cores`).

        Raises PlacementError when there is none, or one of which nobody says how much it may hold,
        or whose link label is no speed.
        """
        nodes = list(nodes)
        found = [node for node in nodes if _has_label(self.store.label, node)]
        if not found:
            raise PlacementError(explain_missing(self._need("store-0", "store"), nodes))
        return tuple(
            MemoryNode(
                node.node_id,
                room_bytes(self.store, node),
                link_bytes_s=link_bytes_s(node),
                cores=max(node.resources.get("CPU", 0.0), 1.0) if self._runs(node) else 0.0,
            )
            for node in found
        )

    def check_runners(self, places: Iterable[MemoryNode], nodes: Iterable[Node]) -> None:
        """Raise PlacementError where near data is wanted and no memory node carries its label."""
        if self.ndp.enabled and not any(place.cores for place in places):
            need = self._need("ndp-0", "ndp")
            raise PlacementError(
                f"{explain_missing(need, [n for n in nodes if not self._runs(n)])}. With "
                f"store.placement spread it must be one that carries {self.store.label} too"
            )

    def needs(self, node_id: str, segment: NodeSegment) -> tuple[Need, ...]:
        """The actors of one node's segment."""
        if not segment.codes:
            return ()
        store = self._need(f"store-{node_id[:8]}", "store")
        if not segment.near_data:
            return (store,)
        return store, self._need(f"ndp-{node_id[:8]}", "ndp")

    def _need(self, name: str, section: str) -> Need:
        return Need(name, section, self.store.label if section == "store" else self.ndp.label)

    def _runs(self, node: Node) -> bool:
        return self.ndp.enabled and _has_label(self.ndp.label, node)


def link_bytes_s(node: Node) -> float:
    """How fast a node's link is, by its label; as most are where it has none."""
    told = node.labels.get(LINK_LABEL)
    if told is None:
        return USUAL_LINK_BYTES_S
    try:
        gbps = float(told)
    except ValueError:
        gbps = math.nan
    if not 0 < gbps < math.inf:
        raise PlacementError(
            f"node {node.address}: label {LINK_LABEL} is {told!r}, expected Gbit/s as a positive "
            "number; start the node with another label"
        )
    return gbps * 1e9 / 8


def held(
    found: Iterable[Found], rules: SpreadRules, places: Sequence[MemoryNode]
) -> Segments | None:
    """The placement that living actors have already; None unless they hold on these nodes what the
    rules want: so many copies of every expert, and somebody to run each.
    """
    every = frozenset(size.key for size in rules.sizes)
    stores: dict[str, frozenset[ExpertKey]] = {}
    runners: dict[str, frozenset[ExpertKey]] = {}
    for each in found:
        of_role = stores if each.name.startswith("store-") else runners
        of_role.setdefault(each.status.listing.node_id, keys_of(each, every))
    copies = Counter(key for place in places for key in stores.get(place.node_id, ()))
    run = Counter(key for place in places for key in runners.get(place.node_id, ()))
    wanted = min(rules.store.copies, len(places))
    if any(copies[key] < wanted for key in every):
        return None
    if rules.ndp.enabled and any(run[key] != 1 for key in every):
        return None
    return Segments(
        {
            place.node_id: NodeSegment(
                codes=stores.get(place.node_id, frozenset()),
                near_data=runners.get(place.node_id, frozenset()),
            )
            for place in places
        }
    )


def keys_of(found: Found, every: frozenset[ExpertKey]) -> frozenset[ExpertKey]:
    """The experts that an actor holds, or runs."""
    keys = found.status.listing.keys
    return every if keys is None else keys


def keys_for(name: str, segment: NodeSegment) -> frozenset[ExpertKey]:
    """The experts that an actor of this name holds, or runs, of a node's segment."""
    return segment.codes if name.startswith("store-") else segment.near_data


def wants_spread(store: StoreSettings, sizes: Sequence[ExpertSize], nodes: Iterable[Node]) -> bool:
    """Whether each node shall hold a part.

    "auto" spreads when some node cannot hold it all and together they can hold its copies. Where
    they cannot, every actor maps the whole store and reads what does not fit from its disk.
    """
    if store.placement != "auto":
        return store.placement == "spread"
    whole = sum(size.codes_bytes + size.factors_bytes for size in sizes)
    holders = [node for node in nodes if _has_label(store.label, node)]
    if not all(_knows_memory(store, node) for node in holders):
        return False
    rooms = [min(room_bytes(store, node), whole) for node in holders]
    fits = sum(rooms) >= whole * min(store.copies, len(rooms))
    return len(rooms) > 1 and fits and min(rooms) < whole


def room_bytes(store: StoreSettings, node: Node) -> int:
    """Bytes of records that a node may hold. Raises PlacementError when nobody says."""
    if store.node_bytes is not None:
        return store.node_bytes
    if not _knows_memory(store, node):
        raise PlacementError(
            f"cannot place the store on {node.address} ({node.node_id[:8]}): Ray does not know its "
            "memory. Set store.node_bytes, or start the node with `ray start --memory BYTES`"
        )
    return int(ROOM_SHARE * node.resources["memory"])


def _knows_memory(store: StoreSettings, node: Node) -> bool:
    return store.node_bytes is not None or "memory" in node.resources


def _has_label(label: str | None, node: Node) -> bool:
    return split_label(label).items() <= node.labels.items()
