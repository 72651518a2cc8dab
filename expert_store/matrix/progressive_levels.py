"""Levels of codes and of the planes after them: first guess, least-squares refit, as stored.

A plane halves what the codes leave, so with planes the codes' scale is best a little wider than
without: clipping then costs more than coarseness. Knows matrices only.

Legend: N rows, G groups of 64 cols, g the 64 cols of one group, P planes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expert_store.matrix.grid import search
from expert_store.matrix.levels import Levels, affine_levels, nearest_codes, symmetric_levels
from kernels.packing import middle_code
from kernels.types import GROUP_SIZE, Grid

# The codes' scale when planes follow, in shares of the best one when none do.
_STRETCHES = (0.95, 1.0, 1.06, 1.12, 1.2, 1.3)


class GroupLevels:
    """Scale and scaled zero of the codes, and half the scale of each plane, for all groups."""

    def __init__(
        self, groups: int, rows: int, *, bits: int, grid: Grid, row_scales: Sequence[torch.Tensor]
    ) -> None:
        """`row_scales` are the largest scales of each row, of the codes and of each plane, [N]."""
        self.bits, self.grid, self._row_scales = bits, grid, row_scales
        self.scale_GN, self.zero_scaled_GN = torch.zeros(2, groups, rows)
        self.half_PGN = torch.zeros(len(row_scales) - 1, groups, rows)
        self.scale8 = torch.zeros(len(row_scales), groups, rows, dtype=torch.uint8)

    def store(self, group: int, scale_N: torch.Tensor, zero_scaled_N: torch.Tensor) -> None:
        """Keep levels of the codes as a tile would give them back."""
        if self.grid == "affine":
            levels = affine_levels(scale_N[:, None], zero_scaled_N[:, None])
        else:
            levels = symmetric_levels(scale_N[:, None], self._row_scales[0], self.bits)
            assert levels.scale8_NG is not None, "symmetric levels have whole scales"
            self.scale8[0, group] = levels.scale8_NG[:, 0]
        self.scale_GN[group] = levels.scale_NG[:, 0]
        self.zero_scaled_GN[group] = levels.zero_scaled_NG[:, 0]

    def store_plane(self, plane: int, group: int, half_N: torch.Tensor) -> None:
        """Keep half the scale of a plane as a tile would give it back."""
        levels = symmetric_levels(2 * half_N[:, None], self._row_scales[plane + 1], 1)
        assert levels.scale8_NG is not None, "symmetric levels have whole scales"
        self.scale8[plane + 1, group] = levels.scale8_NG[:, 0]
        self.half_PGN[plane, group] = levels.zero_scaled_NG[:, 0]

    def refit(
        self,
        group: int,
        codes_gN: torch.Tensor,
        moment_gg: torch.Tensor,
        gradient_gN: torch.Tensor,
    ) -> None:
        """The least-squares scale (and zero) of a group's codes, all else fixed; `gradient` is R E,
        the mean of all uses by share."""
        scale_N, zero_scaled_N = self.scale_GN[group], self.zero_scaled_GN[group]
        levels_gN = codes_gN.float()
        if self.grid == "symmetric":
            levels_gN = levels_gN - middle_code(self.bits)
        by_level_N = (levels_gN * gradient_gN).sum(dim=0)
        square_N = (levels_gN * (moment_gg @ levels_gN)).sum(dim=0)
        if self.grid == "symmetric":
            self.store(group, scale_N + by_level_N / square_N, zero_scaled_N)
            return
        level_one_N = (levels_gN * moment_gg.sum(dim=1)[:, None]).sum(dim=0)
        by_one_N, one_one = gradient_gN.sum(dim=0), moment_gg.sum()
        determinant_N = square_N * one_one - level_one_N.square()
        more_scale_N = (by_level_N * one_one - by_one_N * level_one_N) / determinant_N
        more_zero_N = (by_level_N * level_one_N - by_one_N * square_N) / determinant_N
        # Not where all codes are about the same, nor where the levels would be turned round.
        is_fit_N = (determinant_N > 1e-5 * square_N * one_one) & (scale_N + more_scale_N > 0)
        self.store(
            group,
            torch.where(is_fit_N, scale_N + more_scale_N, scale_N),
            torch.where(is_fit_N, zero_scaled_N + more_zero_N, zero_scaled_N),
        )

    def refit_plane(
        self,
        plane: int,
        group: int,
        sign_gN: torch.Tensor,
        moment_gg: torch.Tensor,
        gradient_gN: torch.Tensor,
    ) -> None:
        """Likewise of a plane with signs of +-1; `gradient` is the mean of uses that have it."""
        by_sign_N = (sign_gN * gradient_gN).sum(dim=0)
        square_N = (sign_gN * (moment_gg @ sign_gN)).sum(dim=0)
        self.store_plane(plane, group, self.half_PGN[plane, group] + by_sign_N / square_N)

    def as_stored(self, groups_G: torch.Tensor) -> list[Levels]:
        """Levels of codes and of each plane, [N, G]; group i here is `groups_G[i]` there."""

        def back(values_GN: torch.Tensor) -> torch.Tensor:
            placed = torch.empty_like(values_GN)
            placed[groups_G] = values_GN
            return placed.T.contiguous()

        scale8, row_scales = [back(each) for each in self.scale8], self._row_scales
        scale, zero_scaled = back(self.scale_GN), back(self.zero_scaled_GN)
        if self.grid == "affine":
            codes = Levels(scale, zero_scaled)
        else:
            codes = Levels(scale, zero_scaled, scale8[0], row_scales[0])
        planes = [
            Levels(2 * back(half), back(half), scale8[i + 1], row_scales[i + 1])
            for i, half in enumerate(self.half_PGN)
        ]
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
    best: list[torch.Tensor] | None = None
    for stretch in _STRETCHES:
        wide = scale * stretch
        zero = wide * middle_code(bits) - center
        wanted = x_gN
        for _ in range(2):
            value = wide * nearest_codes(wanted, wide, zero, bits) - zero
            halves: list[torch.Tensor] = []
            rest, wanted = x_gN - value, x_gN
            error = (1 - with_planes[0]) * (weight_g1 * rest.square()).sum(dim=0)
            for i, share in enumerate(with_planes):
                half = (weight_g1 * rest.abs()).sum(dim=0)
                plane = half * torch.where(rest < 0, -1.0, 1.0)
                rest = rest - plane
                wanted = torch.sub(wanted, plane, alpha=share)
                alone = share - (with_planes[i + 1] if i + 1 < len(with_planes) else 0.0)
                error = error + alone * (weight_g1 * rest.square()).sum(dim=0)
                halves.append(half)
        found = [error, wide, zero, *halves]
        if best is None:
            best = found
        else:
            better = error < best[0]
            best = [torch.where(better, a, b) for a, b in zip(found, best, strict=True)]
    assert best is not None, "there is at least one stretch"
    return best[1:]
