"""The refinement plane of a residual: one more bit a weight, its sign times a group's scale.

Levels are symmetric and there are two, so a code is a sign, and the best scale of a group is a
weighted mean of magnitudes whatever is rounded later. Knows matrices only.

Legend: N rows, K cols, G groups of 64 cols, g the 64 cols of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expert_store.matrix.feedback import quantize_feedback
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.weighting import Weighting
from kernels.packing import pack_symmetric, unpack_symmetric
from kernels.reference import dequantize
from kernels.types import BLOCK_ALIGNMENT, QuantizedMatrix, matrix_bytes


@dataclass(frozen=True, slots=True, eq=False)
class PlaneRepair:
    """A symmetric 1-bit matrix, and the weighted error energy that adding it removes."""

    plane: QuantizedMatrix  # [N, K], 1 bit
    gain: float

    @property
    def num_bytes(self) -> int:
        return plane_bytes(self.plane.rows, self.plane.cols)

    def dense(self) -> torch.Tensor:
        """What the plane adds to the weight, [N, K] float32."""
        return dequantize(self.plane)


def plane_bytes(rows: int, cols: int) -> int:
    """Bytes of a plane in a record, padding included."""
    return -(-matrix_bytes(rows, cols, 1, "symmetric") // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


def plane_repair(
    residual_NK: torch.Tensor, weighting: Weighting, *, feedback: bool = True
) -> PlaneRepair | None:
    """The best plane of a residual; None when it would repair nothing.

    Without a moment the signs are the residual's own. With one, `feedback` passes what a sign
    leaves on to the inputs not signed yet; the better of both is kept. Raises ValueError when the
    cols are no multiple of 64.
    """
    moment = weighting.moment
    candidates = [quantize_grid(residual_NK, 1, grid="symmetric", moment=moment)]
    if feedback and moment is not None:
        candidates.append(quantize_feedback(residual_NK, 1, grid="symmetric", moment=moment))
    energy = weighting.error(residual_NK)
    best: PlaneRepair | None = None
    for candidate in candidates:
        plane = fit_row_scales(candidate, residual_NK, weighting)
        gain = energy - weighting.error(residual_NK - dequantize(plane))
        if gain > (0.0 if best is None else best.gain):
            best = PlaneRepair(plane, gain)
    return best


def fit_row_scales(
    matrix: QuantizedMatrix, target_NK: torch.Tensor, weighting: Weighting
) -> QuantizedMatrix:
    """A symmetric matrix with every row scaled to be the closest to its target that it can be.

    A row's factor is <row, target>_R / <row, row>_R, at least 0, so no row is further from the
    target than zeros are.
    """
    values_NK = dequantize(matrix)
    heard_NK = weighting.times_moment(values_NK)
    square_N = (heard_NK * values_NK).sum(dim=1)
    product_N = (heard_NK * target_NK).sum(dim=1)
    fits = (square_N > 0) & (product_N > 0)
    factor_N = torch.where(fits, product_N / square_N, torch.zeros_like(square_N))
    codes_NK, scale8_NG, row_scale_N = unpack_symmetric(matrix)
    return pack_symmetric(codes_NK, scale8_NG, row_scale_N * factor_N, matrix.bits)
