"""A plan's question and its answer: the simulated cluster, its first token, its bottleneck."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cluster.plan.estimate import Estimate, estimate
from cluster.plan.inputs import MAX_SEED, PlanInputs
from cluster.plan.routing import DrawnRouting
from cluster.plan.shapes import ModelShape
from cluster.plan.simulation import Simulated, simulate_decode, simulate_steps
from cluster.plan.system import RecordBytes, System, system_of

ESTIMATED_STEPS = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """What is predicted. None of it was measured."""

    shape: ModelShape
    inputs: PlanInputs
    system: System
    decode: Simulated
    first_token_s: float
    estimate: Estimate
    stored: RecordBytes | None = None

    @property
    def bound_tokens_per_s(self) -> float:
        """Of the whole cluster, if nothing but its bottleneck took time."""
        return self.inputs.batch * self.inputs.num_gpus / self.estimate.bound_s

    @property
    def node_out_bytes_mean(self) -> float:
        """Per token, out of one memory node: what goes into the GPUs comes from all of them."""
        return self.decode.gpu_in_bytes / self.inputs.num_nodes


def answer(shape: ModelShape, inputs: PlanInputs, stored: RecordBytes | None = None) -> Answer:
    """`stored` are a store's records, instead of the recipe's. Raises ValueError when the inputs do
    not fit the model."""
    system = system_of(shape, inputs, stored)
    decode = simulate_decode(
        system,
        [_routing(shape, inputs, worker, [inputs.batch]) for worker in range(inputs.num_gpus)],
        batch=inputs.batch,
        warm_up=inputs.warm_up,
        steps=inputs.steps,
    )
    other = replace(inputs, seed=(inputs.seed + 1) % (MAX_SEED + 1))  # draws of its own
    expected = estimate(system, _routing(shape, other, 0, [inputs.batch]), range(ESTIMATED_STEPS))
    first_token_s = _first_token_s(shape, inputs, system)
    return Answer(shape, inputs, system, decode, first_token_s, expected, stored)


def _first_token_s(shape: ModelShape, inputs: PlanInputs, system: System) -> float:
    """One worker takes in a prompt, no other has work."""
    num_chunks = math.ceil(inputs.prompt / inputs.chunk)
    chunks = [inputs.chunk] * (num_chunks - 1)
    chunks.append(inputs.prompt - sum(chunks))
    decoding = [inputs.batch] * inputs.warm_up
    steps = simulate_steps(
        replace(system, num_gpus=1),
        _routing(shape, inputs, 0, [*decoding, *chunks]),
        inputs.warm_up + num_chunks,
    )
    return sum(steps[inputs.warm_up :]) * system.layer_scale


def _routing(
    shape: ModelShape, inputs: PlanInputs, worker: int, tokens_per_step: list[int]
) -> DrawnRouting:
    return DrawnRouting(
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        top_n=inputs.top_n,
        skew=inputs.skew,
        seed=inputs.seed,
        worker=worker,
        tokens_per_step=tokens_per_step,
    )
