"""One expert through a recipe: weights in, two records and their figures out. Pure, no file.

Legend: N rows, K cols.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from expert_store.compensate import RepairBlock, in_order, repair_blocks
from expert_store.errors import CheckpointError
from expert_store.factor_records import encode_factors
from expert_store.matrix.hqq import quantize_hqq
from expert_store.records import encode_codes, form_of
from expert_store.types import (
    PROJECTIONS,
    CodesForm,
    ExpertShape,
    ExpertWeights,
    Projection,
    Recipe,
    RepairForm,
)
from kernels.packing import pack_bf16
from kernels.reference import dequantize
from kernels.types import GatedMLP, QuantizedMatrix

LARGEST_WEIGHT = 65504.0
"""float16's largest finite value: scales and zeros are float16."""
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class CompressedExpert:
    """What compressing one expert gives. `factors` is empty when there are no blocks.

    The figures are as in `ExpertInfo`.
    """

    codes: torch.Tensor  # [num_bytes] uint8
    factors: torch.Tensor  # [num_bytes] uint8
    form: CodesForm
    repair: RepairForm
    error: float
    restored_error: float
    block_gains: tuple[float, ...]


def check_finite(weights: ExpertWeights) -> None:
    """CheckpointError naming layer, expert, projection and count for NaN, Inf or huge weights."""
    for name in PROJECTIONS:
        for label, values in (
            (name, getattr(weights, name)),
            (f"{name} bias", getattr(weights, f"{name}_bias")),
        ):
            if values is None or values.isfinite().all() and values.abs().max() <= LARGEST_WEIGHT:
                continue
            nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
            huge = int((values.abs() > LARGEST_WEIGHT).sum()) - inf
            raise CheckpointError(
                f"{weights.key}, {label}: expected finite weights up to {LARGEST_WEIGHT:g}, got "
                f"{nan} NaN, {inf} infinite and {huge} larger of {values.numel()}; the checkpoint "
                "is damaged: download it again"
            )


def kurtosis_of(weights: ExpertWeights) -> float:
    """Mean kurtosis of the three projections; a Gaussian has 3, a constant matrix counts as 0."""
    return sum(_kurtosis(getattr(weights, name)) for name in PROJECTIONS) / len(PROJECTIONS)


def _kurtosis(weight_NK: torch.Tensor) -> float:
    flat = weight_NK.flatten()
    mean = sum(float(part.sum(dtype=torch.float64)) for part in flat.split(_CHUNK)) / flat.numel()
    second = fourth = 0.0
    for part in flat.split(_CHUNK):
        square = (part.double() - mean).square_()
        second += float(square.sum())
        fourth += float(square.square_().sum())
    if second == 0:
        return 0.0
    return fourth * flat.numel() / second**2


def compress_expert(
    weights: ExpertWeights, shape: ExpertShape, recipe: Recipe, rank: int
) -> CompressedExpert:
    """Codes at `recipe.bits`, and `rank` (a multiple of 16) of compensator for each projection."""
    matrices: dict[Projection, QuantizedMatrix] = {}
    blocks: list[RepairBlock] = []
    removed: dict[Projection, list[float]] = {name: [] for name in PROJECTIONS}
    energy = lost = kept = 0.0
    for name in PROJECTIONS:
        weight_NK: torch.Tensor = getattr(weights, name)
        if recipe.is_original:
            matrices[name] = pack_bf16(weight_NK)
        else:
            matrices[name] = quantize_hqq(weight_NK, int(recipe.bits))
        residual_NK = weight_NK - dequantize(matrices[name])
        energy += _energy(weight_NK)
        left = _energy(residual_NK)
        lost += left
        own = in_order(repair_blocks(residual_NK, rank, name, recipe.factor_bits))
        for item in own:
            residual_NK -= item.left_NR @ item.right_RK
            before, left = left, _energy(residual_NK)
            removed[name].append(before - left)
        kept += left
        blocks += own
    mlp = GatedMLP(
        gate=matrices["gate"],
        up=matrices["up"],
        down=matrices["down"],
        activation=shape.activation,
        gate_bias=weights.gate_bias,
        up_bias=weights.up_bias,
        down_bias=weights.down_bias,
    )
    ordered = in_order(blocks)  # stable: a projection's own blocks stay in their order
    gains = {name: iter(energies) for name, energies in removed.items()}
    return CompressedExpert(
        codes=encode_codes(mlp),
        factors=encode_factors([item.block for item in ordered]),
        form=form_of(mlp),
        repair=RepairForm(
            recipe.factor_bits, recipe.factor_grid, tuple(item.block.spec for item in ordered)
        ),
        error=math.sqrt(lost / energy) if energy else 0.0,
        restored_error=math.sqrt(kept / energy) if energy else 0.0,
        block_gains=tuple(next(gains[item.block.projection]) / (lost or 1.0) for item in ordered),
    )


def _energy(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
