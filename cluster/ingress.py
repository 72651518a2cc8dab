"""The HTTP ingress as a Serve deployment: the routes, over Serve's handles.

The only file that knows how a call to a replica can fail; `cluster/routes.py` sees events and
ApiErrors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from cluster.attempts import WorkerLostError
from cluster.deployed import Deployed
from cluster.openai_errors import ApiError
from cluster.request_trace import RecordingWorker
from cluster.routes import Routes, create_app
from cluster.settings import HttpSettings
from cluster.snapshot import ClusterSnapshot, IngressStats
from gpu_worker.messages import (
    Event,
    Failed,
    GenerateRequest,
    ModelDescription,
    Piece,
    WorkerStats,
)

logger = logging.getLogger(__name__)

QUEUE_FULL = "every GPU worker is busy and as many requests wait as may; try again later"
ASK_TIMEOUT_S = 10.0
SHARE_INTERVAL_S = 3.0


@serve.ingress()
class Ingress:
    """One ingress replica."""

    def __init__(
        self, worker: Any, tiers: Any, settings: HttpSettings, needs_worker: bool = True
    ) -> None:
        self._needs_worker = needs_worker
        self._worker = RoutedWorker(worker, tiers)
        self._tiers = RemoteTiers(tiers, settings.retry_after_s)
        self._settings = settings

    async def __serve_build_asgi_app__(self) -> FastAPI:
        replica = serve.get_replica_context().replica_id.unique_id
        worker: Any = self._worker
        if self._settings.record_requests is not None:
            worker = RecordingWorker(worker, Path(self._settings.record_requests), replica)
        app = create_app(
            worker,
            self._tiers,
            self._settings,
            replica=replica,
            stamp_request_id=False,
            needs_worker=self._needs_worker,
        )
        self._routes: Routes = app.state.routes
        self._sharing = asyncio.create_task(self._share())
        return app

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve's user_config: what is deployed. Raises ValueError as `Deployed.of_mapping`."""
        self._deployed = Deployed.of_mapping(user_config)

    async def deployed(self) -> Deployed:
        """What is deployed; for a rollout, over Serve's handle."""
        return self._deployed

    async def workers(self) -> tuple[WorkerStats, ...]:
        """The GPU workers that report now; none while the tier manager does not answer."""
        try:
            return (await self._tiers.snapshot(self._routes.stats)).workers
        except ApiError as error:
            logger.info("no word of the workers: %s", error)
            return ()

    async def _share(self) -> None:
        """Tell the tier manager what was answered here, so that any replica can show all."""
        while True:
            await asyncio.sleep(SHARE_INTERVAL_S)
            try:
                await self._tiers.snapshot(self._routes.stats)
            except ApiError as error:
                logger.warning("counts not shared: %s", error)


class RoutedWorker:
    """All GPU workers behind Serve's router, as one."""

    def __init__(self, handle: Any, tiers: Any) -> None:
        self._streams = handle.options(stream=True)
        self._tiers = tiers

    async def describe(self) -> ModelDescription:
        """From the tier manager, to whom workers report: one that is full takes no call."""
        description: ModelDescription | None = None
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                description = await self._tiers.model.remote()
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the tier manager does not answer: %r", error)
        if description is None:
            message = "no GPU worker has reported; it may be starting"
            raise ApiError(503, message, code="unavailable", retry_after_s=1)
        return description

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """As a worker's own, on the one that Serve's router picks."""
        response = self._streams.generate.remote(request)
        ended = False
        try:
            async for event in response:
                ended = not isinstance(event, Piece)
                yield event
        except BackPressureError:
            ended = True
            yield Failed("queue_full", QUEUE_FULL)
        except (RayError, RayServeException) as error:
            ended = True
            raise WorkerLostError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        finally:
            if not ended:
                response.cancel()


class RemoteTiers:
    """The tier manager behind its handle."""

    def __init__(self, handle: Any, retry_after_s: int) -> None:
        self._handle = handle
        self._retry_after_s = retry_after_s

    async def snapshot(self, ingress: IngressStats) -> ClusterSnapshot:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                snapshot: ClusterSnapshot = await self._handle.snapshot.remote(ingress)
                return snapshot
        except (RayError, RayServeException, TimeoutError) as error:
            message = "the tier manager does not answer; it may be starting"
            again = self._retry_after_s
            raise ApiError(503, message, code="unavailable", retry_after_s=again) from error
