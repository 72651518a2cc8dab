"""The best scale (and zero) of a group whose codes stay as they are, all other groups fixed.

Knows matrices only.

Legend: N rows, g the 64 cols of one group.
"""

from __future__ import annotations

import torch

from kernels.packing import middle_code
from kernels.types import Grid


def refitted(
    codes_gN: torch.Tensor,
    moment_gg: torch.Tensor,
    gradient_gN: torch.Tensor,
    levels: tuple[torch.Tensor, torch.Tensor],
    bits: int,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale and scaled zero, [N] each, from those there are (`levels`).

    `gradient` is R E, what the error of all inputs says to these; codes are float. Unrounded. Where
    nothing can be told, the levels stay.
    """
    scale_N, zero_scaled_N = levels
    if grid == "symmetric":
        codes_gN = codes_gN - middle_code(bits)
    by_code_N = (codes_gN * gradient_gN).sum(dim=0)
    code_code_N = (moment_gg @ codes_gN).mul_(codes_gN).sum(dim=0)
    if grid == "symmetric":
        return scale_N + by_code_N / code_code_N, zero_scaled_N
    code_one_N = moment_gg.sum(dim=1) @ codes_gN
    by_one_N, one_one = gradient_gN.sum(dim=0), moment_gg.sum()
    determinant_N = code_code_N * one_one - code_one_N.square()
    more_scale_N = (by_code_N * one_one - by_one_N * code_one_N) / determinant_N
    more_zero_N = (by_code_N * code_one_N - by_one_N * code_code_N) / determinant_N
    # Not where all codes are about the same, nor where the levels would be turned round.
    is_fit_N = (determinant_N > 1e-5 * code_code_N * one_one) & (scale_N + more_scale_N > 0)
    return (
        torch.where(is_fit_N, scale_N + more_scale_N, scale_N),
        torch.where(is_fit_N, zero_scaled_N + more_zero_N, zero_scaled_N),
    )
