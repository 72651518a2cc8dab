"""The load: a few clients, each with one request after another, streamed and whole, until told.

`python -m benchmarks.faults.client` is a process of its own on a host of its own, and knows of the
cluster what any client does: the URLs. It takes the next one where a connection is refused, as a
load balancer would, and tries nothing twice once a request was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import httpx2

from benchmarks.faults.outcomes import Kind, Outcome, dump

PROMPTS = (
    "The return statement",
    "It was a dark and stormy night, and the",
    "def parse(text):",
    "A list is a mutable sequence. A tuple is",
    "usage: grep [OPTION]... PATTERNS [FILE]...",
    "To be, or not to be: that is the question. Whether",
)
MAX_TOKENS = 32
CONNECT_S = 1.0
REQUEST_S = 120.0
STREAMED_SHARE = 0.7
PAUSE_S = 0.2
"""After a failure, so that a cluster that refuses all is not asked thousands of times a second."""


def request(prompt: int) -> dict[str, Any]:
    """The body of a request for a whole answer to one of the prompts."""
    return {
        "model": "mini",
        "prompt": PROMPTS[prompt],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


class Load:
    """Several clients at once over the doors; every request leaves two lines in `file`."""

    def __init__(self, doors: Sequence[str], file: TextIO, seed: int) -> None:
        self._doors, self._file, self._seed = tuple(doors), file, seed
        self._number = 0
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """No further request; those under way go on to their end."""
        self._stopped.set()

    async def run(self, clients: int) -> None:
        async with asyncio.TaskGroup() as group:
            for client in range(clients):
                group.create_task(self._client(random.Random(f"{self._seed} {client}")))

    async def _client(self, choose: random.Random) -> None:
        while not self._stopped.is_set():
            kind: Kind = "stream" if choose.random() < STREAMED_SHARE else "unary"
            self._number += 1
            begun = Outcome(self._number, kind, choose.randrange(len(PROMPTS)), time.monotonic())
            self._write(begun)
            ended = await self._ask(begun)
            self._write(ended)
            if ended.error:
                await asyncio.sleep(PAUSE_S)

    def _write(self, outcome: Outcome) -> None:
        self._file.write(dump(outcome))
        self._file.flush()

    async def _ask(self, begun: Outcome) -> Outcome:
        body = {**request(begun.prompt), "stream": begun.kind == "stream"}
        answer = Answer(begun)
        # A connection of its own for each request: none is left over from a part that has gone.
        timeout = httpx2.Timeout(REQUEST_S, connect=CONNECT_S)
        try:
            async with asyncio.timeout(REQUEST_S), httpx2.AsyncClient(timeout=timeout) as http:
                for attempt in range(len(self._doors)):
                    door = self._doors[(begun.number + attempt) % len(self._doors)]
                    try:
                        await answer.read(http, f"{door}/v1/completions", body)
                        break
                    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                        answer.refused(error)
        except TimeoutError:
            answer.error = f"no end within {REQUEST_S:g} s"
        except httpx2.HTTPError as error:
            answer.error = f"{type(error).__name__} {error}".strip()
        return answer.outcome()


class Answer:
    """What has come of one request so far."""

    def __init__(self, begun: Outcome) -> None:
        self._begun = begun
        self._last_s = begun.started_s
        self._waited = (0.0, begun.started_s)
        self._first_s: float | None = None
        self._tokens, self._text = 0, ""
        self._status: int | None = None
        self._degraded, self._refused, self._door = False, 0, ""
        self.error = ""

    def outcome(self) -> Outcome:
        """As it is now, at its end."""
        self._wait()
        return replace(
            self._begun,
            ended_s=self._last_s,
            first_token_s=self._first_s,
            longest_wait_s=self._waited[0],
            wait_from_s=self._waited[1],
            tokens=self._tokens,
            status=self._status,
            degraded=self._degraded,
            error=self.error,
            text=self._text,
            door=self._door,
            refused_doors=self._refused,
        )

    def refused(self, error: Exception) -> None:
        """A door took no connection."""
        self._refused += 1
        self.error = f"{type(error).__name__} at every door"

    async def read(self, http: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> None:
        """Send it and take all that comes. Raises httpx2.HTTPError when the connection fails."""
        async with http.stream("POST", url, json=body) as response:
            self._status, self._door, self.error = response.status_code, url, ""
            self._degraded = "x-moetier-degraded" in response.headers
            if response.status_code != 200:
                await response.aread()
                self.error = f"{response.status_code} {_told(response.text)}"
            elif body["stream"]:
                await self._read_stream(response)
            else:
                await response.aread()
                self._take(response.json())
                self._tokens = response.json()["usage"]["completion_tokens"]

    async def _read_stream(self, response: httpx2.Response) -> None:
        is_whole = False
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                is_whole = True
            elif line.startswith("data: "):
                event = json.loads(data)
                if "error" in event:
                    self.error = f"error event: {_told(data)}"
                    return
                self._take(event)
        if not is_whole:
            self.error = "the stream ended without [DONE]"

    def _take(self, event: dict[str, Any]) -> None:
        self._wait()
        self._degraded |= bool(event.get("moetier_degraded"))
        if event["choices"] and event["choices"][0]["text"]:
            self._first_s = self._first_s or self._last_s
            self._tokens += 1
            self._text += event["choices"][0]["text"]

    def _wait(self) -> None:
        now = time.monotonic()
        self._waited = max(self._waited, (now - self._last_s, self._last_s))
        self._last_s = now


def _told(text: str) -> str:
    """The code of an OpenAI-style error, or how the text begins."""
    try:
        error = json.loads(text)["error"]
        return str(error["code"] or error["message"])
    except (ValueError, KeyError, TypeError):
        return text[:80]


async def _main(arguments: argparse.Namespace) -> None:
    with arguments.out.open("w") as file:
        load = Load(arguments.doors, file, arguments.seed)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, load.stop)
        await load.run(arguments.clients)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("doors", nargs="+", metavar="URL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(_main(parser.parse_args()))
