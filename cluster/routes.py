"""The HTTP surface as a FastAPI app over two Protocols: a GPU worker and the tiers.

Every answer that is an error has OpenAI's shape. Knows no Ray: `cluster/ingress.py` passes in what
satisfies the Protocols, tests pass in an engine of this process.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from cluster import metrics
from cluster.answering import Answering, ClientGone, Worker
from cluster.attempts import Count
from cluster.model_watch import ModelWatch
from cluster.openai_answers import Kind, model_object
from cluster.openai_api import ChatRequest, CompletionRequest, parse_request
from cluster.openai_errors import ApiError
from cluster.request_log import NO_RESPONSE, RequestLog
from cluster.settings import HttpSettings
from cluster.snapshot import ClusterSnapshot, IngressStats
from gpu_worker.messages import ModelDescription

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 5.0


class Tiers(Protocol):
    """Somebody who knows how the whole cluster is."""

    async def snapshot(self, ingress: IngressStats) -> ClusterSnapshot:
        """The cluster now; `ingress` is what the asker has to add to it.

        Raises ApiError 503 when it cannot be had.
        """
        ...


def create_app(
    worker: Worker,
    tiers: Tiers,
    settings: HttpSettings,
    *,
    replica: str = "local",
    stamp_request_id: bool = True,
    needs_worker: bool = True,
) -> FastAPI:
    """All routes of the endpoint; `app.state.routes` is the `Routes` behind them.

    `stamp_request_id` is False behind a proxy that puts x-request-id on responses itself;
    `needs_worker` is False where no worker at all is a healthy state (autoscaling to zero).
    """
    routes = Routes(worker, tiers, settings, replica, needs_worker)
    app = FastAPI(title="moetier", docs_url=None, redoc_url=None)
    app.state.routes = routes
    app.add_middleware(RequestLog, answered=routes.answered, stamp=stamp_request_id)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_mistake)
    app.post("/v1/completions")(routes.completions)
    app.post("/v1/chat/completions")(routes.chat)
    app.get("/v1/models")(routes.models)
    app.get("/v1/models/{name:path}")(routes.model)
    app.get("/health")(routes.health)
    app.get("/metrics")(routes.metrics)
    return app


class Routes:
    """The routes' bodies, and what one ingress replica has answered."""

    def __init__(
        self,
        worker: Worker,
        tiers: Tiers,
        settings: HttpSettings,
        replica: str,
        needs_worker: bool = True,
    ) -> None:
        self._needs_worker = needs_worker
        self._worker = worker
        self._tiers = tiers
        self._settings = settings
        self._replica = replica
        self._retries = Count()
        self._answering = Answering(worker, settings, self._retries)
        self._model = ModelWatch(worker.describe)
        self.answered: Counter[tuple[str, int]] = Counter()

    @property
    def stats(self) -> IngressStats:
        """What this replica has answered so far."""
        return IngressStats(self._replica, dict(self.answered), self._retries.retries)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._answer(request, CompletionRequest, "completion")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._answer(request, ChatRequest, "chat")

    async def models(self) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [model_object(await self._model.get())]})

    async def model(self, name: str) -> Response:
        """GET /v1/models/{name}"""
        return JSONResponse(model_object(await self._named(name)))

    async def health(self) -> Response:
        """GET /health: 200 when a GPU worker has reported within the last 3 s (it does so every
        second, busy or not) and some copy of the store answered when it was last asked. The status
        is "degraded", with the problems, while a tier actor does not answer that others stand in
        for. Where no worker is needed, because autoscaling may end the last one, tiers alone count.
        """
        again = self._settings.retry_after_s
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                model = await self._model.get()
                snapshot = await self._tiers.snapshot(self.stats)
        except TimeoutError as error:
            message = f"no answer from a GPU worker and the tier manager in {HEALTH_TIMEOUT_S:g} s"
            raise ApiError(503, message, code="unavailable", retry_after_s=again) from error
        # A worker that is busy reports all the same, so load alone never looks like an illness.
        is_missing = self._needs_worker and not snapshot.workers
        problems = [*snapshot.problems, *(["no GPU worker reports"] if is_missing else [])]
        if is_missing or not snapshot.has_store:
            message = "; ".join(problems) or "no tier actor reports"
            raise ApiError(503, message, code="unavailable", retry_after_s=again)
        tiers = [
            {
                **{"name": t.name, "role": t.role, "node": t.node},
                **{"quarantined": t.quarantined, "repaired": t.repaired},
            }
            for t in snapshot.tiers
        ]
        workers = [worker.replica for worker in snapshot.workers]
        body = {
            "status": "degraded" if problems else "ok",
            **{"problems": problems, "model": model.name, "workers": workers, "tiers": tiers},
        }
        return JSONResponse(body)

    async def metrics(self) -> Response:
        """GET /metrics, for Prometheus."""
        text = metrics.render(await self._tiers.snapshot(self.stats))
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    async def _answer(
        self, http: Request, request_type: type[CompletionRequest | ChatRequest], kind: Kind
    ) -> Response:
        parsed = parse_request(request_type, await self._body(http))
        model = await self._named(parsed.model)
        return await self._answering.answer(
            http,
            parsed.to_worker(http.state.request_id),
            kind=kind,
            model=model.name,
            stream=bool(parsed.stream),
            include_usage=parsed.include_usage,
        )

    async def _body(self, http: Request) -> bytes:
        """The body, never more of it than is allowed."""
        limit = self._settings.max_body_bytes
        said = http.headers.get("content-length", "")
        body = bytearray()
        if not (said.isdigit() and int(said) > limit):
            async for chunk in http.stream():
                body += chunk
                if len(body) > limit:
                    break
            else:
                return bytes(body)
        raise ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")

    async def _named(self, name: str) -> ModelDescription:
        model = await self._model.get()
        if name != model.name:
            message = f"model: {name[:200]!r} is not served here, use {model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return model


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(request, error, error.headers)


async def _on_client_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=NO_RESPONSE)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"[:200]
    known = {404: f"no such route: {where}", 405: f"method not allowed: {where}"}
    api_error = ApiError(error.status_code, known.get(error.status_code, str(error.detail)))
    headers = {**(error.headers or {}), **api_error.headers}
    return _error_response(request, api_error, headers)


async def _on_mistake(request: Request, error: Exception) -> Response:
    """Our mistake: the log has the traceback, the client an id to name."""
    request_id = _id_of(request)
    logger.error("request %s failed", request_id, exc_info=error)
    message = f"internal error; the log has it under request id {request_id}"
    return _error_response(request, ApiError(500, message, code="internal_error"), {})


def _error_response(request: Request, error: ApiError, headers: Mapping[str, str]) -> Response:
    body = error.body(_id_of(request))
    return JSONResponse(body, status_code=error.status, headers=dict(headers))


def _id_of(request: Request) -> str:
    found: str = request.scope.get("state", {}).get("request_id", "unknown")
    return found
