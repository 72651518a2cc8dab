"""The levels of a group as a tile stores them, and weights as codes on these levels.

One place for the rounding of scales, so that every quantiser codes against what a reader will see.

Legend: N rows, K cols, G groups of cols, g the cols of one group: as many as there are levels for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernels.packing import FLOAT16_MAX, middle_code, pack, pack_symmetric
from kernels.types import (
    GRID_BITS,
    GROUP_SIZE,
    SCALE8_MAX,
    TILE_COLS,
    Grid,
    QuantizedMatrix,
)

SMALLEST = 2.0**-24
"""float16's smallest positive value: an affine scale is never zero, so that the zero is finite."""
_CHUNK_WEIGHTS = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """level(code) = scale * code - zero_scaled, for every row and group, as stored.

    `scale8` and `row_scale` are what a symmetric tile stores instead; absent when affine.
    """

    scale_NG: torch.Tensor  # [N, G] float32
    zero_scaled_NG: torch.Tensor  # [N, G] float32
    scale8_NG: torch.Tensor | None = None  # [N, G] uint8
    row_scale_N: torch.Tensor | None = None  # [N] float32, a float16 number

    def at(self, rows: slice, groups: slice) -> Levels:
        """The levels of some rows and groups, as views."""
        return Levels(
            self.scale_NG[rows, groups],
            self.zero_scaled_NG[rows, groups],
            None if self.scale8_NG is None else self.scale8_NG[rows, groups],
            None if self.row_scale_N is None else self.row_scale_N[rows],
        )

    def take(self, other: Levels, mask_N: torch.Tensor) -> None:
        """Replace the levels of the marked rows by those of `other`, in place."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            if mine is not None and theirs is not None:
                mine[mask_N] = theirs[mask_N]

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.scale_NG, self.zero_scaled_NG, self.scale8_NG, self.row_scale_N


def affine_levels(scale_NG: torch.Tensor, zero_scaled_NG: torch.Tensor) -> Levels:
    """Scale and zero rounded to float16."""
    return Levels(
        scale_NG.clamp(SMALLEST, FLOAT16_MAX).half().float(),
        zero_scaled_NG.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float(),
    )


def row_scales(scale_NG: torch.Tensor) -> torch.Tensor:
    """[N] the row's largest scale, a float16 number: what symmetric scales are fractions of."""
    return scale_NG.amax(dim=1).clamp(SMALLEST, FLOAT16_MAX).half().float()


def symmetric_levels(scale_NG: torch.Tensor, row_scale_N: torch.Tensor, bits: int) -> Levels:
    """Scales rounded to 255ths of the row's; the levels lie evenly about zero."""
    unit_N1 = (row_scale_N * (1 / SCALE8_MAX))[:, None]
    scale8_NG = (scale_NG / unit_N1).round().clamp(0, SCALE8_MAX)
    scale = unit_N1 * scale8_NG
    return Levels(scale, scale * middle_code(bits), scale8_NG.to(torch.uint8), row_scale_N)


def nearest_codes(
    weight: torch.Tensor, scale: torch.Tensor, zero_scaled: torch.Tensor, bits: int
) -> torch.Tensor:
    """Float codes of the nearest levels; all shapes broadcast. Where the scale is 0, any code."""
    inverse = 1 / scale.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.addcmul(zero_scaled * inverse, weight, inverse).round_().clamp_(0, 2**bits - 1)


def encode(weight_NK: torch.Tensor, levels: Levels, bits: int) -> torch.Tensor:
    """[N, K] uint8: every weight's nearest level."""
    rows, cols = weight_NK.shape
    groups = levels.scale_NG.shape[1]
    codes_NK = torch.empty(rows, cols, dtype=torch.uint8)
    step = max(1, _CHUNK_WEIGHTS // cols)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weight_NGg = weight_NK[part].float().view(-1, groups, cols // groups)
        scale, zero_scaled = levels.scale_NG[part, :, None], levels.zero_scaled_NG[part, :, None]
        codes = nearest_codes(weight_NGg, scale, zero_scaled, bits)
        codes_NK[part] = codes.view(-1, cols)
    return codes_NK


def decode(codes_NK: torch.Tensor, levels: Levels) -> torch.Tensor:
    """[N, K] float32: the weights that codes on these levels stand for."""
    rows, groups = levels.scale_NG.shape
    codes_NGg = codes_NK.view(rows, groups, -1).float()
    weight_NGg = codes_NGg.mul_(levels.scale_NG[:, :, None]).sub_(levels.zero_scaled_NG[:, :, None])
    return weight_NGg.view(codes_NK.shape)


def pack_codes(codes_NK: torch.Tensor, levels: Levels, bits: int) -> QuantizedMatrix:
    """Codes and their levels as tiles."""
    size = codes_NK.shape[1] // levels.scale_NG.shape[1]
    if levels.scale8_NG is not None and levels.row_scale_N is not None:
        return pack_symmetric(codes_NK, levels.scale8_NG, levels.row_scale_N, bits, group_size=size)
    zero_NG = levels.zero_scaled_NG / levels.scale_NG
    return pack(codes_NK, levels.scale_NG, zero_NG, bits, group_size=size)


def check_weight(
    weight_NK: torch.Tensor, bits: int, grid: Grid, group_size: int = GROUP_SIZE
) -> None:
    """ValueError for a weight that groups do not divide, or bits that the grid does not have."""
    step = math.lcm(group_size, TILE_COLS)
    if weight_NK.dim() != 2 or weight_NK.shape[1] % step or not weight_NK.numel():
        raise ValueError(
            f"weight: expected [rows, multiple of {step}], got {tuple(weight_NK.shape)}"
        )
    if bits not in GRID_BITS[grid]:
        raise ValueError(f"bits: got {bits}, the {grid} grid has {GRID_BITS[grid]}")
