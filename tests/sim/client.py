"""A client of the simulated cluster: one HTTP request straight into an ingress's ASGI app."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from tests.sim.fault_plan import Ask


@dataclass(slots=True)
class Answer:
    """What came back of one request, and when (virtual seconds)."""

    ask: Ask
    began_s: float
    ended_s: float | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    left: bool = False
    crash: BaseException | None = None

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The JSON objects of the body; a stream's events without DONE."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            lines = [line for line in self.body.decode().split("\n\n") if line]
            texts = [line.removeprefix("data: ") for line in lines]
            return [json.loads(text) for text in texts if text != "[DONE]"]
        return [json.loads(self.body)]

    @property
    def is_done(self) -> bool:
        """Whether a stream came to its end, or the answer is whole."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return self.body.endswith(b"data: [DONE]\n\n")
        return self.status == 200

    @property
    def error(self) -> dict[str, Any] | None:
        found = [part["error"] for part in self.objects if "error" in part]
        return found[0] if found else None

    @property
    def text(self) -> str:
        choices = [choice for part in self.objects for choice in part.get("choices", ())]
        return "".join(choice.get("text") or "" for choice in choices)

    @property
    def is_degraded(self) -> bool:
        parts = self.objects
        told = any(
            part.get("moetier_degraded") or part.get("moetier", {}).get("degraded")
            for part in parts
        )
        return told or self.headers.get("x-moetier-degraded") == "true"


async def send(app: Any, body: dict[str, Any], answer: Answer) -> None:
    """Ask and take the answer; the client hangs up when its plan says so."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def take(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        elif message["type"] == "http.response.body":
            answer.body += message.get("body", b"")

    if answer.ask.leaves_after_s is not None:
        answer.left = True
        loop.call_later(answer.ask.leaves_after_s, gone.set)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("client", 1),
        "server": ("ingress", 80),
        "state": {},
    }
    try:
        await app(scope, receive, take)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - judged with the answer
        answer.crash = error
    answer.ended_s = loop.time()
