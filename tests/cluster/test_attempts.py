"""Goal: a request is sent on exactly as long as its client has seen nothing, and never mixed.

Method: workers of this process that die at the n-th event, for every n, before and after each
other; then the same over HTTP, where a client must see a whole body with a typed end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

import httpx2
import pytest
from fastapi.testclient import TestClient

from cluster.attempts import FIRST_PAUSE_S, MAX_ATTEMPTS, Attempts, Count, WorkerLostError
from cluster.routes import create_app
from cluster.settings import HttpSettings
from cluster.snapshot import ClusterSnapshot, IngressStats
from gpu_worker.messages import (
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ModelDescription,
    Piece,
)
from gpu_worker.sequence import SamplingParams

REQUEST = GenerateRequest("r-7", SamplingParams(), prompt="a")
Death = Literal["lost", "stopped", "broken off"]
DEATHS: tuple[Death, ...] = ("lost", "stopped", "broken off")


def answer(version: str) -> list[Event]:
    """A worker's whole answer; its text names the worker."""
    pieces = [Piece(f"{version}{i}", version=version if i == 0 else None) for i in range(3)]
    return [*pieces, Finished("stop", 1, 3, False)]


class DyingWorkers:
    """The n-th request meets a worker that dies before its event of that number, or lives on."""

    def __init__(self, deaths: Sequence[tuple[int, Death] | None]) -> None:
        self._deaths = list(deaths)
        self.asked: list[GenerateRequest] = []
        self.open = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        number = len(self.asked)
        self.asked.append(request)
        death = self._deaths[number] if number < len(self._deaths) else None
        self.open += 1
        try:
            for at, event in enumerate(answer("abcd"[number])):
                if death is not None and death[0] == at:
                    if death[1] == "lost":
                        raise WorkerLostError("died (test)")
                    if death[1] == "stopped":
                        yield Failed("stopped", "stops (test)")
                    return
                yield event
        finally:
            self.open -= 1

    async def describe(self) -> ModelDescription:
        return ModelDescription("mini", "mixtral", 100, 5)


def run(workers: DyingWorkers, *, whole: bool) -> tuple[list[Event], int, list[float]]:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def collect() -> list[Event]:
        attempts = Attempts(workers, count, pause=pause)
        return [event async for event in attempts.run(REQUEST, whole=whole)]

    count = Count()
    events = asyncio.run(collect())
    assert workers.open == 0, "every generator was closed"
    assert len(pauses) == count.retries == len(workers.asked) - 1
    return events, count.retries, pauses


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("at", range(4))
def test_a_stream_is_sent_on_only_before_its_first_event(at: int, death: Death) -> None:
    workers = DyingWorkers([(at, death)])
    events, retries, _ = run(workers, whole=False)
    if at == 0:
        assert events == answer("b")
        assert [r.attempt for r in workers.asked] == [1, 2]
        assert {r.request_id for r in workers.asked} == {"r-7"}, "the id stays"
        return
    assert retries == 0
    assert events[:-1] == answer("a")[:at]
    last = events[-1]
    assert isinstance(last, Failed)
    assert last.kind == "unavailable"


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("ats", itertools.product(range(4), repeat=2))
def test_a_whole_answer_is_run_again_wherever_its_workers_died(
    ats: tuple[int, int], death: Death
) -> None:
    events, retries, pauses = run(DyingWorkers([(at, death) for at in ats]), whole=True)
    assert events == [Piece("c0c1c2", version="c"), answer("c")[-1]], "of one worker alone"
    assert retries == 2
    assert pauses == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S]


@pytest.mark.parametrize("whole", [True, False])
def test_attempts_are_bounded(whole: bool) -> None:
    workers = DyingWorkers([(0, "lost")] * 10)
    (failed,), retries, _ = run(workers, whole=whole)
    assert isinstance(failed, Failed)
    assert failed.kind == "unavailable"
    assert retries == MAX_ATTEMPTS - 1
    assert len(workers.asked) == MAX_ATTEMPTS


@pytest.mark.parametrize("kind", ["invalid", "context_length", "queue_full", "unavailable"])
def test_what_another_worker_would_say_too_is_not_sent_on(kind: Any) -> None:
    class Refusing(DyingWorkers):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            self.asked.append(request)
            yield Failed(kind, "no (test)")

    for whole in (True, False):
        workers = Refusing([])
        events, _, _ = run(workers, whole=whole)
        assert events == [Failed(kind, "no (test)")]


def test_leaving_closes_the_worker_that_runs() -> None:
    workers = DyingWorkers([(0, "lost")])

    async def leave() -> None:
        events = Attempts(workers, Count()).run(REQUEST, whole=False)
        assert await anext(events) == answer("b")[0]
        assert workers.open == 1
        await events.aclose()

    asyncio.run(leave())
    assert workers.open == 0


class NoTiers:
    async def snapshot(self, ingress: IngressStats) -> ClusterSnapshot:
        return ClusterSnapshot(ingresses=(ingress,))


BODY: dict[str, Any] = {"model": "mini", "prompt": "a"}


def post(workers: DyingWorkers, **body: Any) -> tuple[httpx2.Response, str]:
    """The answer, and the endpoint's metrics after it."""
    app = create_app(workers, NoTiers(), HttpSettings())
    client: Any = TestClient(app)
    response = client.post("/v1/completions", json={**BODY, **body}, headers={"x-request-id": "q"})
    return response, client.get("/metrics").text


@pytest.mark.parametrize("at", range(4))
def test_over_http_a_whole_answer_never_shows_a_lost_worker(at: int) -> None:
    response, metrics = post(DyingWorkers([(at, "lost")]))
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "b0b1b2"
    assert response.headers["x-moetier-version"] == "b"
    assert 'moetier_request_retries_total{replica="local"} 1' in metrics


@pytest.mark.parametrize("at", range(4))
def test_over_http_a_stream_ends_with_an_error_event_once_it_has_begun(at: int) -> None:
    response, _ = post(DyingWorkers([(at, "lost")]), stream=True)
    assert response.status_code == 200
    assert response.headers["x-moetier-version"] == ("b" if at == 0 else "a")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    if at == 0:
        assert events[-1] == "[DONE]"
        return
    assert [json.loads(e)["choices"][0]["text"] for e in events[:-1]] == ["a0", "a1", "a2"][:at]
    last = json.loads(events[-1])
    assert last["error"]["code"] == "unavailable"
    assert last["error"]["type"] == "overloaded_error"
    assert last["request_id"] == "q"


def test_over_http_with_no_worker_left_it_is_503_with_retry_after() -> None:
    for stream in (True, False):
        response, _ = post(DyingWorkers([(0, "lost")] * 3), stream=stream)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["request_id"] == "q"
        assert response.json()["error"]["code"] == "unavailable"


def test_a_mistake_of_ours_in_a_stream_is_an_error_event_too() -> None:
    class Mistaken(DyingWorkers):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            yield Piece("a")
            raise KeyError("inside")

    response, _ = post(Mistaken([]), stream=True)
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "internal_error"
    assert "inside" not in response.text
