"""A plan's question as what is simulated: bytes of every record, and seconds of every part.

Pure. The costs are the worker's own (`gpu_worker/cost_model.py`), with figures of other hardware.

Legend: H hidden, F ffn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.plan.inputs import PlanInputs, Recipe
from cluster.plan.shapes import ModelShape
from expert_store.types import ExpertKey, Manifest
from gpu_worker.config import NearDataPolicy
from gpu_worker.cost_model import LayerCosts, LinkCost, NearCost, RunCost
from gpu_worker.planner import ExpertWork
from gpu_worker.record_sizes import RecordSizes
from kernels.types import TILE_ROWS, block_bytes, matrix_bytes

ACTIVATION_BYTES = 2
"""Hidden states travel and weights outside the experts are read as bfloat16."""


@dataclass(frozen=True, slots=True)
class RecordBytes:
    """Of one expert, on average: its codes, and its factors, 0 without."""

    codes: int
    factors: int

    @staticmethod
    def of_store(manifest: Manifest) -> RecordBytes:
        sizes = RecordSizes.of(manifest)
        num_experts = len(sizes.codes)
        codes, factors = sum(sizes.codes.values()), sum(sizes.factors.values())
        return RecordBytes(codes // num_experts, factors // num_experts)


@dataclass(frozen=True, slots=True)
class System:
    """What is simulated.

    - layers: the MoE layers that are; `layer_scale` stands for the others: a whole step has as many
      layers, and as much cache, times this.
    - dense: a layer without its routed experts, for that many tokens; `ends`: what a step takes
      besides its MoE layers, a share of `layer_scale` as they are.
    - device, near: running experts on a GPU and on one near-data worker.
    - fixed_s: a layer's, whatever its experts do.
    - gpu_bytes_per_s, node_bytes_per_s: the links, each way; `call_s` and
      `near_call_s` a request for bytes, and for running, and its answer.
    - request_bytes: of one request at most; None: all that a node is asked for.
    - activations_wait: whether activations wait behind records that were asked for before them.
      Connections that share a link do not make kilobytes wait for megabytes.
    """

    num_gpus: int
    num_nodes: int
    num_experts: int
    layers: tuple[int, ...]
    layer_scale: float
    sizes: RecordSizes
    cache_bytes: int
    row_bytes: int
    near_data: NearDataPolicy
    dense: RunCost
    dense_bytes: float
    ends: RunCost
    ends_bytes: float
    device: RunCost
    near: RunCost
    fixed_s: float
    gpu_bytes_per_s: float
    node_bytes_per_s: float
    call_s: float
    near_call_s: float
    request_bytes: int | None = None
    activations_wait: bool = False

    def node_of(self, key: ExpertKey) -> int:
        """Experts are dealt out one by one, a layer where the one before it ended."""
        return (key.layer * self.num_experts + key.expert) % self.num_nodes

    def layer_costs(self) -> LayerCosts:
        """What a worker alone in the cluster would measure at its start."""
        link = min(self.gpu_bytes_per_s, self.num_nodes * self.node_bytes_per_s)
        near = NearCost(self.near, self.near_call_s, link, self.num_nodes)
        return LayerCosts(
            LinkCost(link, self.call_s, self.request_bytes), self.device, near, self.fixed_s
        )

    def run_bytes(self, work: ExpertWork) -> int:
        """What running an expert reads: its codes, and its factors where rows are restored."""
        return self.sizes.codes[work.key] + (
            self.sizes.factors[work.key] if work.num_restored else 0
        )

    def device_s(self, work: ExpertWork) -> float:
        return self.device.seconds(len(work.token_rows), self.run_bytes(work))

    def near_s(self, work: ExpertWork) -> float:
        return self.near.seconds(len(work.token_rows), self.run_bytes(work))

    def dense_s(self, num_tokens: int) -> float:
        return self.dense.seconds(num_tokens, self.dense_bytes)

    def ends_s(self, num_tokens: int) -> float:
        return self.ends.seconds(num_tokens, self.ends_bytes) / self.layer_scale


def system_of(shape: ModelShape, inputs: PlanInputs, stored: RecordBytes | None = None) -> System:
    """`stored` are a store's records, instead of the recipe's.

    Raises ValueError when a GPU has no room for what is not in the experts, or the inputs do not
    fit the model.
    """
    if inputs.top_n > shape.top_k:
        raise ValueError(f"top_n: got {inputs.top_n}, {shape.name} has {shape.top_k} per token")
    records = stored or record_bytes(shape, inputs.recipe)
    codes, factors = records.codes, records.factors
    # Fewer would leave nodes without an expert that have some.
    enough = math.ceil(inputs.num_nodes / shape.num_experts)
    num_layers = min(shape.num_moe_layers, max(inputs.max_layers, enough))
    layers = tuple(range(num_layers))
    scale = shape.num_moe_layers / num_layers
    keys = [ExpertKey(layer, expert) for layer in layers for expert in range(shape.num_experts)]
    hardware = inputs.hardware
    gpu_bytes_per_s = 1e9 * hardware.gpu_gb_per_s * hardware.gpu_share
    gpu_flops = 1e12 * hardware.gpu_tflops * hardware.gpu_share
    node_bytes_per_s = 1e9 * min(
        hardware.node_gb_per_s, hardware.node_cores * hardware.core_gb_per_s
    )
    kv_bytes = inputs.batch * inputs.context * ACTIVATION_BYTES * shape.kv_weights_per_token

    def reading(weights: int, bytes_per_s: float, flops: float) -> RunCost:
        return RunCost(pair_s=2 * weights / flops, bytes_per_s=bytes_per_s)

    return System(
        num_gpus=inputs.num_gpus,
        num_nodes=inputs.num_nodes,
        num_experts=shape.num_experts,
        layers=layers,
        layer_scale=scale,
        sizes=RecordSizes(
            codes=dict.fromkeys(keys, codes),
            factors=dict.fromkeys(keys, factors) if factors else {},
        ),
        cache_bytes=int(_cache_bytes(shape, inputs, codes, kv_bytes) / scale),
        row_bytes=ACTIVATION_BYTES * shape.hidden,
        near_data=inputs.near_data,
        dense=reading(shape.moe_layer_weights, gpu_bytes_per_s, gpu_flops),
        dense_bytes=ACTIVATION_BYTES * shape.moe_layer_weights + kv_bytes / shape.num_layers,
        ends=reading(shape.other_weights, gpu_bytes_per_s, gpu_flops),
        ends_bytes=ACTIVATION_BYTES * shape.other_weights
        + kv_bytes * shape.num_dense_layers / shape.num_layers,
        device=reading(shape.expert_weights, gpu_bytes_per_s, gpu_flops),
        near=reading(
            shape.expert_weights, node_bytes_per_s, 1e9 * hardware.node_cores * hardware.core_gops
        ),
        fixed_s=hardware.layer_us / 1e6,
        gpu_bytes_per_s=inputs.link_gbps * 1e9 / 8,
        node_bytes_per_s=inputs.link_gbps * 1e9 / 8,
        call_s=hardware.call_us / 1e6,
        near_call_s=hardware.call_us / 1e6,
    )


def record_bytes(shape: ModelShape, recipe: Recipe) -> RecordBytes:
    """What the recipe makes of one expert, its factors at the mean rank.

    Raises ValueError for sizes that the packed layout cannot hold.
    """
    sides = [(shape.expert_ffn, shape.hidden)] * 2 + [(shape.hidden, shape.expert_ffn)]
    if recipe.bits != 16 and (shape.hidden % 64 or shape.expert_ffn % 64):
        raise ValueError(
            f"{shape.name}: hidden {shape.hidden} and expert ffn {shape.expert_ffn}: packed codes "
            "need multiples of 64; plan with 16 bits"
        )
    codes = sum(matrix_bytes(rows, cols, recipe.bits) for rows, cols in sides)
    if recipe.bits == 16 or recipe.rank == 0:
        return RecordBytes(codes, 0)
    blocks = recipe.rank / TILE_ROWS
    per_block = sum(block_bytes(rows, cols, recipe.factor_bits) for rows, cols in sides)
    return RecordBytes(codes, int(blocks * per_block))


def _cache_bytes(shape: ModelShape, inputs: PlanInputs, codes: int, kv_bytes: float) -> float:
    """Of all MoE layers: the share asked for, or what the GPU has left."""
    gpu_bytes = inputs.hardware.gpu_gib * 2**30
    experts = shape.num_moe_layers * shape.num_experts
    dense = ACTIVATION_BYTES * (shape.num_parameters - experts * shape.expert_weights)
    left = gpu_bytes - dense - kv_bytes
    if left <= 0:
        raise ValueError(
            f"gpu_gib: got {inputs.hardware.gpu_gib:g}, but {shape.name} needs "
            f"{dense / 2**30:.1f} GiB besides its experts and {kv_bytes / 2**30:.1f} GiB of keys "
            f"and values for batch {inputs.batch} at context {inputs.context}"
        )
    return min(inputs.cache_share * codes * experts, left)
