"""One matrix through a recipe: codes, and the blocks that repair them, each with what it removes.

Pure. Knows no file and no other matrix; `expert_store/recipe.py` puts three of them together.

Legend: N rows, K cols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_store.factor_records import FactorBlock, PlaneBlock
from expert_store.matrix.feedback import quantize_feedback
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.hqq import quantize_hqq
from expert_store.matrix.joint import quantize_jointly, quantize_milo
from expert_store.matrix.low_rank import FactorForm
from expert_store.matrix.paper import in_order, svd_repairs
from expert_store.matrix.planes import PlaneRepair
from expert_store.matrix.repair import Repair as MatrixRepair
from expert_store.matrix.repair import repairs_of_kinds
from expert_store.matrix.rtn import quantize_rtn
from expert_store.matrix.weighting import Weighting
from expert_store.methods import Methods
from expert_store.plan import MatrixPlan
from expert_store.types import Projection
from kernels.packing import pack_bf16
from kernels.reference import dequantize
from kernels.types import QuantizedMatrix


@dataclass(frozen=True, slots=True, eq=False)
class Repair:
    """One block in a matrix's own order, the energy it removes there, and its claim on a place
    among the blocks of the other matrices."""

    block: FactorBlock | PlaneBlock
    removed: float
    claim: float  # energy per byte


@dataclass(frozen=True, slots=True, eq=False)
class CompressedMatrix:
    """Codes and repairs of one matrix, with weighted energies of it and of what they leave."""

    matrix: QuantizedMatrix
    repairs: tuple[Repair, ...]
    energy: float  # of the weight
    lost: float  # of the codes' error

    @property
    def kept(self) -> float:
        """Of what all repairs leave."""
        return max(0.0, self.lost - sum(repair.removed for repair in self.repairs))


def compress_matrix(
    weight_NK: torch.Tensor,
    name: Projection,
    plan: MatrixPlan,
    how: Methods,
    weighting: Weighting,
    *,
    factor_bits: int,
    restored_share: float = 0.5,
) -> CompressedMatrix:
    """A float32 [N, K] weight as `plan` and `how` say; the same bytes whenever it is called.

    `restored_share` tells alternating recipes how often the repair is applied.
    """
    if how.alternations and plan.blocks:
        return _alternating(weight_NK, name, plan, how, weighting, factor_bits, restored_share)
    matrix = quantize(weight_NK, plan, how, weighting)
    residual_NK = weight_NK - dequantize(matrix)
    lost = weighting.error(residual_NK)
    if how.allocation == "kurtosis":
        repairs = _paper_repairs(residual_NK, name, plan.rank, factor_bits, lost)
    else:
        repairs = _repairs(residual_NK, name, plan, weighting, factor_form(how, factor_bits))
    return CompressedMatrix(matrix, repairs, weighting.error(weight_NK), lost)


def quantize(
    weight_NK: torch.Tensor, plan: MatrixPlan, how: Methods, weighting: Weighting
) -> QuantizedMatrix:
    """The codes alone."""
    if how.quantizer == "none":
        return pack_bf16(weight_NK)
    if how.quantizer == "hqq":
        return quantize_hqq(weight_NK, plan.bits, group_size=plan.group_size)
    if how.quantizer == "rtn":
        return quantize_rtn(weight_NK, plan.bits, grid=plan.grid, group_size=plan.group_size)
    if how.quantizer == "feedback" and weighting.moment is not None:
        return quantize_feedback(weight_NK, plan.bits, grid=plan.grid, moment=weighting.moment)
    return quantize_grid(
        weight_NK,
        plan.bits,
        grid=plan.grid,
        moment=weighting.moment,
        group_size=plan.group_size,
    )


def _paper_repairs(
    residual_NK: torch.Tensor, name: Projection, rank: int, factor_bits: int, lost: float
) -> tuple[Repair, ...]:
    """All ranks from one SVD of the residual, in falling order of what each would remove alone."""
    repairs = []
    for item in in_order(svd_repairs(residual_NK, rank, factor_bits)):
        residual_NK -= item.dense()
        before, lost = lost, float(residual_NK.square().sum(dtype=torch.float64))
        block = FactorBlock(name, item.right, item.left_t)
        repairs.append(Repair(block, before - lost, item.gain / item.num_bytes))
    return tuple(repairs)


def factor_form(how: Methods, factor_bits: int) -> FactorForm:
    """How the recipe stores rank blocks."""
    return FactorForm(bits=factor_bits, grid=how.factor_grid)


def _alternating(
    weight_NK: torch.Tensor,
    name: Projection,
    plan: MatrixPlan,
    how: Methods,
    weighting: Weighting,
    factor_bits: int,
    restored_share: float,
) -> CompressedMatrix:
    """Codes and repair made for each other."""
    factors = factor_form(how, factor_bits)
    if how.milo:
        joint = quantize_milo(
            weight_NK,
            lambda target_NK: quantize(target_NK, plan, how, weighting),
            plan.blocks.count("rank"),
            weighting=weighting,
            factors=factors,
            rounds=how.alternations,
        )
    else:
        joint = quantize_jointly(
            weight_NK,
            plan.bits,
            plan.blocks,
            grid=plan.grid,
            weighting=weighting,
            share=restored_share,
            factors=factors,
            rounds=how.alternations,
        )
    energy = weighting.error(weight_NK)
    return CompressedMatrix(joint.codes, _as_records(joint.blocks, name), energy, joint.error)


def _repairs(
    residual_NK: torch.Tensor,
    name: Projection,
    plan: MatrixPlan,
    weighting: Weighting,
    factors: FactorForm,
) -> tuple[Repair, ...]:
    """The plan's blocks one after the other, each made for what the ones before it left."""
    made = repairs_of_kinds(residual_NK, weighting, plan.blocks, factors=factors)
    return _as_records(made, name)


def _as_records(made: Sequence[MatrixRepair], name: Projection) -> tuple[Repair, ...]:
    return tuple(
        Repair(
            PlaneBlock(name, item.plane)
            if isinstance(item, PlaneRepair)
            else FactorBlock(name, item.right, item.left_t),
            item.gain,
            item.gain / item.num_bytes,
        )
        for item in made
    )
