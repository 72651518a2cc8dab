"""The tier manager: a small Serve deployment that starts, heals and hands out the tier actors.

What to do when is `cluster/keeper.py`, how many there are `cluster/sized_keeper.py`, where they go
`cluster/placement.py`, which stores are served `cluster/tier_sets.py`, how it is done with Ray
`cluster/ray_launcher.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.placement import MAX_NODES_TOLD
from cluster.ray_launcher import RayLauncher, TierSettings, acquaint, live_nodes
from cluster.segments import expert_sizes
from cluster.sized_keeper import SizedKeeper
from cluster.snapshot import ClusterSnapshot, IngressStats, Reports
from cluster.spread import SpreadRules, wants_spread
from cluster.spread_keeper import SpreadKeeper
from cluster.tier_link import Endpoints
from cluster.tier_sets import TierKeeper, TierSets
from expert_store.actor import StoreHandle
from expert_store.errors import StoreError
from expert_store.format import load_manifest
from gpu_worker.actor import REPORT_INTERVAL_S
from gpu_worker.messages import ModelDescription, WorkerStats

logger = logging.getLogger(__name__)

TEND_INTERVAL_S = 1.0
WORKER_EXPIRY_S = 3 * REPORT_INTERVAL_S
"""A GPU worker that has not reported for so long is not counted as running: /health follows it."""
INGRESS_EXPIRY_S = 10.0
"""An ingress shares its counts every 3 s."""


class TierDrainError(StoreError):
    """A node could not be emptied in time."""


class TierManager:
    """Serve runs one. `reconfigure` comes first and fails, with the reason, when a tier does not
    start. Serves the configured store, and every other that workers ask for as long as they do.
    """

    def __init__(self, settings: TierSettings) -> None:
        self._settings = settings
        self._sets = TierSets(self._keeper, clock=time.monotonic)
        self._models: dict[str, ModelDescription] = {}  # by store
        self._acquainted: dict[str, int] = {}  # store -> generation whose actors know each other
        self._workers = Reports[WorkerStats](WORKER_EXPIRY_S, time.monotonic)
        self._ingresses = Reports[IngressStats](INGRESS_EXPIRY_S, time.monotonic)
        self._tending: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve's user_config: {"store": FOLDER}, the store that is served from now on.

        Raises ValueError for anything else; the first time also when its tiers do not start.
        """
        store = user_config.get("store")
        if set(user_config) != {"store"} or not isinstance(store, str) or not store:
            raise ValueError(
                f'user_config of TierManager: got {dict(user_config)}, expected {{"store": FOLDER}}'
            )
        await self._sets.configure(store)
        if self._tending is None:
            self._tending = asyncio.create_task(self._tend())

    async def endpoints(self, store: str) -> Endpoints:
        """Who answers now for a store; its tiers are started if there are none.

        Waits until they answer. Raises PlacementError, TierStartError or TooManyStoresError.
        """
        return _endpoints(await self._sets.get(store))

    async def report(
        self, stats: WorkerStats, model: ModelDescription, generation: int, store: str
    ) -> Endpoints | None:
        """A GPU worker's sign of life: it runs `model` from `store`. The store's endpoints when it
        knows another generation of them; None also while their actors still start.
        """
        self._workers.add(stats.replica, replace(stats, expert_uses=()))
        self._models[store] = model
        keeper = self._sets.used(store)
        if keeper is not None:
            keeper.add_uses(stats.expert_uses)
        return None if keeper is None or generation == keeper.generation else _endpoints(keeper)

    async def drain(self, node: str, timeout_s: float) -> None:
        """Empty a memory node (its Ray id or address) that is to leave, of every store's actors.

        Their records are held elsewhere before they are stopped. Raises ValueError for no such
        node, TierDrainError when it is not empty in time; it goes on being emptied then.
        """
        nodes = await asyncio.to_thread(live_nodes)
        found = [each.node_id for each in nodes if node in (each.node_id, each.address)]
        if len(found) != 1:
            known = ", ".join(f"{each.address} ({each.node_id})" for each in nodes[:MAX_NODES_TOLD])
            raise ValueError(f"node: {len(found)} live nodes are {node!r}; there are {known}")
        self._sets.drain(found[0])
        deadline = time.monotonic() + timeout_s
        while not self._sets.is_drained(found[0]):
            if time.monotonic() >= deadline:
                problems = [f"{s.name}: {s.problem}" for s in self._sets.statuses() if s.problem]
                raise TierDrainError(
                    f"node {node} still holds records after {timeout_s:g} s "
                    f"({'; '.join(problems) or 'its actors are still being moved'}); is there room "
                    "on other nodes?"
                )
            await asyncio.sleep(TEND_INTERVAL_S)

    async def hold(self, seconds: float) -> None:
        """Returns after so long. Serve drains this replica, tiers and all, no sooner than that,
        unless the caller cancels: a GPU worker does when it has ended its last request.
        """
        await asyncio.sleep(seconds)

    async def model(self) -> ModelDescription | None:
        """The model of the configured store; None before the first of its workers has started.
        While a new store rolls in, that of the workers there are.
        """
        configured = self._models.get(self._sets.configured or "")
        return configured or next(reversed(self._models.values()), None)

    async def snapshot(self, ingress: IngressStats) -> ClusterSnapshot:
        """The cluster now; `ingress` is the asker's own part of it."""
        self._ingresses.add(ingress.replica, ingress)
        return ClusterSnapshot(
            self._sets.statuses(), self._workers.current(), self._ingresses.current()
        )

    def check_health(self) -> None:
        """Raises when nobody looks after the tiers. A lost tier is not this one's illness."""
        if self._tending is not None and self._tending.done():
            raise RuntimeError("the tier manager no longer tends its actors")

    async def __del__(self) -> None:
        if self._tending is not None:
            self._tending.cancel()
        await self._sets.close()

    async def _tend(self) -> None:
        while True:
            await self._sets.tend()
            keepers = self._sets.keepers
            self._models = {s: model for s, model in self._models.items() if s in keepers}
            for store, keeper in keepers.items():
                if self._acquainted.get(store) != keeper.generation:
                    acquaint(keeper.running())
            self._acquainted = {store: keeper.generation for store, keeper in keepers.items()}
            await asyncio.sleep(TEND_INTERVAL_S)

    async def _keeper(self, store: str) -> TierKeeper:
        settings, launcher = self._settings, RayLauncher(self._settings, store)
        options: Any = {
            "clock": time.monotonic,
            # No two sets of tiers count alike, those of a manager that was restarted included: a
            # worker would take the new one's endpoints for those that it knows.
            "first_generation": time.time_ns(),
        }
        nodes = await launcher.nodes()
        if settings.store.placement != "full":
            manifest = await asyncio.to_thread(load_manifest, Path(store))
            sizes = expert_sizes(manifest, together=True)
            if wants_spread(settings.store, sizes, nodes):
                rules = SpreadRules(sizes, settings.store, settings.ndp)
                timeout_s = settings.store.start_timeout_s
                return SpreadKeeper(launcher, rules, start_timeout_s=timeout_s, **options)
        return SizedKeeper(
            launcher,
            settings.store,
            settings.ndp,
            nodes,
            workers=self._workers.current,
            **options,
        )


def _endpoints(keeper: TierKeeper) -> Endpoints:
    running = keeper.running()
    return Endpoints(
        keeper.generation,
        tuple(StoreHandle(r.handle, r.status.listing) for r in running if r.role == "store"),
        tuple(r.status.listing for r in running if r.role == "ndp"),
    )
