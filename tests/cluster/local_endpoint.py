"""The whole HTTP surface over an engine of this process: uvicorn on a thread, no Ray.

What the HTTP tests share. The engine runs the real mini model with its own experts; `OwnExperts`
can be told to fail or to report degraded rows, since those two come from the experts.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.routes import create_app
from cluster.settings import HttpSettings
from cluster.snapshot import ClusterSnapshot, IngressStats, TierStatus
from expert_store.errors import ExpertUnavailableError
from gpu_worker.counters import StepCounters
from gpu_worker.engine import Engine
from gpu_worker.experts import ExpertsFailed
from gpu_worker.governor import Governor
from gpu_worker.messages import ModelDescription
from gpu_worker.model import ModelRunner, StepReport
from gpu_worker.service import EngineService

MINI = Path(__file__).resolve().parents[2] / "models" / "mixtral-mini"
MAX_SEQUENCES = 2
MAX_WAITING = 2
MAX_CONTEXT = 256


class OwnExperts:
    """The model keeps its own experts. After `fail_after` steps one is lost, once."""

    def __init__(self) -> None:
        self.fail_after: int | None = None
        self.degraded = False
        self._gate = threading.Event()
        self._at_gate = threading.Event()
        self._gate.set()

    @contextmanager
    def held(self) -> Iterator[threading.Event]:
        """Hold the next step; the event is set once one is held."""
        self._at_gate.clear()
        self._gate.clear()
        try:
            yield self._at_gate
        finally:
            self._gate.set()

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: Any = None) -> None:
        if not self._gate.is_set():
            self._at_gate.set()
            assert self._gate.wait(60), "a test held a step for too long"
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                self.fail_after = None
                cause = ExpertUnavailableError("codes of layer 1 expert 2: no copy (test)")
                raise ExpertsFailed(1, {(1, 2): (0,)}, cause, StepCounters())  # type: ignore[dict-item]

    def run_layer(self, *args: Any) -> torch.Tensor:
        raise AssertionError("a plain model does not call this")

    def end(self) -> StepReport:
        counters = StepCounters(moved_bytes={("disk", "codes"): 10}, degraded_pairs=self.degraded)
        return StepReport(counters, {0: 1} if self.degraded else {})


class LocalTiers:
    """The cluster as this process sees it; `tiers` can be changed to break something."""

    def __init__(self, service: EngineService) -> None:
        self._service = service
        self.tiers: tuple[TierStatus, ...] = (
            TierStatus("store-0", "store", "here", quarantined=3, repaired=2),
        )

    async def snapshot(self, ingress: IngressStats) -> ClusterSnapshot:
        return ClusterSnapshot(self.tiers, (self._service.load(),), (ingress,))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running endpoint and what a test may look into."""

    url: str
    service: EngineService
    experts: OwnExperts
    tiers: LocalTiers


@contextmanager
def running_endpoint(*, governor: Governor | None = None, **http: Any) -> Iterator[Endpoint]:
    """Start it, and end all of its threads afterwards."""
    model = AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32).eval()
    experts = OwnExperts()
    engine = Engine(
        ModelRunner(model, experts),
        AutoTokenizer.from_pretrained(MINI),
        max_sequences=MAX_SEQUENCES,
        max_context=MAX_CONTEXT,
        prefill_chunk=64,
        max_waiting=MAX_WAITING,
        governor=governor,
    )
    service = EngineService(engine, ModelDescription("mini", "mixtral", MAX_CONTEXT, 1_700_000_000))
    tiers = LocalTiers(service)
    app = create_app(service, tiers, HttpSettings(**{"max_body_bytes": 65536, **http}))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # who connects before uvicorn runs waits instead of being refused
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", service, experts, tiers)
        finally:
            server.should_exit = True
            thread.join(30)
            service.close()
            assert not thread.is_alive(), "uvicorn did not stop"


def wait_until(condition: Any, what: str, deadline_s: float = 20.0) -> None:
    """Poll something that another thread brings about."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        threading.Event().wait(0.005)
