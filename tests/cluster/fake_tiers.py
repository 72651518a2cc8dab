"""A launcher whose actors die on command, and a clock that only tests move: for tests of who keeps
the tiers running.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.placement import Need, Node, Placed
from cluster.tier_actors import (
    Found,
    TierLost,
)
from expert_store.holder import HolderStatus
from expert_store.listing import HolderLoad, Listing

NODES = (Node("a", "10.0.0.1", {"tier": "x"}), Node("b", "10.0.0.2", {"tier": "x"}))
STORE = Need("store-0", "store", "tier=x")
NDP = Need("ndp-0", "ndp", "tier=x")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeLauncher:
    """Handles are numbers; `sick` says how a handle answers from now on."""

    def __init__(self, nodes: Sequence[Node] = NODES) -> None:
        self.live = list(nodes)
        self.started: list[tuple[str, str]] = []
        self.placed: list[Placed] = []  # of handle n at n - 1
        self.stopped: list[int] = []
        self.sick: dict[int, TierLost] = {}
        self.pids: dict[int, int] = {}
        self.bad_nodes: set[str] = set()  # where nothing starts
        self.is_found = True  # whether those that run are found by a keeper that starts
        self.loads: dict[int, HolderLoad] = {}
        self.quarantined: dict[int, int] = {}  # damaged records of a handle's actor
        self.requested: list[tuple[str | None, int]] = []

    async def nodes(self) -> Sequence[Node]:
        return self.live

    async def find(self) -> Sequence[Found]:
        """Those that run; what started them may be gone."""
        living = [
            n for n in range(1, len(self.placed) + 1) if self.is_found and n not in self.stopped
        ]
        return [
            Found(self.placed[handle - 1].need.name, handle, await self.ask(handle))
            for handle in living
            if handle not in self.sick
            and self.placed[handle - 1].node.node_id not in self.bad_nodes
        ]

    async def start(self, placed: Placed) -> int:
        self.started.append((placed.need.name, placed.node.node_id))
        self.placed.append(placed)
        return len(self.started)

    async def ask(self, handle: int) -> HolderStatus:
        placed = self.placed[handle - 1]
        if placed.node.node_id in self.bad_nodes:
            raise TierLost("no such folder", is_final=True)
        if handle in self.sick:
            raise self.sick[handle]
        name, where = f"actor-{handle}", placed.node.node_id
        listing = Listing(name, "records", "v", where, ("127.0.0.1:1",), placed.keys)
        pid, damaged = self.pids.get(handle, handle), self.quarantined.get(handle, 0)
        return HolderStatus(listing, 1, 1, pid, num_quarantined=damaged)

    async def load(self, handle: int) -> HolderLoad:
        return self.loads.get(handle, HolderLoad())

    async def request_nodes(self, label: str | None, num: int) -> None:
        self.requested.append((label, num))

    async def stop(self, handle: int) -> None:
        self.stopped.append(handle)
