"""Levels of codes and of the planes after them: first guess, least-squares refit, as stored.

A plane halves what the codes leave, so with planes the codes' scale is best a little wider than
without: clipping then costs more than coarseness. Knows matrices only.

Legend: N rows, G groups of 64 cols, g the 64 cols of one group, P planes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expert_store.matrix.grid import search
from expert_store.matrix.levels import (
    Levels,
    affine_levels,
    nearest_codes,
    row_scales,
    symmetric_levels,
)
from expert_store.matrix.refit import refitted
from kernels.packing import middle_code
from kernels.types import GROUP_SIZE, Grid

# The codes' scale when planes follow, in shares of the best one when none do.
_STRETCHES = (0.97, 1.06, 1.14, 1.25)


class GroupLevels:
    """Scale and scaled zero of the codes, and half the scale of each plane, by group as ordered."""

    def __init__(self, base: Sequence[Levels], bits: int, groups_G: torch.Tensor) -> None:
        """`base` are levels of the codes and of each plane; group i here is `groups_G[i]` there."""
        self.bits, self.grid = bits, _grid_of(base[0])
        self._row_scales = [levels.row_scale_N for levels in base]
        self.scale_GN = base[0].scale_NG.T[groups_G]
        self.zero_scaled_GN = base[0].zero_scaled_NG.T[groups_G]
        self.half_PGN = torch.zeros(len(base) - 1, *self.scale_GN.shape)
        self._scale8 = torch.zeros(len(base), *self.scale_GN.shape, dtype=torch.uint8)
        for i, levels in enumerate(base):
            if levels.scale8_NG is not None:
                self._scale8[i] = levels.scale8_NG.T[groups_G]
            if i:
                self.half_PGN[i - 1] = levels.zero_scaled_NG.T[groups_G]

    def store(self, group: int, scale_N: torch.Tensor, zero_scaled_N: torch.Tensor) -> None:
        """Keep levels of the codes as a tile would give them back."""
        if self.grid == "affine":
            levels = affine_levels(scale_N[:, None], zero_scaled_N[:, None])
        else:
            levels = self._symmetric(0, group, scale_N, self.bits)
        self.scale_GN[group] = levels.scale_NG[:, 0]
        self.zero_scaled_GN[group] = levels.zero_scaled_NG[:, 0]

    def store_plane(self, plane: int, group: int, half_N: torch.Tensor) -> None:
        """Keep half the scale of a plane as a tile would give it back."""
        levels = self._symmetric(plane + 1, group, 2 * half_N, 1)
        self.half_PGN[plane, group] = levels.zero_scaled_NG[:, 0]

    def _symmetric(self, which: int, group: int, scale_N: torch.Tensor, bits: int) -> Levels:
        row_scale_N = self._row_scales[which]
        assert row_scale_N is not None, "symmetric levels have a scale of the row"
        levels = symmetric_levels(scale_N[:, None], row_scale_N, bits)
        assert levels.scale8_NG is not None, "symmetric levels have whole scales"
        self._scale8[which, group] = levels.scale8_NG[:, 0]
        return levels

    def refit(
        self,
        group: int,
        codes_gN: torch.Tensor,
        moment_gg: torch.Tensor,
        gradient_gN: torch.Tensor,
    ) -> None:
        """The best levels of a group's codes, all else fixed; `gradient` is R E, the mean of all
        uses by share."""
        levels = self.scale_GN[group], self.zero_scaled_GN[group]
        found = refitted(codes_gN, moment_gg, gradient_gN, levels, self.bits, self.grid)
        self.store(group, *found)

    def refit_plane(
        self,
        plane: int,
        group: int,
        sign_gN: torch.Tensor,
        moment_gg: torch.Tensor,
        gradient_gN: torch.Tensor,
    ) -> None:
        """Likewise of a plane, its signs +-1; `gradient` is the mean of the uses that have it."""
        by_sign_N = (sign_gN * gradient_gN).sum(dim=0)
        square_N = (sign_gN * (moment_gg @ sign_gN)).sum(dim=0)
        self.store_plane(plane, group, self.half_PGN[plane, group] + by_sign_N / square_N)

    def put_back(self, base: Sequence[Levels], groups_G: torch.Tensor) -> None:
        """Write the levels over those that they came from."""
        base[0].scale_NG[:, groups_G] = self.scale_GN.T
        base[0].zero_scaled_NG[:, groups_G] = self.zero_scaled_GN.T
        for i, levels in enumerate(base):
            if i:
                levels.scale_NG[:, groups_G] = 2 * self.half_PGN[i - 1].T
                levels.zero_scaled_NG[:, groups_G] = self.half_PGN[i - 1].T
            if levels.scale8_NG is not None:
                levels.scale8_NG[:, groups_G] = self._scale8[i].T


def _grid_of(levels: Levels) -> Grid:
    return "affine" if levels.row_scale_N is None else "symmetric"


def first_levels(
    weight_NK: torch.Tensor,
    bits: int,
    grid: Grid,
    weight_K: torch.Tensor | None,
    with_planes: Sequence[float],
) -> list[Levels]:
    """Searched levels of the codes and of each plane, for every row and group, as stored."""
    rows, cols = weight_NK.shape
    found = torch.empty(2 + len(with_planes), cols // GROUP_SIZE, rows)
    for group in range(cols // GROUP_SIZE):
        part = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
        weight_g1 = None if weight_K is None else weight_K[part, None]
        x_gN = weight_NK[:, part].float().T.contiguous()
        for i, values_N in enumerate(search_levels(x_gN, bits, grid, weight_g1, with_planes)):
            found[i, group] = values_N
    scale_NG, zero_scaled_NG, *halves = (each.T.contiguous() for each in found)
    if grid == "affine":
        codes = affine_levels(scale_NG, zero_scaled_NG)
    else:
        codes = symmetric_levels(scale_NG, row_scales(scale_NG), bits)
    planes = [symmetric_levels(2 * half, row_scales(2 * half), 1) for half in halves]
    return [codes, *planes]


def search_levels(
    x_gN: torch.Tensor,
    bits: int,
    grid: Grid,
    weight_g1: torch.Tensor | None,
    with_planes: Sequence[float],
) -> list[torch.Tensor]:
    """Scale and scaled zero of the codes and half the scale of each plane, [N] each.

    `with_planes[i]` is the share of uses that have plane i, `weight_g1` how much each input counts.
    """
    scale, zero_scaled = search(x_gN, bits, grid, weight_g1)
    if not with_planes:
        return [scale, zero_scaled]
    if weight_g1 is None:
        weight_g1 = torch.ones(GROUP_SIZE, 1)
    weight_g1 = weight_g1 / weight_g1.sum()
    center = scale * middle_code(bits) - zero_scaled
    alone = [
        share - (with_planes[i + 1] if i + 1 < len(with_planes) else 0.0)
        for i, share in enumerate(with_planes)
    ]
    best: list[torch.Tensor] | None = None
    rest, sign = torch.empty_like(x_gN), torch.empty_like(x_gN)
    for stretch in _STRETCHES:
        wide = scale * stretch
        zero = wide * middle_code(bits) - center
        wanted = x_gN
        for _ in range(2):
            codes = nearest_codes(wanted, wide, zero, bits)
            torch.sub(x_gN, torch.addcmul(-zero, codes, wide), out=rest)
            error = torch.zeros_like(scale)
            halves: list[torch.Tensor] = []
            wanted = x_gN
            for i, share in enumerate(with_planes):
                size = rest.abs().mul_(weight_g1)
                half = size.sum(dim=0)
                if i == 0:
                    error += (1 - share) * size.mul_(rest.abs()).sum(dim=0)
                torch.sign(rest, out=sign).mul_(half)
                rest.sub_(sign)
                wanted = torch.sub(wanted, sign, alpha=share)
                if alone[i]:
                    error += alone[i] * rest.square().mul_(weight_g1).sum(dim=0)
                halves.append(half)
        found = [error, wide, zero, *halves]
        if best is None:
            best = found
        else:
            better = error < best[0]
            best = [torch.where(better, a, b) for a, b in zip(found, best, strict=True)]
    assert best is not None, "there is at least one stretch"
    return best[1:]
