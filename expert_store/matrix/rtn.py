"""Round to nearest on levels from the smallest to the largest weight of a group: the control.

Knows matrices only.

Legend: N rows, K cols, G groups of cols, g the cols of one group.
"""

from __future__ import annotations

import torch

from expert_store.matrix.levels import (
    affine_levels,
    check_weight,
    encode,
    pack_codes,
    row_scales,
    symmetric_levels,
)
from kernels.types import GROUP_SIZE, Grid, QuantizedMatrix


def quantize_rtn(
    weight_NK: torch.Tensor, bits: int, *, grid: Grid, group_size: int = GROUP_SIZE
) -> QuantizedMatrix:
    """The [N, K] weight's nearest levels; none is clipped. Affine levels end at the group's
    smallest and largest weight, symmetric ones at its largest magnitude, on both sides.

    Raises ValueError when shape and bits do not fit the grid.
    """
    check_weight(weight_NK, bits, grid, group_size)
    weight_NGg = weight_NK.float().view(len(weight_NK), -1, group_size)
    low_NG, high_NG = weight_NGg.aminmax(dim=2)
    if grid == "affine":
        levels = affine_levels((high_NG - low_NG) / (2**bits - 1), -low_NG)
    else:
        scale_NG = torch.maximum(high_NG, -low_NG) * 2 / (2**bits - 1)
        levels = symmetric_levels(scale_NG, row_scales(scale_NG), bits)
    return pack_codes(encode(weight_NK, levels, bits), levels, bits)
