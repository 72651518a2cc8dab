"""Runs of the real system over a bounded link, and the plan's prediction of the same steps.

One process: an engine, a source behind a link of so many bytes per second, a near-data worker over
a unix socket behind the same link. Costs are measured as a worker measures them at its start; what
a layer takes besides its experts, from steps whose experts are all on the device.

Legend: S token rows, K top-k.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from cluster.plan.routing import ReplayedRouting
from cluster.plan.simulation import simulate_steps
from cluster.plan.system import System
from expert_store.segment import Segment
from expert_store.types import ExpertOutputs, ExpertTokens, Manifest, RecordRequest
from gpu_worker.build import open_model
from gpu_worker.config import NearDataPolicy, WorkerConfig
from gpu_worker.cost_model import LayerCosts, RunCost
from gpu_worker.cost_probe import Probe, start_costs
from gpu_worker.engine import Engine
from gpu_worker.expert_math import KernelMath
from gpu_worker.model import ModelRunner, StepReport, bind_experts
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.restoring import PairPolicy, route
from gpu_worker.routing import Routing
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as Request
from kernels import ops
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpClient, NdpServer

PROMPT_TOKENS = 32
CALL_S = 5e-4
"""A request and its answer over the bounded link, without their bytes."""
UNBOUNDED = 1e18
"""Bytes per second of a link that takes no time."""
EVERYTHING = 1e3
"""A cache share that holds all codes and factors."""


class BoundedLink:
    """So many bytes per second, first come, first served; who waits sleeps."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def carry(self, num_bytes: float, delay_s: float) -> None:
        """Returns when they are over: `delay_s` of waiting besides, half of it before."""
        with self._lock:
            begin_s = max(time.monotonic() + delay_s / 2, self._free_s)
            self._free_s = begin_s + num_bytes / self._bytes_per_s
            end_s = self._free_s + delay_s / 2
        time.sleep(max(0.0, end_s - time.monotonic()))


class BoundedSource:
    """A segment behind a link."""

    tier = "bounded link"

    def __init__(self, inner: Segment, link: BoundedLink) -> None:
        self._inner, self._link = inner, link

    @property
    def manifest(self) -> Manifest:
        return self._inner.manifest

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        datas = self._inner.fetch(requests)
        self._link.carry(sum(data.numel() for data in datas), CALL_S)
        return datas

    def close(self) -> None:
        """The segment is its owner's."""


class BoundedNearData:
    """A near-data client whose activations cross a link: there on one way, back on the records'."""

    def __init__(self, inner: NdpClient, there: BoundedLink, back: BoundedLink) -> None:
        self._inner, self._there, self._back = inner, there, back
        self._pool = ThreadPoolExecutor(4)

    @property
    def bytes_moved(self) -> tuple[int, int]:
        return self._inner.bytes_moved

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        return self._pool.submit(self._run, hidden_TH, tuple(work))

    def _run(self, hidden_TH: torch.Tensor, work: tuple[ExpertTokens, ...]) -> ExpertOutputs:
        self._there.carry(hidden_TH.numel() * hidden_TH.itemsize, CALL_S / 2)
        outputs = self._inner.submit(hidden_TH, work).result()
        self._back.carry(outputs.output_PH.numel() * hidden_TH.itemsize, CALL_S / 2)
        return outputs

    def close(self) -> None:
        self._pool.shutdown()


class RoutingRecorder:
    """`StepExperts` that passes on and keeps each step's routings."""

    def __init__(self, inner: Any, policy: PairPolicy) -> None:
        self._inner, self._policy = inner, policy
        self.steps: list[dict[int, Routing]] = []

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        self.steps.append({})
        self._inner.begin(valid_S, token_tags_S)

    def run_layer(
        self, layer: int, hidden_SH: torch.Tensor, ids_SK: torch.Tensor, weights_SK: torch.Tensor
    ) -> torch.Tensor:
        self.steps[-1][layer] = route(layer, ids_SK, weights_SK, policy=self._policy)
        output: torch.Tensor = self._inner.run_layer(layer, hidden_SH, ids_SK, weights_SK)
        return output

    def end(self) -> StepReport:
        report: StepReport = self._inner.end()
        return report


@dataclass(frozen=True, slots=True)
class Case:
    """One run: how many sequences decode, with how large a cache, and who runs near data."""

    batch: int
    near_data: NearDataPolicy
    cache_share: float
    link_bytes_per_s: float
    decode_steps: int = 16


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of every step, prompts first, and where its tokens went."""

    step_s: tuple[float, ...]
    steps: tuple[dict[int, Routing], ...]
    moved_bytes: int

    def decode_s(self, batch: int) -> float:
        """Median of the steps in which all sequences decode."""
        return statistics.median(self.step_s[batch:])


def run(segment: Segment, case: Case, tier: Tier) -> Run:
    """The case on the real engine: each prompt in a step of its own, then all decode."""
    config = config_of(segment.manifest, case)
    opened = open_model(segment.store, tier.source, tier.near_data, config)
    policy = opened.config.pair_policy(segment.manifest)
    recorder = RoutingRecorder(opened.runner.experts, policy)
    bind_experts(opened.runner.model, recorder)
    engine = Engine(
        ModelRunner(opened.runner.model, recorder),
        None,
        max_sequences=case.batch,
        max_context=PROMPT_TOKENS + case.decode_steps + 1,
        prefill_chunk=PROMPT_TOKENS,
        max_waiting=case.batch,
        on_close=opened.close,
    )
    generator = torch.Generator().manual_seed(0)
    vocab = segment.manifest.model.vocab_size
    # Every sequence lives as long as the last prompt's, so that all decode together at the end.
    for index in range(case.batch):
        prompt = torch.randint(3, vocab, (PROMPT_TOKENS,), generator=generator).tolist()
        params = SamplingParams(max_tokens=case.decode_steps + 1, temperature=0.0, ignore_eos=True)
        engine.add(Request(str(index), tuple(prompt), params))
    step_s, moved = [], 0
    with closing(engine):
        while engine.has_work:
            started_s = time.perf_counter()
            output = engine.step()
            step_s.append(time.perf_counter() - started_s)
            moved += output.counters.total_moved_bytes
    return Run(tuple(step_s), tuple(recorder.steps), moved)


def config_of(manifest: Manifest, case: Case) -> WorkerConfig:
    codes = sum(info.codes.num_bytes for info in manifest.experts.values())
    return WorkerConfig(
        device="cpu",
        dtype="float32",
        near_data=case.near_data,
        prefetch="never",  # the simulation does not fetch ahead
        cache_bytes=int(case.cache_share * codes),
        max_sequences=case.batch,
        prefill_chunk=PROMPT_TOKENS,
        max_context=PROMPT_TOKENS + case.decode_steps + 1,
    ).resolve(manifest)


@dataclass(frozen=True, slots=True)
class Tier:
    """Where a run's experts come from."""

    source: BoundedSource
    near_data: BoundedNearData


@contextmanager
def tier_over(segment: Segment, bytes_per_s: float) -> Iterator[Tier]:
    """A source and a near-data worker behind one link."""
    there, back = BoundedLink(bytes_per_s), BoundedLink(bytes_per_s)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moetier-"))
        server = NdpServer(Executor(segment), [f"unix:{folder}/near"])
        stack.enter_context(closing(server))
        version = segment.manifest.version
        client = NdpClient(server.addresses, version=version, deadline_s=60.0)
        stack.enter_context(closing(client))
        near_data = BoundedNearData(client, there, back)
        stack.enter_context(closing(near_data))
        yield Tier(BoundedSource(segment, back), near_data)


def measured_costs(segment: Segment, tier: Tier, config: WorkerConfig) -> LayerCosts:
    """What a worker measures at its start over this link."""
    math_ = KernelMath(segment.manifest, ops.default_backend("cpu"))
    return start_costs(Probe(tier.source, tier.near_data, math_, config, time.perf_counter))


def system_of_run(manifest: Manifest, case: Case, costs: LayerCosts, dense: RunCost) -> System:
    """The run as the plan simulates it."""
    assert costs.near is not None, "the probe had a near-data worker"
    config = config_of(manifest, case)
    row_bytes = manifest.model.expert.hidden * config.torch_dtype.itemsize
    near = costs.near.run
    # The probe's many tokens crossed the link too; here activations are counted by themselves.
    pair_s = near.pair_s - 2 * row_bytes / costs.link.bytes_per_s
    near = replace(near, pair_s=max(1e-9, pair_s))
    return System(
        num_gpus=1,
        num_nodes=1,
        layers=tuple(sorted(manifest.model.moe_layers)),
        layer_scale=1.0,
        sizes=RecordSizes.of(manifest),
        cache_bytes=config.cache_bytes,
        row_bytes=row_bytes,
        near_data=case.near_data,
        dense=dense,
        dense_bytes=0.0,
        ends=RunCost(pair_s=1e-12),
        ends_bytes=0.0,
        device=costs.device,
        near=near,
        fixed_s=0.0,
        gpu_bytes_per_s=UNBOUNDED,
        node_bytes_per_s=costs.link.bytes_per_s,
        call_s=costs.link.call_s,
        near_call_s=costs.near.call_s,
        request_bytes=config.fetch_bytes,
    )


def predict_run(found: Run, system: System) -> tuple[float, ...]:
    """Seconds of the run's steps, simulated with the same routings."""
    routing = ReplayedRouting(found.steps)
    return tuple(simulate_steps(system, routing, len(found.steps)))


def dense_cost(manifest: Manifest, batch: int, runs: Sequence[Run], costs: LayerCosts) -> RunCost:
    """What a layer takes besides its experts, a start and each token: from runs whose experts are
    on the device, by the line through their decode steps and their later prompts' steps, less what
    their experts take."""
    case = Case(batch, "off", EVERYTHING, UNBOUNDED)
    nothing = RunCost(pair_s=1e-12)
    system = replace(
        system_of_run(manifest, case, costs, nothing), node_bytes_per_s=UNBOUNDED, call_s=0.0
    )
    decode_s, prompt_s = [], []
    for found in runs:
        experts_s = predict_run(found, system)
        layers_s = [step - expert for step, expert in zip(found.step_s, experts_s, strict=True)]
        prompt_s += layers_s[:batch]
        decode_s += layers_s[batch:]
    num_layers = len(manifest.model.moe_layers)
    low_s, high_s = (statistics.median(each) / num_layers for each in (decode_s, prompt_s))
    pair_s = max(1e-12, (high_s - low_s) / (PROMPT_TOKENS - batch))
    return RunCost(pair_s, expert_s=max(0.0, low_s - batch * pair_s))
