"""One request from a GPU worker's events to an HTTP response: whole, or as server-sent events.

Declares what the HTTP side needs of a worker. Knows no route, no Ray and no tokenizer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.attempts import Attempts, Count, Generator
from cluster.openai_answers import AnswerHead, Kind, event
from cluster.openai_errors import ApiError
from cluster.settings import HttpSettings
from gpu_worker.messages import Event, Failed, Finished, GenerateRequest, ModelDescription, Piece

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Worker(Generator, Protocol):
    """Somebody who runs requests and knows of which model."""

    async def describe(self) -> ModelDescription:
        """Raises ApiError 503 when no worker answers."""
        ...


class ClientGone(Exception):
    """The client closed the connection before its answer began."""


class Answering:
    """Runs requests on a worker under the endpoint's limits; on another one if it is lost.

    Headers of every answer: x-moetier-version, the version of the store that answered. Of one that
    is degraded: x-moetier-degraded: true, on a stream only if its first token was already; what
    comes later is told in its last chunk (`AnswerHead.last_chunks`).
    """

    def __init__(self, worker: Worker, settings: HttpSettings, count: Count) -> None:
        self._attempts = Attempts(worker, count)
        self._settings = settings

    async def answer(
        self,
        http: Request,
        request: GenerateRequest,
        *,
        kind: Kind,
        model: str,
        stream: bool,
        include_usage: bool,
    ) -> Response:
        """The response to a valid request; its status is decided by the first event.

        Raises ApiError, or ClientGone when nobody is left to answer.
        """
        answer_id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        head = AnswerHead(kind, answer_id, int(time.time()), model, include_usage)
        # Until the response starts, nobody else looks whether the client is still there.
        return await _while_connected(http, self._begin(request, head, stream))

    async def _begin(self, request: GenerateRequest, head: AnswerHead, stream: bool) -> Response:
        # A stream shows its first token when it comes; else nobody sees a thing before the end.
        events = self._attempts.run(request, whole=not stream)
        handed_over = False
        try:
            async with asyncio.timeout(self._settings.request_timeout_s) as limit:
                first = await anext(events)
                if isinstance(first, Failed):
                    raise self.error(first)
                if stream:
                    handed_over = True
                    source = self._stream(request, head, first, events, limit.when())
                    return EventStream(source, _headers(first, degraded=first.degraded))
                return await self._whole(head, first, events)
        except TimeoutError as error:
            raise self._timed_out() from error
        finally:
            if not handed_over:
                await _close(events)

    async def _whole(
        self, head: AnswerHead, first: Event, events: AsyncIterator[Event]
    ) -> Response:
        text = ""
        current = first
        while isinstance(current, Piece):
            text += current.text
            current = await anext(events)
        if isinstance(current, Failed):
            raise self.error(current)
        headers = _headers(first, degraded=current.degraded)
        if current.quality is not None:
            headers["x-moetier-quality"] = current.quality
        return JSONResponse(head.whole(text, current), headers=headers)

    async def _stream(
        self,
        request: GenerateRequest,
        head: AnswerHead,
        first: Event,
        events: AsyncIterator[Event],
        deadline: float | None,
    ) -> AsyncIterator[str]:
        """Server-sent events. A failure is an error event and the end, without DONE: the body is
        whole all the same, so that no client takes it for a broken connection.
        """
        try:
            if (opening := head.first_chunk()) is not None:
                yield opening
            current = first
            while isinstance(current, Piece):
                yield head.text_chunk(current.text)
                async with asyncio.timeout_at(deadline):
                    current = await anext(events)
            if isinstance(current, Finished):
                yield head.last_chunks(current)
            else:
                yield event(self.error(current).body(request.request_id))
        except TimeoutError:
            yield event(self._timed_out().body(request.request_id))
        except Exception:
            logger.exception("request %s failed in the midst of its stream", request.request_id)
            mistake = ApiError(500, "internal error in the midst of it", code="internal_error")
            yield event(mistake.body(request.request_id))
        finally:
            await _close(events)

    def error(self, failed: Failed) -> ApiError:
        """The HTTP error that a worker's failure is."""
        again = self._settings.retry_after_s
        message, field = failed.message, failed.field
        match failed.kind:
            case "invalid":
                return ApiError(400, message, param=field)
            case "context_length":
                return ApiError(400, message, param=field, code="context_length_exceeded")
            case "queue_full":
                return ApiError(429, message, code="queue_full", retry_after_s=again)
            case "unavailable" | "stopped":
                return ApiError(503, message, code="unavailable", retry_after_s=again)
            case "internal":
                return ApiError(500, message, code="internal_error")

    def _timed_out(self) -> ApiError:
        seconds = self._settings.request_timeout_s
        return ApiError(408, f"the answer took longer than {seconds:g} s", code="timeout")


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed with the response, however that ends."""

    def __init__(self, source: AsyncIterator[str], headers: dict[str, str]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(source, media_type="text/event-stream", headers=headers)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await _close(self._source)


def _headers(first: Event, *, degraded: bool) -> dict[str, str]:
    """What an answer's headers tell of how it came to be."""
    assert not isinstance(first, Failed), "an answer begins with a Piece or a Finished"
    headers = {} if first.version is None else {"x-moetier-version": first.version}
    return {**headers, "x-moetier-degraded": "true"} if degraded else headers


async def _while_connected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; the work is cancelled, and ClientGone raised, once the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _close(events: AsyncIterator[Any]) -> None:
    """Close an async generator now instead of when it is collected."""
    if (close := getattr(events, "aclose", None)) is not None:
        await close()
