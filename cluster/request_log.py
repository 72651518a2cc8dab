"""Gives every HTTP request an id, counts its status and writes one log line about it.

A plain ASGI layer: it sees statuses and times, never bodies or prompts.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
HEADER = b"x-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
NO_RESPONSE = 499
"""Counted when the client left before a status was sent (nginx' number for it)."""


class RequestLog:
    """ASGI middleware. `answered` is shared with whoever reads the counts.

    With `stamp` the response carries the id; Serve's own proxy does that by itself.
    """

    def __init__(self, app: ASGIApp, answered: Counter[tuple[str, int]], stamp: bool) -> None:
        self._app = app
        self._answered = answered
        self._stamp = stamp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = NO_RESPONSE
        start_s = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._stamp:
                    headers = [*message.get("headers", []), (HEADER, request_id.encode())]
                    message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = _route(scope["path"])
            self._answered[route, status] += 1
            elapsed_ms = (time.monotonic() - start_s) * 1000
            logger.info("%s %s %d %.1f ms", request_id, route, status, elapsed_ms)


def _request_id(scope: Scope) -> str:
    """The client's own id when it is a tame one, else a new one."""
    for name, value in scope["headers"]:
        text = value.decode("latin-1")
        if name.lower() == HEADER and REQUEST_ID.fullmatch(text):
            return str(text)
    return f"req-{secrets.token_hex(12)}"


def _route(path: str) -> str:
    """One of ROUTES, or "other": what clients type must not become metric labels."""
    return path if path in ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
