"""What a plan is asked for: cluster, load, recipe and hardware, with defaults that say where from.

Plain values, checked at the door. Knows no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import get_args

from gpu_worker.config import NearDataPolicy

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machines. Every field is a number over 0.

    - gpu_gb_per_s, gpu_tflops, gpu_gib: memory bandwidth, bfloat16 peak and memory of a GPU worker;
      those of an NVIDIA A100 80 GB SXM (its data sheet).
    - gpu_share: what kernels reach of both; the project's own target for its decode kernels, not a
      measurement.
    - layer_us: what a layer takes besides: launches, routing, planning, adding up. An assumption.
    - node_gb_per_s: memory bandwidth of a memory node; 8 channels of DDR4-3200.
    - node_cores: cores its near-data worker may use.
    - core_gb_per_s, core_gops: what one core makes of packed codes at 1 and at 16 tokens; as
      measured of 2-bit experts with AVX-512 VNNI on an idle machine (AMD EPYC, H 2048, F 1408,
      commit 98c4c33). benchmarks/results/cpu-kernels.csv has what a busy one makes, which is less.
    - call_us: a request to a memory node and its answer, without their bytes; of a persistent gRPC
      stream between processes, measured.
    """

    gpu_gb_per_s: float = 2039.0
    gpu_tflops: float = 312.0
    gpu_gib: float = 80.0
    gpu_share: float = 0.75
    layer_us: float = 200.0
    node_gb_per_s: float = 204.8
    node_cores: float = 32.0
    core_gb_per_s: float = 17.0
    core_gops: float = 330.0
    call_us: float = 200.0

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_over(each.name, getattr(self, each.name), 0)
        _check_within("gpu_share", self.gpu_share, 0, 1)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How experts are stored: bits of codes (16 is the original bfloat16), and the mean rank of
    their compensators, whose factors have `factor_bits`. Raises ValueError for other widths.
    """

    bits: int = 2
    rank: int = 32
    factor_bits: int = 3

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 16):
            raise ValueError(f"bits: got {self.bits}, expected one of 2, 3, 4, 16")
        if self.factor_bits not in (2, 3, 4):
            raise ValueError(f"factor_bits: got {self.factor_bits}, expected one of 2, 3, 4")
        _check_within("rank", self.rank, 0, 4096)


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """One question: a cluster, its load, its recipe and its hardware.

    - num_gpus, num_nodes: GPU workers, each with a whole copy of all but the experts; memory nodes,
      each with its part of the experts and a near-data worker.
    - link_gbps: Gbit/s of every machine's network link, in each direction.
    - batch: sequences that decode side by side on each GPU worker; context: positions of each.
    - prompt, chunk: tokens of the prompt whose first token is awaited while no other worker has
      anything to do, and of one prefill step.
    - top_n: experts of a token that get their compensator.
    - cache_share: part of all experts' codes that a GPU keeps; less where it has no room for them.
    - near_data: as worker.near_data.
    - skew: exponent of a Zipf distribution of the experts' popularity; 0 is uniform. The tokens of
      a step are drawn independently of each other and of earlier steps, which real text is not.
    - seed, steps, warm_up, max_layers: of the simulation: what is drawn, how many steps are
      measured after how many (workers that share a node need about a dozen to learn its costs), and
      of how many MoE layers (the others count as like them), or of as many more as give every node
      an expert.
    """

    num_gpus: int = 1
    num_nodes: int = 1
    link_gbps: float = 100.0
    batch: int = 8
    context: int = 2048
    prompt: int = 512
    chunk: int = 256
    top_n: int = 1
    cache_share: float = 0.25
    near_data: NearDataPolicy = "cost"
    skew: float = 0.5
    seed: int = 0
    steps: int = 4
    warm_up: int = 12
    max_layers: int = 8
    recipe: Recipe = field(default_factory=Recipe)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("num_gpus", 1, 1024),
            ("num_nodes", 1, 4096),
            ("batch", 1, 1024),
            ("context", 1, 1 << 20),
            ("prompt", 1, 1 << 17),
            ("chunk", 1, 4096),
            ("top_n", 0, 1024),
            ("seed", 0, MAX_SEED),
            ("steps", 1, 1000),
            ("warm_up", 0, 1000),
            ("max_layers", 1, 1000),
        ):
            _check_within(name, getattr(self, name), least, most)
        _check_over("link_gbps", self.link_gbps, 0)
        _check_within("cache_share", self.cache_share, 0, 1)
        _check_within("skew", self.skew, 0, 4)
        if self.near_data not in get_args(NearDataPolicy):
            raise ValueError(
                f"near_data: got {self.near_data!r}, expected one of "
                f"{', '.join(get_args(NearDataPolicy))}"
            )


def _check_over(name: str, value: float, least: float) -> None:
    if not least < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a number over {least:g}")


def _check_within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: got {value}, expected {least} to {most}")
