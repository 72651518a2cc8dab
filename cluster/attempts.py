"""One request on one worker after another, as long as its client has seen nothing of an answer.

Decides when to try again; who runs requests, and how they are lost, it is told. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gpu_worker.messages import Event, Failed, Finished, GenerateRequest, Piece

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Workers that a request is sent to. Few: a request may itself be what ends them."""
FIRST_PAUSE_S = 0.05
"""Before the second attempt; twice as long before each further one."""


class WorkerLostError(Exception):
    """The worker that ran the request died, or can no longer be reached."""


class Generator(Protocol):
    """Somebody who runs requests: one GPU worker, or all of them behind a router."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Pieces, then exactly one Finished or Failed. Closing it ends the request.

        Raises WorkerLostError when the worker is lost before the end.
        """
        ...


@dataclass(slots=True)
class Count:
    """Attempts after a request's first, over all requests of one ingress."""

    retries: int = 0


class Attempts:
    """Runs requests with retries. The deadline is the caller's: it cancels."""

    def __init__(
        self,
        worker: Generator,
        count: Count,
        *,
        pause: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._worker = worker
        self._count = count
        self._pause = pause

    async def run(self, request: GenerateRequest, *, whole: bool) -> AsyncGenerator[Event, None]:
        """The events of the attempt that came through, or of the last one.

        A worker that is lost, or stops, before its first event is replaced by another. With `whole`
        nothing is given before the end: all pieces come as one, and a worker lost in the midst is
        replaced too, since nobody has seen what it said (what a new one says may differ where the
        request samples without a seed). Events of two attempts are never mixed, so neither are the
        versions of two stores.
        """
        attempt = 1
        while True:
            shown = ended = False
            lost = "its answer broke off"
            events = self._worker.generate(replace(request, attempt=attempt))
            try:
                async with aclosing(_joined(events) if whole else _closing(events)) as given:
                    async for event in given:
                        if isinstance(event, Failed) and event.kind == "stopped":
                            lost = event.message
                            break
                        shown, ended = True, not isinstance(event, Piece)
                        yield event
            except WorkerLostError as error:
                lost = str(error)
            if ended:
                return
            told = "sent on" if not shown and attempt < MAX_ATTEMPTS else "given up"
            where = f"request {request.request_id}, attempt {attempt}"
            logger.warning("%s: worker lost, %s: %s", where, told, lost)
            if shown or attempt == MAX_ATTEMPTS:
                yield _given_up(shown, attempt)
                return
            await self._pause(FIRST_PAUSE_S * 2 ** (attempt - 1))
            attempt += 1
            self._count.retries += 1


def _given_up(shown: bool, attempt: int) -> Failed:
    if shown:
        message = "the GPU worker was lost in the midst of the answer; ask again"
    else:
        message = f"{attempt} GPU workers were lost while they ran this request; ask again"
    return Failed("unavailable", message)


async def _joined(events: AsyncIterator[Event]) -> AsyncGenerator[Event, None]:
    """All pieces as one before the end; a failure alone."""
    pieces: list[Piece] = []
    async with aclosing(_closing(events)) as given:
        async for event in given:
            if isinstance(event, Piece):
                pieces.append(event)
                continue
            if pieces and isinstance(event, Finished):
                text = "".join(piece.text for piece in pieces)
                yield Piece(text, pieces[-1].degraded, pieces[0].version)
            yield event


async def _closing(events: AsyncIterator[Event]) -> AsyncGenerator[Event, None]:
    """The events, closed with this iteration where they can be."""
    try:
        async for event in events:
            yield event
    finally:
        if (close := getattr(events, "aclose", None)) is not None:
            await close()
