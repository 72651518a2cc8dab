"""What a matrix loses at every way to store it: measured on sample experts, for the solver.

Pure. Knows no file; which experts are samples is decided in `expert_store/planning.py`.

Legend: N rows, K cols.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from expert_store.allocate import BITS_PER_FACTOR_WEIGHT
from expert_store.budget import Choice
from expert_store.matrix.joint import quantize_with_planes
from expert_store.matrix.planes import PlaneRepair
from expert_store.matrix.repair import Repair, repairs_of_kinds
from expert_store.matrix.weighting import Weighting
from expert_store.matrix_recipe import factor_form, quantize
from expert_store.methods import Methods
from expert_store.plan import MatrixPlan
from expert_store.types import BlockKind
from kernels.reference import dequantize
from kernels.types import GRID_BITS, TILE_ROWS

MAX_PLANES = 2
MAX_BITS = 5
"""Of codes and planes together."""
SAMPLE_SHARE = 2 / 3
"""Of a matrix' uses, each counted by its squared router weight, in which a sample is restored."""
MAX_RANK_BLOCKS = 4
"""Of one matrix. The rule that no rank may cost more than one more bit is kept besides."""


def measure_choices(
    weight_NK: torch.Tensor, how: Methods, weighting: Weighting, *, factor_bits: int
) -> tuple[Choice, ...]:
    """Every width and grid that `how` allows, each with planes and, after them, rank blocks.

    Errors are relative to the weight's own weighted energy. Planes come first: rank then repairs
    what they cannot (benchmarks/results/repairs.md). Recipes that alternate choose planes with the
    codes, for a matrix restored in two thirds of what its uses count.
    """
    energy = weighting.error(weight_NK) or 1.0
    plans = [
        MatrixPlan(bits, grid, group_size=how.group_size)
        for grid in how.grids
        for bits in how.bits
        if bits in GRID_BITS[grid]
    ]
    return tuple(
        choice
        for plan in plans
        for choice in _of_codes(weight_NK, plan, how, weighting, energy, factor_bits)
    )


def _of_codes(
    weight_NK: torch.Tensor,
    bare: MatrixPlan,
    how: Methods,
    weighting: Weighting,
    energy: float,
    factor_bits: int,
) -> Iterator[Choice]:
    rows, cols = weight_NK.shape
    form = factor_form(how, factor_bits)
    max_ranks = max_rank(rows, cols, factor_bits) // TILE_ROWS if "rank" in how.repairs else 0
    max_planes = min(MAX_PLANES, MAX_BITS - bare.bits) if "plane" in how.repairs else 0
    residual_NK = weight_NK - dequantize(quantize(weight_NK, bare, how, weighting))
    for num_planes in range(max_planes + 1):
        kinds: list[BlockKind] = ["plane"] * num_planes
        kinds += ["rank"] * max_ranks
        repairs: Sequence[Repair]
        if num_planes and how.alternations and not how.milo:
            joint = quantize_with_planes(
                weight_NK,
                bare.bits,
                kinds,
                grid=bare.grid,
                weighting=weighting,
                share=SAMPLE_SHARE,
                factors=form,
            )
            lost, repairs = joint.error, joint.blocks
        else:
            lost = weighting.error(residual_NK)
            repairs = repairs_of_kinds(residual_NK, weighting, kinds, factors=form)
        # Fewer blocks than there are planes is a choice of fewer planes.
        for count in range(num_planes, len(repairs) + 1):
            plan = replace(bare, blocks=tuple(map(repair_kind, repairs[:count])))
            repair_bytes = sum(repair.num_bytes for repair in repairs[:count])
            left = max(0.0, lost - sum(repair.gain for repair in repairs[:count]))
            code_bytes = plan.code_bytes(rows, cols)
            yield Choice(plan, code_bytes, repair_bytes, lost / energy, left / energy)


def repair_kind(repair: Repair) -> BlockKind:
    return "plane" if isinstance(repair, PlaneRepair) else "rank"


def max_rank(rows: int, cols: int, factor_bits: int) -> int:
    """The most that a compensator of one matrix may have: never dearer than one more bit."""
    equal_price = rows * cols / (BITS_PER_FACTOR_WEIGHT[factor_bits] * (rows + cols))
    return min(int(equal_price), TILE_ROWS * MAX_RANK_BLOCKS)


def choice_json(choice: Choice) -> list[Any]:
    """For a staging folder."""
    plan = choice.plan
    return [
        plan.bits,
        plan.grid,
        list(plan.blocks),
        plan.group_size,
        choice.code_bytes,
        choice.repair_bytes,
        choice.low_error,
        choice.restored_error,
    ]


def read_choice(value: list[Any]) -> Choice:
    """Inverse of `choice_json`."""
    bits, grid, blocks, group_size, *figures = value
    return Choice(MatrixPlan(bits, grid, tuple(blocks), group_size), *figures)
