"""The tier manager: a small Serve deployment that starts, heals and hands out the tier actors.

The one place that creates StoreActors and NdpActors. What to do when is `cluster/keeper.py`, where
they go is `cluster/placement.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.keeper import Keeper, TierLost
from cluster.placement import Node, Placed, tier_needs
from cluster.settings import DirectorySettings, NdpSettings, StoreSettings
from cluster.snapshot import ClusterSnapshot, IngressStats, Reports
from cluster.tier_link import Endpoints, open_directory
from expert_store.actor import StoreActor, StoreHandle
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
    """The sections of the config that the tiers are made of."""

    store: StoreSettings
    ndp: NdpSettings
    directory: DirectorySettings


class TierManager:
    """Serve runs one. Its constructor fails, with the reason, when a tier does not start."""

    async def __init__(self, settings: TierSettings) -> None:  # type: ignore[misc] # Serve awaits it
        self._keeper = Keeper(
            RayLauncher(settings),
            tier_needs(settings.store, settings.ndp),
            start_timeout_s=settings.store.start_timeout_s,
            clock=time.monotonic,
        )
        self._model: ModelDescription | None = None
        self._workers = Reports[WorkerStats](WORKER_EXPIRY_S, time.monotonic)
        self._ingresses = Reports[IngressStats](INGRESS_EXPIRY_S, time.monotonic)
        await self._keeper.start()
        self._tending = asyncio.create_task(self._tend())

    async def endpoints(self) -> Endpoints:
        """Who answers now."""
        running = self._keeper.running()
        return Endpoints(
            self._keeper.generation,
            tuple(StoreHandle(r.handle, r.status.listing) for r in running if r.role == "store"),
            tuple(r.status.listing for r in running if r.role == "ndp"),
        )

    async def report(
        self, stats: WorkerStats, model: ModelDescription, generation: int
    ) -> Endpoints | None:
        """A GPU worker's sign of life; the endpoints when it knows another generation of them."""
        self._workers.add(stats.replica, stats)
        self._model = model
        return None if generation == self._keeper.generation else await self.endpoints()

    async def hold(self, seconds: float) -> None:
        """Returns after so long. Serve drains this replica, tiers and all, no sooner than that,
        unless the caller cancels: a GPU worker does when it has ended its last request.
        """
        await asyncio.sleep(seconds)

    async def model(self) -> ModelDescription | None:
        """The model that the workers run; None before the first of them has started."""
        return self._model

    async def snapshot(self, ingress: IngressStats) -> ClusterSnapshot:
        """The cluster now; `ingress` is the asker's own part of it."""
        self._ingresses.add(ingress.replica, ingress)
        return ClusterSnapshot(
            self._keeper.statuses(), self._workers.current(), self._ingresses.current()
        )

    def check_health(self) -> None:
        """Raises when nobody looks after the tiers. A lost tier is not this one's illness."""
        if self._tending.done():
            raise RuntimeError("the tier manager no longer tends its actors")

    async def __del__(self) -> None:
        if hasattr(self, "_tending"):
            self._tending.cancel()
            await self._keeper.close()

    async def _tend(self) -> None:
        while True:
            await self._keeper.tend()
            await asyncio.sleep(TEND_INTERVAL_S)


class RayLauncher:
    """Starts tier actors with Ray. They are owned, so they end with the tier manager's process."""

    def __init__(self, settings: TierSettings) -> None:
        self._settings = settings
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
        store = self._settings.store.path
        store_actor: Any = StoreActor  # what ray.remote makes of the class, mypy does not know
        ndp_actor: Any = NdpActor
        if placed.need.section == "store":
            ports = self._settings.store.port_range
            return store_actor.options(**options).remote(
                store, ports=ports, directory=self._directory
            )
        config = NdpConfig(
            num_threads=self._settings.ndp.num_threads or "auto",
            ports=self._settings.ndp.port_range,
        )
        return ndp_actor.options(**options).remote(store, config=config, directory=self._directory)

    async def ask(self, handle: Any) -> HolderStatus:
        try:
            status: HolderStatus = await handle.describe.remote()
            return status
        except RayActorError as error:
            final = isinstance(error, ActorDiedError)
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
