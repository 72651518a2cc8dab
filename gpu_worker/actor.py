"""The Ray shell of a GPU worker: what a Serve replica runs around an EngineService.

Reports its load to the tier manager and follows the tiers as they move. Knows the tiers only
through what the composition root passes in.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray import serve

from gpu_worker.config import WorkerConfig
from gpu_worker.load_rates import LoadRates
from gpu_worker.messages import Event, ExpertUses, GenerateRequest, ModelDescription, TierCalls
from gpu_worker.protocols import ExpertSource, NearData

if TYPE_CHECKING:
    from gpu_worker.service import EngineService

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
HOLD_AGAIN_S = 5.0
"""Serve ends no replica with an open call: with one made so often that outlasts its drain, a
worker's last requests may use the tiers."""


class Link(Protocol):
    """The way to the tiers: a source and maybe near data, behind which actors may be replaced."""

    @property
    def source(self) -> ExpertSource: ...

    @property
    def near_data(self) -> NearData | None: ...

    @property
    def generation(self) -> int: ...

    def take_uses(self) -> tuple[ExpertUses, ...]: ...

    @property
    def calls(self) -> TierCalls: ...

    def follow(self, endpoints: Any) -> None: ...

    def close(self) -> None: ...


Connect = Callable[[Any, str], Link]
"""The tier manager's endpoints for a store, and that store -> the link. Sent to the replica, so it
must pickle."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What one replica is told, besides its store. `name` None is the store's own name of its
    model; `drain_s` is what Serve gives a replica that it stops.
    """

    config: WorkerConfig
    max_waiting: int
    name: str | None = None
    drain_s: float = 15.0


class GpuWorker:
    """Serve runs as many of these as there are replicas.

    `tiers` is the tier manager's handle: `endpoints(store)` once, then every second
    `report(stats, model, generation, store)`, which gives new endpoints when they have changed. A
    `hold(seconds)` is always open, so that the tiers outlive the requests when all is shut down.
    """

    def __init__(self, settings: WorkerSettings, tiers: Any, connect: Connect) -> None:
        self._settings, self._tiers, self._connect = settings, tiers, connect
        self._store: str | None = None

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve's user_config, before the first request: {"store": FOLDER}. Opens the model.

        A replica runs one store for life, so that no request meets two. For another one Serve must
        start new replicas (`moetier rollout`); an update in place is refused in the log. Raises
        ValueError for anything else, and what opening the store raises.
        """
        store = user_config.get("store")
        if set(user_config) != {"store"} or not isinstance(store, str) or not store:
            raise ValueError(
                f'user_config of GpuWorker: got {dict(user_config)}, expected {{"store": FOLDER}}'
            )
        if self._store is None:
            await self._open(store)
        elif store != self._store:
            logger.error(
                "this worker goes on with %s, not %s: its replica must be restarted for that; "
                "change something in ray_actor_options together with user_config",
                self._store,
                store,
            )

    async def _open(self, store: str) -> None:
        # The tiers start meanwhile; both take seconds.
        endpoints, _ = await asyncio.gather(
            _first(self._tiers, store), asyncio.to_thread(_load_libraries)
        )
        self._link = await asyncio.to_thread(self._connect, endpoints, store)
        replica = serve.get_replica_context().replica_id.unique_id
        self._service = await asyncio.to_thread(_open, store, self._settings, self._link, replica)
        self._rates = LoadRates()
        self._store = store
        self._holding = asyncio.create_task(self._hold())
        self._reporting = asyncio.create_task(self._report())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """As `EngineService.generate`."""
        events = self._service.generate(request)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    def check_health(self) -> None:
        """Deep but bounded: the engine's thread lives and no step hangs. Asks nobody else."""
        if self._store is None:
            return  # it still opens
        self._service.check_health()
        if self._reporting.done():
            raise RuntimeError("the worker no longer reports to the tier manager")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy decides on (`cluster/autoscaling.py`)."""
        if self._store is None:
            return {}  # it still opens
        return self._rates.gauges(self._service.load(), time.monotonic())

    async def __del__(self) -> None:
        if hasattr(self, "_reporting"):
            self._reporting.cancel()
            await asyncio.to_thread(self._service.close)
            await asyncio.to_thread(self._link.close)  # it waits for threads
            self._holding.cancel()
            await asyncio.wait({self._holding})

    async def _hold(self) -> None:
        """Holds that overlap, since none can be made any more once the tier manager is to end."""
        async with asyncio.TaskGroup() as holds:
            while True:
                hold_s = self._settings.drain_s + HOLD_AGAIN_S
                holds.create_task(_hold_once(self._tiers, hold_s))
                await asyncio.sleep(HOLD_AGAIN_S)

    async def _report(self) -> None:
        model = await self._service.describe()
        while True:
            try:
                async with asyncio.timeout(5 * REPORT_INTERVAL_S):
                    stats = replace(
                        self._service.load(),
                        expert_uses=self._link.take_uses(),
                        tier_calls=self._link.calls,
                    )
                    endpoints = await self._tiers.report.remote(
                        stats, model, self._link.generation, self._store
                    )
                if endpoints is not None:
                    await asyncio.to_thread(self._link.follow, endpoints)
            except (ray.exceptions.RayError, serve.exceptions.RayServeException, TimeoutError) as e:
                # The last known endpoints go on to serve until the tier manager is back.
                logger.warning("no report to the tier manager: %s", e)
            await asyncio.sleep(REPORT_INTERVAL_S)


async def _first(tiers: Any, store: str) -> Any:
    return await tiers.endpoints.remote(store)


async def _hold_once(tiers: Any, seconds: float) -> None:
    held = tiers.hold.remote(seconds)
    try:
        await held
    except (ray.exceptions.RayError, serve.exceptions.RayServeException) as error:
        logger.info("no hold at the tier manager: %s", error)
    finally:
        held.cancel()


def _load_libraries() -> None:
    """Import what only a replica needs. Whoever deploys this class imports this module, and
    transformers costs seconds of CPU (7 on a 2-core machine) that nobody else should spend.
    """
    importlib.import_module("gpu_worker.build")
    importlib.import_module("gpu_worker.service")
    importlib.import_module("gpu_worker.warm_up")


def _open(store: str, settings: WorkerSettings, link: Link, replica: str) -> EngineService:
    from gpu_worker.build import build_engine
    from gpu_worker.service import EngineService
    from gpu_worker.warm_up import warm_up

    engine = build_engine(
        Path(store),
        link.source,
        link.near_data,
        settings.config,
        max_waiting=settings.max_waiting,
    )
    warm_up(engine)
    manifest = link.source.manifest
    description = ModelDescription(
        settings.name or manifest.model.name,
        manifest.model.model_type,
        engine.max_context,
        int(time.time()),
        manifest.version,
    )
    return EngineService(engine, description, replica=replica)
