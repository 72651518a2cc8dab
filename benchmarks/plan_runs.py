"""Runs of the real system over a bounded link, and the plan's prediction of the same steps.

One process: an engine, a source behind a link of so many bytes per second, a near-data worker over
a unix socket behind the same link. Costs are measured as a worker measures them at its start; what
a layer takes besides its experts, from steps without any.

Legend: S token rows, K top-k.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.plan_link import UNBOUNDED, Tier
from cluster.plan.routing import ReplayedRouting
from cluster.plan.simulation import simulate_steps
from cluster.plan.system import System
from expert_store.segment import Segment
from expert_store.types import Manifest
from gpu_worker.build import open_model
from gpu_worker.config import NearDataPolicy, WorkerConfig
from gpu_worker.cost_model import LayerCosts, LinkCost, NearCost, RunCost
from gpu_worker.cost_probe import GUESSED_FIXED_S, Probe, start_costs
from gpu_worker.engine import Engine
from gpu_worker.expert_math import KernelMath
from gpu_worker.model import ModelRunner, StepReport, bind_experts
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.restoring import PairPolicy, route
from gpu_worker.routing import Routing
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as Request
from kernels import ops

PROMPT_TOKENS = 32
PROBES = 5
EVERYTHING = 1e3
"""A cache share that holds all codes and factors."""


class RoutingRecorder:
    """`StepExperts` that keeps each step's routings and passes on, or gives zeros instead."""

    def __init__(self, inner: Any, policy: PairPolicy, *, gives_zeros: bool) -> None:
        self._inner, self._policy, self._gives_zeros = inner, policy, gives_zeros
        self.steps: list[dict[int, Routing]] = []

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        self.steps.append({})
        self._inner.begin(valid_S, token_tags_S)

    def run_layer(
        self, layer: int, hidden_SH: torch.Tensor, ids_SK: torch.Tensor, weights_SK: torch.Tensor
    ) -> torch.Tensor:
        self.steps[-1][layer] = route(layer, ids_SK, weights_SK, policy=self._policy)
        if self._gives_zeros:
            return torch.zeros_like(hidden_SH)
        output: torch.Tensor = self._inner.run_layer(layer, hidden_SH, ids_SK, weights_SK)
        return output

    def end(self) -> StepReport:
        report: StepReport = self._inner.end()
        return report


@dataclass(frozen=True, slots=True)
class Case:
    """One run: how many sequences decode, with how large a cache, and who runs near data; or, with
    `has_experts` false, no expert at all."""

    batch: int
    near_data: NearDataPolicy
    cache_share: float
    link_bytes_per_s: float
    decode_steps: int = 16
    has_experts: bool = True


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of every step, prompts first, and where its tokens went."""

    step_s: tuple[float, ...]
    steps: tuple[dict[int, Routing], ...]

    def decode_s(self, batch: int) -> float:
        """Median of the steps in which all sequences decode."""
        return statistics.median(self.step_s[batch:])


def run_together(segment: Segment, cases: Sequence[tuple[Case, Tier]]) -> list[Run]:
    """The cases on real engines, a step of each in turn, so that all feel the same load."""
    runs = [_Running(segment, case, tier) for case, tier in cases]
    while any(each.engine.has_work for each in runs):
        for each in runs:
            each.step()
    return [each.finish() for each in runs]


class _Running:
    """A case under way: each prompt in a step of its own, then all decode."""

    def __init__(self, segment: Segment, case: Case, tier: Tier) -> None:
        config = config_of(segment.manifest, case)
        opened = open_model(segment.store, tier.source, tier.near_data, config)
        policy = opened.config.pair_policy(segment.manifest)
        self._recorder = RoutingRecorder(
            opened.runner.experts, policy, gives_zeros=not case.has_experts
        )
        bind_experts(opened.runner.model, self._recorder)
        self.engine = Engine(
            ModelRunner(opened.runner.model, self._recorder),
            None,
            max_sequences=case.batch,
            max_context=PROMPT_TOKENS + case.decode_steps + 1,
            prefill_chunk=PROMPT_TOKENS,
            max_waiting=case.batch,
            on_close=opened.close,
        )
        self._step_s: list[float] = []
        generator = torch.Generator().manual_seed(0)
        vocab = segment.manifest.model.vocab_size
        params = SamplingParams(max_tokens=case.decode_steps + 1, temperature=0.0, ignore_eos=True)
        for index in range(case.batch):
            prompt = torch.randint(3, vocab, (PROMPT_TOKENS,), generator=generator).tolist()
            self.engine.add(Request(str(index), tuple(prompt), params))

    def step(self) -> None:
        if self.engine.has_work:
            started_s = time.perf_counter()
            self.engine.step()
            self._step_s.append(time.perf_counter() - started_s)

    def finish(self) -> Run:
        self.engine.close()
        return Run(tuple(self._step_s), tuple(self._recorder.steps))


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


def measured_costs(segment: Segment, tier: Tier, config: WorkerConfig) -> LayerCosts:
    """What a worker measures at its start over this link: of several starts the median."""
    math = KernelMath(segment.manifest, ops.default_backend("cpu"))
    probe = Probe(tier.source, tier.near_data, math, config, time.perf_counter)
    seen = [start_costs(probe) for _ in range(PROBES)]
    near = [each.near for each in seen if each.near is not None]

    def typical(values: Iterable[float]) -> float:
        return statistics.median(values)

    return LayerCosts(
        LinkCost(
            typical(each.link.bytes_per_s for each in seen),
            typical(each.link.call_s for each in seen),
            seen[0].link.request_bytes,
        ),
        RunCost(
            typical(each.device.pair_s for each in seen),
            typical(each.device.bytes_per_s for each in seen),
        ),
        NearCost(
            RunCost(
                typical(each.run.pair_s for each in near),
                typical(each.run.bytes_per_s for each in near),
            ),
            typical(each.call_s for each in near),
        ),
    )


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
        num_experts=max(manifest.model.num_experts.values()),
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
        fixed_s=GUESSED_FIXED_S,
        gpu_bytes_per_s=UNBOUNDED,
        node_bytes_per_s=costs.link.bytes_per_s,
        call_s=costs.link.call_s,
        near_call_s=costs.near.call_s,
        request_bytes=config.fetch_bytes,
        activations_wait=True,  # so does `BoundedLink`
    )


def predict_run(found: Run, system: System) -> tuple[float, ...]:
    """Seconds of the run's steps, simulated with the same routings."""
    routing = ReplayedRouting(found.steps)
    return tuple(simulate_steps(system, routing, len(found.steps)))


def dense_cost(manifest: Manifest, batch: int, without: Run) -> RunCost:
    """What a layer takes besides its experts, a start and each token: the line through the decode
    steps and the prompts' steps of a run without experts."""
    num_layers = len(manifest.model.moe_layers)
    low_s, high_s = (
        statistics.median(part) / num_layers
        for part in (without.step_s[batch:], without.step_s[:batch])
    )
    pair_s = max(1e-12, (high_s - low_s) / (PROMPT_TOKENS - batch))
    return RunCost(pair_s, expert_s=max(0.0, low_s - batch * pair_s))


def learned(system: System, batch: int, resident: Run, near: Run) -> System:
    """The system with its device as fast as in a run whose experts are all there, and near data as
    fast as in one that leaves every pair to it, both over a link that takes no time: what a worker
    learns of them in its first steps (`gpu_worker/cost_table.py`)."""
    free = replace(system, node_bytes_per_s=UNBOUNDED, call_s=0.0, cache_bytes=1 << 40)
    rest_s = len(system.layers) * (system.dense_s(batch) + system.fixed_s)

    def factor(found: Run, way: NearDataPolicy) -> float:
        predicted = statistics.median(predict_run(found, replace(free, near_data=way))[batch:])
        return max(0.1, (found.decode_s(batch) - rest_s) / (predicted - rest_s))

    near_factor = factor(near, "all")
    return replace(
        system,
        device=system.device.scaled(factor(resident, "off")),
        near=system.near.scaled(near_factor),
        near_call_s=system.near_call_s * near_factor,
    )
