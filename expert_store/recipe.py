"""One expert through a recipe: weights in, two records and their figures out. Pure, no file.

Legend: N rows, K cols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_store.codecs import cuszp, sz3
from expert_store.codecs.bound import ErrorBound
from expert_store.errors import CheckpointError
from expert_store.factor_records import encode_factors
from expert_store.matrix.loss import weighted_error
from expert_store.matrix.moments import Moment
from expert_store.matrix.weighting import Weighting
from expert_store.matrix_recipe import CompressedMatrix, Repair, compress_matrix
from expert_store.methods import Methods
from expert_store.plan import CodecPlan, ExpertPlan
from expert_store.records import encode_codes, encode_parts, form_of
from expert_store.statistics import ExpertStatistics
from expert_store.types import (
    PROJECTIONS,
    CodesForm,
    ExpertShape,
    ExpertWeights,
    Projection,
    RepairForm,
)
from kernels.block_code import decode_block_code
from kernels.reference import dequantize
from kernels.types import GatedMLP

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


def weightings(statistics: ExpertStatistics | None, how: Methods) -> dict[Projection, Weighting]:
    """How loudly an error in each matrix is heard in the expert's output; all alike without
    statistics."""
    if statistics is None or not how.weighted:
        return {name: Weighting.of() for name in PROJECTIONS}
    moment_in = heard(statistics.moment_in, how)
    return {
        "gate": Weighting.of(moment_in, statistics.gate_weight_F),
        "up": Weighting.of(moment_in, statistics.up_weight_F),
        "down": Weighting.of(heard(statistics.moment_mid, how)),
    }


def heard(moment: Moment, how: Methods) -> Moment:
    """What a weighted recipe uses of a moment. Error feedback needs all of it; other quantisers
    look at each input alone, and so do the repairs after them: no large root is taken then."""
    return moment if how.quantizer == "feedback" else moment.diagonal_only()


def energies(
    weights: ExpertWeights, statistics: ExpertStatistics | None
) -> tuple[float, float, float]:
    """Of gate, up and down: what a relative error of 1 in each would move the expert's output by,
    in mean squared norm; without statistics the weights' own."""
    if statistics is None:
        gate, up, down = (weighted_error(getattr(weights, name)) for name in PROJECTIONS)
        return gate, up, down
    return (
        weighted_error(weights.gate, statistics.moment_in, statistics.gate_weight_F),
        weighted_error(weights.up, statistics.moment_in, statistics.up_weight_F),
        weighted_error(weights.down, statistics.moment_mid),
    )


def compress_expert(
    weights: ExpertWeights,
    shape: ExpertShape,
    plan: ExpertPlan | CodecPlan,
    how: Methods,
    *,
    factor_bits: int,
    statistics: ExpertStatistics | None = None,
) -> CompressedExpert:
    """Codes and compensator of one expert, as planned."""
    heard = weightings(statistics, how)
    if isinstance(plan, CodecPlan):
        return _through_codec(weights, plan, how, heard, factor_bits)
    made = {
        name: compress_matrix(
            getattr(weights, name),
            name,
            plan.matrices[name],
            how,
            heard[name],
            factor_bits=factor_bits,
            restored_share=plan.restored_share,
        )
        for name in PROJECTIONS
    }
    mlp = GatedMLP(
        gate=made["gate"].matrix,
        up=made["up"].matrix,
        down=made["down"].matrix,
        activation=shape.activation,
        gate_bias=weights.gate_bias,
        up_bias=weights.up_bias,
        down_bias=weights.down_bias,
    )
    repairs = merged(list(made.values()))
    blocks = [repair.block for repair in repairs]
    energy, lost = (sum(getattr(m, field) for m in made.values()) for field in ("energy", "lost"))
    kept = sum(matrix.kept for matrix in made.values())
    return CompressedExpert(
        codes=encode_codes(mlp),
        factors=encode_factors(blocks),
        form=form_of(mlp),
        repair=RepairForm(factor_bits, how.factor_grid, tuple(block.spec for block in blocks)),
        error=_root_share(lost, energy),
        restored_error=_root_share(kept, energy),
        block_gains=tuple(repair.removed / (lost or 1.0) for repair in repairs),
    )


def merged(matrices: Sequence[CompressedMatrix]) -> list[Repair]:
    """The repairs of all matrices in one order: the largest claim first, and each matrix's in its
    own order. A block that claims more than the one before it goes with that one, at their mean."""
    runs: list[tuple[float, list[Repair]]] = []
    for matrix in matrices:
        own: list[tuple[float, list[Repair]]] = []
        for repair in matrix.repairs:
            claim, run = repair.claim, [repair]
            while own and own[-1][0] < claim:
                before = own.pop()[1]
                run = [*before, *run]
                sizes = [item.block.num_bytes for item in run]
                weighed = [item.claim * size for item, size in zip(run, sizes, strict=True)]
                claim = sum(weighed) / sum(sizes)
            own.append((claim, run))
        runs += own
    runs.sort(key=lambda run: -run[0])  # stable: ties keep the order of matrices and blocks
    return [repair for _, run in runs for repair in run]


def _through_codec(
    weights: ExpertWeights,
    plan: CodecPlan,
    how: Methods,
    heard: dict[Projection, Weighting],
    factor_bits: int,
) -> CompressedExpert:
    """All three matrices error-bounded; there is nothing to repair."""
    bound = ErrorBound.parse(plan.bound)
    parts = []
    energy = lost = 0.0
    for name in PROJECTIONS:
        weight_NK: torch.Tensor = getattr(weights, name)
        if plan.codec == "sz3":
            part = sz3.encode(weight_NK, bound)
            served_NK = dequantize(sz3.decode(part, *weight_NK.shape))
        else:
            part = cuszp.encode(weight_NK, bound)
            served_NK = decode_block_code(cuszp.decode(part, *weight_NK.shape))
        parts.append(part)
        energy += heard[name].error(weight_NK)
        lost += heard[name].error(weight_NK - served_NK)
    error = _root_share(lost, energy)
    return CompressedExpert(
        codes=encode_parts(parts, [weights.gate_bias, weights.up_bias, weights.down_bias]),
        factors=torch.empty(0, dtype=torch.uint8),
        form=CodesForm.streams(plan.codec, [part.numel() for part in parts]),
        repair=RepairForm(factor_bits, how.factor_grid, ()),
        error=error,
        restored_error=error,
        block_gains=(),
    )


def _root_share(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0
