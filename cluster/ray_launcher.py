"""Starts, asks and stops tier actors with Ray, and asks Ray which nodes there are.

The one place that creates StoreActors and NdpActors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.placement import Node, Placed
from cluster.settings import DirectorySettings, NdpSettings, StoreSettings, split_label
from cluster.tier_actors import (
    TierLost,
)
from cluster.tier_link import open_directory
from expert_store.actor import StoreActor
from expert_store.holder import HolderStatus
from expert_store.listing import HolderLoad
from ndp_worker.actor import NdpActor
from ndp_worker.config import NdpConfig

logger = logging.getLogger(__name__)

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

    async def load(self, handle: Any) -> HolderLoad:
        try:
            load: HolderLoad = await handle.load.remote()
            return load
        except RayError as error:
            raise TierLost(_first_lines(error), is_final=False) from error

    async def request_nodes(self, label: str | None, num: int) -> None:
        selector = split_label(label)
        await asyncio.to_thread(
            request_resources,
            # An actor of ours sets no CPU aside; a node is asked for by one.
            bundles=[{"CPU": 1}] * num,
            bundle_label_selectors=[selector] * num,
        )

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
