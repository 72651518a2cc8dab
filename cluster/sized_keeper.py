"""A Keeper whose numbers of actors follow the nodes there are, or how busy links and workers are.

How many is `cluster/memory_scaling.py`, a pure decision; this asks the actors and does as it says.
Knows no Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cluster.keeper import (
    ASK_TIMEOUT_S,
    Keeper,
)
from cluster.memory_scaling import MemoryScaler
from cluster.placement import Node, labelled, tier_needs, usual_replicas
from cluster.settings import NdpSettings, StoreSettings
from cluster.snapshot import Role
from cluster.tier_actors import (
    Launcher,
    TierLost,
)
from expert_store.listing import HolderLoad
from gpu_worker.messages import WorkerStats

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""Between two looks at the nodes, where numbers follow them alone."""


class SizingLauncher(Launcher, Protocol):
    """A launcher that also tells what actors did, and can ask for nodes."""

    async def load(self, handle: Any) -> HolderLoad:
        """What the actor did since it began. Raises TierLost."""
        ...

    async def request_nodes(self, label: str | None, num: int) -> None:
        """Ask whoever adds nodes to the cluster for so many with the label in all."""
        ...


class SizedKeeper(Keeper):
    """The tier actors of a store that each of them holds whole.

    With `store.autoscaling` their numbers follow use; without, a number that is not configured
    grows to two once two nodes carry the label, and never shrinks. `workers` are the GPU workers'
    last reports.
    """

    def __init__(
        self,
        launcher: SizingLauncher,
        store: StoreSettings,
        ndp: NdpSettings,
        nodes: Sequence[Node],
        *,
        workers: Callable[[], Sequence[WorkerStats]],
        clock: Callable[[], float],
        first_generation: int = 0,
    ) -> None:
        super().__init__(
            launcher,
            tier_needs(store, ndp, nodes),
            start_timeout_s=store.start_timeout_s,
            clock=clock,
            first_generation=first_generation,
        )
        self._sizing = launcher
        self._store = store
        self._ndp = ndp
        self._workers = workers
        self._now = clock
        self._scaler = None if store.autoscaling is None else MemoryScaler(store.autoscaling)
        self._look_at = 0.0
        self._requested = 0

    async def start(self) -> None:
        """As `Keeper.start`, with as many actors as a manager before this one found needed."""
        scaling = self._store.autoscaling
        if scaling is not None:
            names = {each.name for each in await self._sizing.find()}
            for section, most in (("store", scaling.max_replicas), ("ndp", scaling.max_ndp)):
                living = sum(name.startswith(f"{section}-") for name in names)
                if living and self.num_of(section):
                    self.resize(section, min(living, most))
        await super().start()

    async def tend(self) -> None:
        """One round over all actors, and now and then over how many there should be."""
        await super().tend()
        if self._scaler is not None:
            if self._scaler.is_due(self._now()):
                await self._scale(self._scaler)
        elif self._now() >= self._look_at:
            self._look_at = self._now() + LOOK_S
            nodes = await self._sizing.nodes()
            if self._store.replicas is None:
                self._grow("store", usual_replicas(self._store.label, nodes))
            if self._ndp.enabled and self._ndp.replicas is None:
                self._grow("ndp", usual_replicas(self._ndp.label, nodes))

    def _grow(self, section: str, num: int) -> None:
        if num > self.num_of(section):
            self.resize(section, num)

    async def _scale(self, scaler: MemoryScaler) -> None:
        nodes = await self._sizing.nodes()
        homes = labelled(self._store.label, nodes), labelled(self._ndp.label, nodes)
        decision = scaler.decide(
            self._now(),
            stores=await self._loads("store"),
            ndp=await self._loads("ndp"),
            workers=self._workers(),
            nodes=homes,
        )
        if decision is None:
            return
        self.resize("store", max(1, min(decision.store, homes[0])))
        if self._ndp.enabled:
            self.resize("ndp", max(1, min(decision.ndp, homes[1])))
        assert self._store.autoscaling is not None, "there is a scaler"
        if self._store.autoscaling.request_nodes and decision.store != self._requested:
            logger.info("%d nodes with %s are wanted", decision.store, self._store.label)
            await self._sizing.request_nodes(self._store.label, decision.store)
            self._requested = decision.store

    async def _loads(self, role: Role) -> dict[str, HolderLoad]:
        """Of the actors that answer, by name and process: one that is restarted counts anew."""
        running = [each for each in self.running() if each.role == role]
        loads = await asyncio.gather(*(self._load(each.handle) for each in running))
        return {
            f"{each.status.listing.name} {each.status.pid}": load
            for each, load in zip(running, loads, strict=True)
            if load is not None
        }

    async def _load(self, handle: Any) -> HolderLoad | None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return await self._sizing.load(handle)
        except (TierLost, TimeoutError):
            return None  # the next round finds out why
