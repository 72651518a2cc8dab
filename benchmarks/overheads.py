"""Where the milliseconds of a decode step go, and what of them is our own overhead.

`python -m benchmarks.overheads` runs a model (the bundled one, or `--store`) on one CPU core at
batch 1, 8 and 32: all
experts resident, all streamed from a memory node (another process, over gRPC on the loopback), and
its low-bit pairs near data. In turn with every step, the dense model alone does the same forward
with transformers' own cache and no experts. Own overhead is what a step takes above that and the
expert kernels. The gate: greedy tokens are the same resident and streamed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.record import RESULTS, provenance, table
from benchmarks.stopwatch import Stopwatch, Timed
from cluster.stores import bundled_store
from cluster.texts import read_texts
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource
from expert_store.segment import Segment
from gpu_worker import experts as experts_module
from gpu_worker.build import OpenModel, build_engine, open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.engine import Engine
from gpu_worker.expert_cache import ExpertCache
from gpu_worker.expert_math import KernelMath
from gpu_worker.experts import StoreExperts
from gpu_worker.local_run import LocalRun
from gpu_worker.look_ahead import LookAhead
from gpu_worker.model import ModelRunner, StepReport, bind_experts
from gpu_worker.scheduler import Scheduler
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as Request
from gpu_worker.stream import Stream
from gpu_worker.streamer import Streamer
from ndp_worker.group import Member, NearDataGroup
from ndp_worker.rpc import NdpClient

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 32
GATE_TOKENS = 8
DENSE, KERNELS, BYTES, NEAR = (
    "dense model",
    "expert kernels",
    "waiting for bytes",
    "waiting for near data",
)
PARTS = (
    Timed(DENSE, ModelRunner, "forward"),
    Timed(KERNELS, KernelMath, "run"),
    Timed(BYTES, Stream, "next"),
    Timed(NEAR, experts_module, "wait"),
    Timed("routing", experts_module, "route"),
    Timed("planning", StoreExperts, "_plan"),
    Timed("cache", ExpertCache, "begin_turn"),
    Timed("cache", ExpertCache, "pin"),
    Timed("cache", ExpertCache, "unpin"),
    Timed("cache", ExpertCache, "put_pinned"),
    Timed("guessing ahead", LookAhead, "settle"),
    Timed("guessing ahead", LookAhead, "start"),
    Timed("starting copies", Streamer, "start"),
    Timed("starting near data", StoreExperts, "_submit"),
    Timed("gathering rows", LocalRun, "run"),
    Timed("gathering rows", LocalRun, "_compute"),
    Timed("summing parts", experts_module, "combine"),
    Timed("rest of a layer", StoreExperts, "run_layer"),
    Timed("scheduling", Scheduler, "schedule"),
    Timed("sampling", Engine, "_sample"),
    Timed("text and events", Engine, "_update"),
    Timed("rest of a step", Engine, "step"),
)


class NoExperts:
    """`StepExperts` that adds nothing."""

    def begin(self, valid_S: Any, token_tags_S: Any = None) -> None:
        pass

    def run_layer(
        self, layer: int, hidden_SH: torch.Tensor, ids: Any, weights: Any
    ) -> torch.Tensor:
        return torch.zeros_like(hidden_SH)

    def end(self) -> StepReport:
        return StepReport(StepCounters(), {})


@dataclass(slots=True)
class Measured:
    """Steps of one setting at one batch; seconds."""

    setting: str
    batch: int
    steps: list[float] = field(default_factory=list)
    dense_alone: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    fetches: int = 0
    near_calls: int = 0
    fetch_s: float = 0.0
    near_s: float = 0.0

    def part_ms(self, part: str) -> float:
        return 1e3 * statistics.median(self.parts.get(part, [0.0]))

    @property
    def overhead(self) -> list[float]:
        """Per step: seconds above dense model alone, kernels and waiting, over the first two."""
        found = []
        for index, step_s in enumerate(self.steps):
            kernels_s = self.parts[KERNELS][index] if KERNELS in self.parts else 0.0
            waited = sum(self.parts[p][index] for p in (BYTES, NEAR) if p in self.parts)
            needed = self.dense_alone[index] + kernels_s
            found.append((step_s - waited - needed) / needed)
        return found


class Counted:
    """A source or near-data client whose calls are counted and timed where they are made."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.calls, self.seconds = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def fetch(self, requests: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._inner.fetch(requests)
        finally:
            self.calls += 1
            self.seconds += time.perf_counter() - started

    def submit(self, hidden_TH: torch.Tensor, work: Any) -> Any:
        started = time.perf_counter()
        future = self._inner.submit(hidden_TH, work)
        self.calls += 1
        future.add_done_callback(lambda _: self._done(started))
        return future

    def _done(self, started: float) -> None:
        self.seconds += time.perf_counter() - started


@contextmanager
def memory_node(store: Path) -> Iterator[dict[str, Any]]:
    """Another process on this host that serves the store's records and runs its experts."""
    module = "benchmarks.offload_parts.memory_node"
    command = [sys.executable, "-m", module, "127.0.0.1", str(store)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as node:
        assert node.stdout is not None
        told = json.loads(node.stdout.readline())
        try:
            yield {role: told[role][str(store)] for role in ("records", "near_data")}
        finally:
            assert node.stdin is not None
            node.stdin.close()
            node.wait(timeout=30)


SETTINGS: dict[str, dict[str, Any]] = {
    "resident": {"cache_bytes": 1 << 40},
    "streamed": {"cache_bytes": 0},
    "near data": {"cache_bytes": 1 << 40, "near_data": "low_bit"},
}


class Bench:
    """Opens engines of one store, and times their steps beside the dense model alone."""

    def __init__(self, store: Path, endpoints: dict[str, str]) -> None:
        self._store, self._endpoints = store, endpoints
        self._watch = Stopwatch()
        self._caches: dict[tuple[int, int], DynamicCache] = {}
        with closing(Segment(store)) as segment:
            self.manifest = segment.manifest
        texts = read_texts([])
        self._dense = _dense_alone(store)
        assert self._dense.tokenizer is not None
        ids = self._dense.tokenizer.encode(texts[0].text)
        # Sequences of one batch start at different places of the text.
        self._prompts = [ids[7 * i : 7 * i + PROMPT_TOKENS] for i in range(max(BATCHES))]

    def gate(self) -> None:
        """AssertionError unless the greedy tokens are the same from wherever the bytes come."""
        answers = {}
        for setting in ("resident", "streamed"):
            with self._engine(setting, 4) as (engine, _, _):
                answers[setting] = _greedy(engine, self._prompts[:4], GATE_TOKENS)
        assert answers["resident"] == answers["streamed"], answers

    def measure(self, setting: str, batch: int, num_steps: int) -> Measured:
        found = Measured(setting, batch)
        with self._engine(setting, batch) as (engine, source, near):
            _fill(engine, self._prompts[:batch], PROMPT_TOKENS + num_steps + 40)
            for _ in range(24):  # what is learned from the first steps is learned
                engine.step()
            source.calls, source.seconds, near.calls, near.seconds = 0, 0.0, 0, 0.0
            for number in range(num_steps):
                self._watch.reset()
                with self._watch.on(PARTS):
                    started = time.perf_counter()
                    engine.step()
                    found.steps.append(time.perf_counter() - started)
                for part, seconds in self._watch.seconds.items():
                    found.parts.setdefault(part, [0.0] * number).append(seconds)
                for seconds_of in found.parts.values():
                    if len(seconds_of) <= number:
                        seconds_of.append(0.0)
                found.dense_alone.append(self._dense_step(batch, PROMPT_TOKENS + 24 + number))
            found.fetches, found.fetch_s = source.calls, source.seconds
            found.near_calls, found.near_s = near.calls, near.seconds
        return found

    @contextmanager
    def _engine(self, setting: str, batch: int) -> Iterator[tuple[Engine, Counted, Counted]]:
        config = WorkerConfig(max_sequences=batch, max_context=256, **SETTINGS[setting])
        with ExitStack() as stack:
            if setting == "resident":
                source = Counted(stack.enter_context(closing(Segment(self._store))))
            else:
                source = Counted(stack.enter_context(closing(self._remote_source())))
            client = NdpClient((self._endpoints["near_data"],), version=self.manifest.version)
            near = Counted(stack.enter_context(closing(NearDataGroup([Member(client)]))))
            is_near = config.near_data != "off"
            engine = build_engine(self._store, source, near if is_near else None, config)
            stack.callback(engine.close)
            yield engine, source, near

    def _remote_source(self) -> GrpcSource:
        address = self._endpoints["records"]
        listing = Listing("memory node", "records", self.manifest.version, "memory", (address,))
        return GrpcSource(self.manifest, lambda: [listing])

    def _dense_step(self, batch: int, length: int) -> float:
        """One forward of the model without its experts, after `length` tokens of each sequence."""
        cache = self._caches.get((batch, length - 1))
        if cache is None:
            cache = DynamicCache(config=self._dense.runner.model.config)
            self._run_dense(torch.zeros(batch, length, dtype=torch.long), 0, cache)
        started = time.perf_counter()
        self._run_dense(torch.zeros(batch, 1, dtype=torch.long), length, cache)
        took = time.perf_counter() - started
        self._caches = {(batch, length): cache}
        return took

    def _run_dense(self, ids_BT: torch.Tensor, start: int, cache: Any) -> None:
        positions_BT = torch.arange(start, start + ids_BT.shape[1]).expand_as(ids_BT)
        self._dense.runner.forward(ids_BT, positions_BT, cache, None, logits_to_keep=1)


def _dense_alone(store: Path) -> OpenModel:
    with closing(Segment(store)) as segment:
        opened = open_model(store, segment, None, WorkerConfig(max_context=256))
    opened.runner.experts = NoExperts()
    bind_experts(opened.runner.model, opened.runner.experts)
    return opened


def _fill(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Bring all requests to where a step gives each of them a token."""
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        engine.add(Request(f"request {number}", list(prompt), params))
    while engine.scheduler.num_waiting or engine.scheduler.num_running < len(prompts):
        engine.step()


def _greedy(
    engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int
) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        engine.add(Request(f"request {number}", list(prompt), params))
    while engine.has_work:
        for event in engine.step().events:
            if event.token_id is not None:
                answers.setdefault(event.request_id, []).append(event.token_id)
    return answers


def page(name: str, measured: Sequence[Measured], num_layers: int) -> str:
    """The report: one table of parts by setting, one of calls."""
    parts = list(dict.fromkeys(item.part for item in PARTS))
    head = ["ms of a step, median", *(f"{m.setting}, batch {m.batch}" for m in measured)]
    rows = [
        ["whole step", *(f"{1e3 * statistics.median(m.steps):.2f}" for m in measured)],
        *([part, *(f"{m.part_ms(part):.2f}" for m in measured)] for part in parts),
        ["dense model alone", *(f"{1e3 * statistics.median(m.dense_alone):.2f}" for m in measured)],
        ["**own overhead, %**", *(_spread(m.overhead) for m in measured)],
    ]
    calls = [
        [
            m.setting,
            str(m.batch),
            f"{m.fetches / len(m.steps) / num_layers:.2f}",
            _each_ms(m.fetch_s, m.fetches),
            f"{m.near_calls / len(m.steps) / num_layers:.2f}",
            _each_ms(m.near_s, m.near_calls),
        ]
        for m in measured
    ]
    return "\n".join(
        [
            f"# {name}: where a decode step's time goes",
            "",
            f"{provenance()} The step has one core, the memory node the other; not run on a GPU.",
            "",
            "Every second counts once; medians over steps. Own overhead: what a step takes above "
            "the dense model alone (transformers' own forward and cache, no experts, a step of it "
            "after each of ours) and the expert kernels, over those two; waiting for bytes or near "
            "data is no part of either. In brackets the 20th and 80th percentile.",
            "",
            table(head, rows),
            "",
            "Calls, for each MoE layer of a step:",
            "",
            table(
                ["setting", "batch", "fetches", "ms each", "near-data calls", "ms each"],
                calls,
            ),
            "",
        ]
    )


def _spread(shares: Sequence[float]) -> str:
    cuts = statistics.quantiles(shares, n=10)
    return f"**{100 * cuts[4]:.0f}** ({100 * cuts[1]:.0f}-{100 * cuts[7]:.0f})"


def _each_ms(seconds: float, calls: int) -> str:
    return f"{1e3 * seconds / calls:.2f}" if calls else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--store", type=Path, help="another model's store")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = arguments.store or bundled_store()
    with memory_node(store) as endpoints:
        bench = Bench(store, endpoints)
        bench.gate()
        measured = [
            bench.measure(setting, batch, arguments.steps)
            for setting in SETTINGS
            for batch in BATCHES
        ]
        num_layers = len(bench.manifest.model.moe_layers)
    name = bench.manifest.model.name
    text = page(name, measured, num_layers)
    (RESULTS / f"overheads-{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
