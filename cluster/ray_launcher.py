"""Starts, asks and stops tier actors with Ray, and asks Ray which nodes there are.

The one place that creates StoreActors and NdpActors.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import ray
import ray.util
from ray import serve
from ray.autoscaler.sdk import request_resources
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.placement import Node, Placed
from cluster.settings import DirectorySettings, NdpSettings, StoreSettings, split_label
from cluster.tier_actors import Found, Running, TierLost
from cluster.tier_link import open_directory
from expert_store.actor import StoreActor
from expert_store.holder import HolderStatus
from expert_store.listing import HolderLoad
from ndp_worker.actor import NdpActor
from ndp_worker.config import NdpConfig

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 3.0
FIND_TIMEOUT_S = 5.0
NAMESPACE = "moetier-tiers"
"""Of the actors' names in Ray: application, fingerprint of store and settings, need, a number."""


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
    """Starts tier actors with Ray. They outlive the tier manager's process, so that workers go on
    reading from them and the next manager finds them; those that no manager asks any more end
    after `store.lease_s`.
    """

    def __init__(self, settings: TierSettings, store: str) -> None:
        self._settings = settings
        self._store = store
        self._directory = open_directory(settings.directory)
        self._prefix = f"{_application()}/{fingerprint(settings, store)}/"

    async def nodes(self) -> Sequence[Node]:
        return await asyncio.to_thread(live_nodes)

    async def find(self) -> Sequence[Found]:
        named = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = [each["name"] for each in named if each["namespace"] == NAMESPACE]
        found = await asyncio.gather(
            *(self._found(name) for name in sorted(names) if name.startswith(self._prefix))
        )
        return [each for each in found if each is not None]

    async def _found(self, name: str) -> Found | None:
        try:
            handle = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
            async with asyncio.timeout(FIND_TIMEOUT_S):
                status = await self.ask(handle)
        except (ValueError, TierLost, TimeoutError) as error:
            # It ends by its lease, if it lives at all.
            logger.info("%s is not taken over: %s", name, error or "no answer")
            return None
        return Found(name.removeprefix(self._prefix).rpartition("/")[0], handle, status)

    async def start(self, placed: Placed) -> Any:
        options: dict[str, Any] = {
            "name": f"{self._prefix}{placed.need.name}/{uuid.uuid4().hex[:12]}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
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
                lease_s=self._settings.store.lease_s,
                scrub_bytes_per_s=self._settings.store.scrub_mb_per_s * 1e6,
            )
        config = NdpConfig(
            num_threads=self._settings.ndp.num_threads or "auto",
            ports=self._settings.ndp.port_range,
        )
        return ndp_actor.options(**options).remote(
            self._store,
            placed.keys,
            config=config,
            directory=self._directory,
            lease_s=self._settings.store.lease_s,
            scrub_bytes_per_s=self._settings.store.scrub_mb_per_s * 1e6,
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


def acquaint(running: Sequence[Running]) -> None:
    """Tell every actor who holds records: it repairs damaged ones from the others' copies.

    Does not wait: one that is lost meanwhile is another holder when it comes back, and told then.
    """
    listings = [each.status.listing for each in running if each.role == "store"]
    for each in running:
        each.handle.know.remote(listings)


def fingerprint(settings: TierSettings, store: str) -> str:
    """The same for actors that are as these settings want them, whatever their number and place."""
    tiers, ndp = settings.store, settings.ndp
    wanted = (
        version("moetier"),
        store,
        (tiers.port_range, tiers.lease_s, tiers.scrub_mb_per_s),
        (ndp.num_threads, ndp.port_range),
        settings.directory,
    )
    return hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]


def _application() -> str:
    """The Serve application that this process is a replica of: two on one cluster share nothing."""
    try:
        return serve.get_replica_context().app_name
    except RayServeException:
        return "none"


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
