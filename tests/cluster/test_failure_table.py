"""Goal: DESIGN.md section 7, row by row, as an HTTP client sees it.

Method: one process, every part real: the mini model's store behind gRPC record servers and a
near-data server, the engine, the routes. What fails is closed, damaged or taken away here. Rows in
other files: too much work and a client that leaves in test_ingress.py, a GPU worker at every event
in test_attempts.py, Redis in test_directory_redis.py, killed processes in test_rollout_ray.py and
the fault suite.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cluster.routes import create_app
from cluster.settings import HttpSettings
from cluster.snapshot import ClusterSnapshot, IngressStats
from cluster.tier_link import Endpoints, TierLink, connect
from expert_store.actor import StoreHandle
from expert_store.format import load_manifest
from expert_store.listing import Listing
from expert_store.rpc import RecordServer
from expert_store.segment import Segment
from expert_store.types import RecordKind, RecordRequest
from gpu_worker.build import build_engine
from gpu_worker.config import NearDataPolicy, WorkerConfig
from gpu_worker.messages import Event, GenerateRequest, ModelDescription
from gpu_worker.protocols import ExpertSource
from gpu_worker.service import EngineService
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpServer
from tests.circles import no_tensor_in_a_circle
from tests.gpu_worker.sources import LossySource

BODY: dict[str, Any] = {
    "model": "mini",
    "prompt": "The return statement",
    "max_tokens": 6,
    "temperature": 0,
    "ignore_eos": True,
}


class System:
    """Servers, a worker and the endpoint over them."""

    def __init__(self, stack: ExitStack, stores: list[Path], near_data: NearDataPolicy) -> None:
        self.manifest = load_manifest(stores[0])
        self._stack = stack
        self.record_servers = [self._records(store) for store in stores]
        self.near_data_server = NdpServer(Executor(self._segment(stores[0]), num_threads=1))
        stack.callback(self.near_data_server.close)
        self.services = [self._service(stores[0], near_data)]
        self._turn = itertools.count()
        app = create_app(self, self, HttpSettings())
        self.client: Any = stack.enter_context(TestClient(app))

    def add_worker(self, store: Path) -> None:
        self.services.append(self._service(store, "off"))

    def _segment(self, store: Path) -> Segment:
        segment = Segment(store)
        self._stack.callback(segment.close)
        return segment

    def _records(self, store: Path) -> RecordServer:
        server = RecordServer(self._segment(store))
        self._stack.callback(server.close)
        return server

    def _service(self, store: Path, near_data: NearDataPolicy) -> EngineService:
        link = self._link(store)
        self.source = FadingSource(link.source)
        config = WorkerConfig(
            device="cpu",
            dtype="float32",
            cache_bytes=0,
            max_sequences=2,
            max_context=128,
            prefetch="never",
            near_data=near_data,
        )
        behind = None if near_data == "off" else link.near_data
        engine = build_engine(store, self.source, behind, config)
        version = self.manifest.version
        told = ModelDescription("mini", "mixtral", engine.max_context, 5, version)
        service = EngineService(
            engine, told, replica=f"worker-{len(getattr(self, 'services', []))}"
        )
        self._stack.callback(link.close)
        self._stack.callback(service.close)
        return service

    def _link(self, store: Path) -> TierLink:
        version = self.manifest.version
        stores = tuple(
            StoreHandle(None, Listing(f"store-{i}", "records", version, "here", each.addresses))
            for i, each in enumerate(self.record_servers)
        )
        ndp = Listing("ndp-0", "near_data", version, "here", self.near_data_server.addresses)
        endpoints = Endpoints(1, stores, (ndp,))
        return connect(endpoints, str(store), transport="grpc", directory=None)

    # What the routes need: a router that takes turns, and the cluster's counts.

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        return self.services[next(self._turn) % len(self.services)].generate(request)

    async def describe(self) -> ModelDescription:
        return await self.services[0].describe()

    async def snapshot(self, ingress: IngressStats) -> ClusterSnapshot:
        workers = tuple(service.load() for service in self.services)
        return ClusterSnapshot(workers=workers, ingresses=(ingress,))

    def ask(self, **more: Any) -> Any:
        return self.client.post("/v1/completions", json={**BODY, **more})

    def text(self) -> str:
        """An answer that must be whole."""
        answer = self.ask()
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-moetier-version"] == self.manifest.version
        return str(answer.json()["choices"][0]["text"])

    def counted(self, prefix: str) -> float:
        """The sum of a metric's samples whose name and labels begin so."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(prefix))

    @contextmanager
    def lost(self, kind: RecordKind, *, after_tokens: int = 0) -> Iterator[None]:
        """Every copy of every record of a kind is gone, once the worker has made so many tokens."""
        self.source.gone = {RecordRequest(key, kind) for key in self.manifest.experts}
        self.source.is_due = lambda: self.services[0].load().output_tokens >= after_tokens
        try:
            yield
        finally:
            self.source.gone = self.source.lost = set()

    @contextmanager
    def late(self) -> Iterator[None]:
        """Every read of compensators hangs until the end of this."""
        self.source.in_time.clear()
        try:
            yield
        finally:
            self.source.in_time.set()


class FadingSource(LossySource):
    """Loses what is `gone` from when it `is_due`; compensators wait until they are `in_time`."""

    def __init__(self, inner: ExpertSource) -> None:
        super().__init__(inner, [])
        self.gone: set[RecordRequest] = set()
        self.is_due: Callable[[], bool] = lambda: True
        self.in_time = threading.Event()
        self.in_time.set()

    def before(self, requests: Sequence[RecordRequest]) -> None:
        if any(request.kind == "factors" for request in requests):
            assert self.in_time.wait(timeout=30)
        if self.gone and self.is_due():
            self.lost = self.gone
        super().before(requests)


@pytest.fixture(scope="module")
def store(mini_cache: Path) -> Path:
    return mini_cache / "stores" / "mixtral-mini"


@pytest.fixture(scope="module")
def system(store: Path) -> Iterator[System]:
    with ExitStack() as stack:
        yield System(stack, [store, store], "off")


@pytest.fixture(scope="module")
def whole(system: System) -> str:
    """The answer while nothing is wrong."""
    assert "x-moetier-degraded" not in system.ask().headers
    return system.text()


def test_compensators_gone_everywhere_answers_go_on_degraded_counted_and_said(
    system: System, whole: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = system.counted("moetier_degraded_requests_total")
    pairs = system.counted('moetier_pairs_total{replica="worker-0",how="degraded"}')
    with system.lost("factors"), caplog.at_level(logging.WARNING, "gpu_worker.outage"):
        answers = [system.ask() for _ in range(2)]
        stream = system.ask(stream=True)
    for answer in answers:
        assert answer.status_code == 200
        assert answer.headers["x-moetier-degraded"] == "true"
    assert stream.headers["x-moetier-degraded"] == "true"
    assert '"moetier":{"degraded":true,"quality":null}' in stream.text
    assert system.counted("moetier_degraded_requests_total") == before + 3
    assert system.counted('moetier_pairs_total{replica="worker-0",how="degraded"}') > pairs
    told = [r.message for r in caplog.records if "compensators cannot be had" in r.message]
    assert len(told) == 1, "a line for the outage, not for each token"
    assert system.text() == whole, "full quality once they are back"


def test_compensators_lost_in_the_midst_of_a_stream_are_told_at_its_end(
    system: System, whole: str
) -> None:
    first_tokens = system.services[0].load().output_tokens + 3
    with system.lost("factors", after_tokens=first_tokens):
        answer = system.ask(max_tokens=10, stream=True)
    assert "x-moetier-degraded" not in answer.headers, "not known at the first token"
    *_, finish, done = (line.removeprefix("data: ") for line in answer.text.split("\n\n") if line)
    assert done == "[DONE]"
    assert json.loads(finish)["moetier"] == {"degraded": True, "quality": None}
    assert system.text() == whole


def test_compensators_late_answers_go_on_degraded_and_said(system: System, whole: str) -> None:
    before = system.counted("moetier_degraded_requests_total")
    with system.late():
        started_s = time.monotonic()
        answers = [system.ask() for _ in range(2)]
        stream = system.ask(stream=True)
        took_s = time.monotonic() - started_s
    for answer in answers:
        assert answer.status_code == 200
        assert answer.headers["x-moetier-degraded"] == "true"
    assert stream.headers["x-moetier-degraded"] == "true"
    assert took_s < 15, "one wait for all, not one a layer and token"
    assert system.counted("moetier_degraded_requests_total") == before + 3
    end_s = time.monotonic() + 20
    while "x-moetier-degraded" in system.ask().headers:
        assert time.monotonic() < end_s, "full quality once they have landed"
    assert system.text() == whole


def test_codes_gone_everywhere_are_503_and_typed_and_others_go_on(
    system: System, whole: str
) -> None:
    with system.lost("codes"):
        for stream in (False, True):
            answer = system.ask(stream=stream)
            assert answer.status_code == 503, answer.text
            assert answer.headers["retry-after"] == "1"
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("overloaded_error", "unavailable")
            assert "codes of layer" in error["message"]
    assert system.counted("moetier_request_retries_total") == 0, "no worker has them"
    assert system.text() == whole


def test_a_store_replica_that_dies_is_not_noticed(system: System, whole: str) -> None:
    system.record_servers[0].close(0)
    for _ in range(3):
        answer = system.ask()
        assert answer.status_code == 200
        assert "x-moetier-degraded" not in answer.headers
        assert answer.json()["choices"][0]["text"] == whole


def test_a_gpu_worker_that_stops_is_replaced_by_another(
    system: System, whole: str, store: Path
) -> None:
    """Its slots are free at once for nobody: the other one answers all."""
    system.add_worker(store)
    system.services[0].close()
    before = system.counted("moetier_request_retries_total")
    for stream in (False, True, False, True):
        answer = system.ask(stream=stream)
        assert answer.status_code == 200
        assert "error" not in answer.text
    assert system.text() == whole
    assert system.counted("moetier_request_retries_total") > before


def test_a_near_data_worker_that_dies_is_streamed_instead(store: Path) -> None:
    with ExitStack() as stack:
        system = System(stack, [store], "low_bit")
        system.text()
        near = 'moetier_pairs_total{replica="worker-0",how="near_data"}'
        assert system.counted(near) > 0
        system.near_data_server.close(0)
        with no_tensor_in_a_circle():
            assert system.text()  # the first one finds out
        before = system.counted(near)
        answer = system.ask()
        assert answer.status_code == 200
        assert "x-moetier-degraded" not in answer.headers
        assert system.counted(near) == before


def test_a_corrupt_record_is_read_from_the_other_copy(
    store: Path, tmp_path: Path, whole: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(store, damaged)
    for file in (damaged / "codes").iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2 :: 997] = bytes(b ^ 0x5A for b in data[len(data) // 2 :: 997])
        file.write_bytes(data)
    with ExitStack() as stack:
        system = System(stack, [damaged, store], "off")
        assert system.text() == whole
