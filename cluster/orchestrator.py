"""The tier manager: a small Serve deployment that starts, heals and hands out the tier actors.

The one place that creates StoreActors and NdpActors. What to do when is `cluster/keeper.py`, where
they go is `cluster/placement.py`, which stores are served is `cluster/tier_sets.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.keeper import Keeper, TierLost
from cluster.placement import MAX_NODES_TOLD, Node, Placed, tier_needs
from cluster.segments import expert_sizes
from cluster.settings import DirectorySettings, NdpSettings, StoreSettings
from cluster.snapshot import ClusterSnapshot, IngressStats, Reports
from cluster.spread import SpreadRules, wants_spread
from cluster.spread_keeper import SpreadKeeper
from cluster.tier_link import Endpoints, open_directory
from cluster.tier_sets import TierKeeper, TierSets
from expert_store.actor import StoreActor, StoreHandle
from expert_store.errors import StoreError
from expert_store.format import load_manifest
from expert_store.holder import HolderStatus
from gpu_worker.actor import REPORT_INTERVAL_S
from gpu_worker.messages import ModelDescription, WorkerStats
from ndp_worker.actor import NdpActor
from ndp_worker.config import NdpConfig

logger = logging.getLogger(__name__)

TEND_INTERVAL_S = 1.0
WORKER_EXPIRY_S = 3 * REPORT_INTERVAL_S
"""A GPU worker that has not reported for so long is not counted as running: /health follows it."""
INGRESS_EXPIRY_S = 10.0
"""An ingress shares its counts every 3 s."""
STOP_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class TierSettings:
    """The sections of the config that the tiers are made of.

    Which store it is does not belong to it (`store.path` is not read): that comes with
    `TierManager.reconfigure`, so that a new one does not restart the manager and every tier.
    """

    store: StoreSettings
    ndp: NdpSettings
    directory: DirectorySettings


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
            gone = self._models.keys() - set(self._sets.stores)
            self._models = {s: model for s, model in self._models.items() if s not in gone}
            await asyncio.sleep(TEND_INTERVAL_S)

    async def _keeper(self, store: str) -> TierKeeper:
        settings, launcher = self._settings, RayLauncher(self._settings, store)
        options: Any = {
            "start_timeout_s": settings.store.start_timeout_s,
            "clock": time.monotonic,
            # No two sets of tiers count alike, those of a manager that was restarted included: a
            # worker would take the new one's endpoints for those that it knows.
            "first_generation": time.time_ns(),
        }
        if settings.store.placement != "full":
            manifest = await asyncio.to_thread(load_manifest, Path(store))
            sizes = expert_sizes(manifest, together=True)
            if wants_spread(settings.store, sizes, await launcher.nodes()):
                rules = SpreadRules(sizes, settings.store, settings.ndp)
                return SpreadKeeper(launcher, rules, **options)
        return Keeper(launcher, tier_needs(settings.store, settings.ndp), **options)


class RayLauncher:
    """Starts tier actors with Ray. They are owned, so they end with the tier manager's process."""

    def __init__(self, settings: TierSettings, store: str) -> None:
        self._settings = settings
        self._store = store
        self._directory = open_directory(settings.directory)

    async def nodes(self) -> Sequence[Node]:
        return await asyncio.to_thread(live_nodes)

    async def start(self, placed: Placed) -> Any:
        options: dict[str, Any] = {
            "num_cpus": 0,
            # Ray restarts a process that died, behind the same handle and on the same node.
            "max_restarts": -1,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(placed.node.node_id, soft=False),
        }
        store_actor: Any = StoreActor  # what ray.remote makes of the class, mypy does not know
        ndp_actor: Any = NdpActor
        if placed.need.section == "store":
            return store_actor.options(**options).remote(
                self._store,
                placed.keys,
                ports=self._settings.store.port_range,
                directory=self._directory,
            )
        config = NdpConfig(
            num_threads=self._settings.ndp.num_threads or "auto",
            ports=self._settings.ndp.port_range,
        )
        return ndp_actor.options(**options).remote(
            self._store, placed.keys, config=config, directory=self._directory
        )

    async def ask(self, handle: Any) -> HolderStatus:
        try:
            status: HolderStatus = await handle.describe.remote()
            return status
        except (RayActorError, ActorUnschedulableError) as error:
            # Its node has died and it may run nowhere else; or it has died for good.
            final = isinstance(error, (ActorDiedError, ActorUnschedulableError))
            raise TierLost(_first_lines(error), is_final=final) from error
        except RayTaskError as error:
            raise TierLost(f"its describe failed: {error.cause!r}", is_final=False) from error

    async def stop(self, handle: Any) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await handle.stop.remote()
        except (RayError, TimeoutError) as error:
            logger.info("an actor did not stop by itself: %s", _first_lines(error))
        ray.kill(handle)


def _endpoints(keeper: TierKeeper) -> Endpoints:
    running = keeper.running()
    return Endpoints(
        keeper.generation,
        tuple(StoreHandle(r.handle, r.status.listing) for r in running if r.role == "store"),
        tuple(r.status.listing for r in running if r.role == "ndp"),
    )


def live_nodes() -> tuple[Node, ...]:
    """The live nodes of the cluster that this process is connected to."""
    return tuple(
        Node(n["NodeID"], n["NodeManagerAddress"], n.get("Labels", {}), n.get("Resources", {}))
        for n in ray.nodes()
        if n["Alive"]
    )


def _first_lines(error: BaseException) -> str:
    """What an actor died of, without the frames of Ray's own traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("File ", "^", "Traceback"))]
    return " ".join(told[:1] + told[-1:]) if told else type(error).__name__
