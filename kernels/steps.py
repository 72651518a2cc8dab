"""Quantiser steps in few bytes: a float32 per row, or that times a small float of 8 bits per group.

Steps are only ever rounded down, so that an error bound of half a step still holds. Knows no code.

Legend: N rows, G groups of 64 cols.
"""

from __future__ import annotations

import torch

GROUP_SIZE = 64
"""Cols that share a step, as in `kernels/types.py`, which imports the matrices made of these."""
FACTOR_BIAS = 16
"""A factor byte b stands for (16 + b % 16) * 2**(b // 16) / 16: 1 to 63488, each at most 1/16 more
than the one before."""
ROW_LEVELS = 1 << 12
"""Row steps are rounded to 12 significant bits: a thousandth of a bit dearer, and they compress."""
LARGEST_RATIO = 1 << 20
"""Of a weight to its error bound."""
SMALLEST_STEP = 2.0**-101
"""Where float32 products still have all their bits: nothing here is denormal."""


def round_steps(limit_NG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The largest storable steps that are nowhere over `limit_NG` (float64 [N, 1] or [N, G]).

    Returns (row steps float32 [N], factors uint8 [N, G], or None when limit_NG has one column).
    A row's steps span a factor of 63488 at most: past that, its largest are kept smaller.

    Raises ValueError for a limit that is not finite or under SMALLEST_STEP.
    """
    limit_NG = limit_NG.double()
    if not bool((torch.isfinite(limit_NG) & (limit_NG >= SMALLEST_STEP)).all()):
        raise ValueError(f"steps: expected finite limits of at least {SMALLEST_STEP:.1e}")
    least_N = limit_NG.amin(dim=1).clamp(max=torch.finfo(torch.float32).max)
    mantissa_N, exponent_N = torch.frexp(least_N)
    row_N = torch.ldexp((mantissa_N * ROW_LEVELS).floor() / ROW_LEVELS, exponent_N).float()
    if limit_NG.shape[1] == 1:
        return row_N, None
    ratio_NG = limit_NG / row_N.double()[:, None]
    mantissa_NG, exponent_NG = torch.frexp(ratio_NG)  # mantissa in [0.5, 1)
    byte_NG = (exponent_NG - 1) * 16 + (mantissa_NG * 32).floor().int() - FACTOR_BIAS
    factor_NG = byte_NG.clamp(0, 255).to(torch.uint8)
    # float32 rounds the product: where that went over the limit, take the next factor down.
    over = steps(row_N, factor_NG).double() > limit_NG
    return row_N, factor_NG - over.to(torch.uint8)


def steps_within(
    weight_NK: torch.Tensor, bound_NG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The steps of a quantiser in float32 arithmetic that stays within `bound_NG` of the weight.

    weight_NK is float32, bound_NG float64 [N, 1] or [N, K/64]. Returns what `round_steps` does.
    Raises ValueError for a weight over LARGEST_RATIO times its bound: float32 is too coarse.
    """
    rows, columns = bound_NG.shape
    largest_NG = weight_NK.abs().view(rows, columns, -1).amax(-1).double()
    worst = float((largest_NG / bound_NG).max())
    if not worst <= LARGEST_RATIO:
        raise ValueError(
            f"bound: too tight for float32, a weight is {worst:.3g} times its bound (at most "
            f"{LARGEST_RATIO}); relax it"
        )
    # Rounding of weight / step and of step * code: two of 2**-24 of the weight.
    return round_steps(2 * (bound_NG * (1 - 2.0**-20) - largest_NG * 2.0**-22))


def steps(row_N: torch.Tensor, factor_NG: torch.Tensor | None) -> torch.Tensor:
    """The float32 steps, [N, 1] or [N, G]; the same bits on every device."""
    if factor_NG is None:
        return row_N[:, None]
    byte = factor_NG.int()
    factor = (FACTOR_BIAS + (byte & 15)).float() * (1 << (byte >> 4)).float() / FACTOR_BIAS
    return row_N[:, None] * factor
