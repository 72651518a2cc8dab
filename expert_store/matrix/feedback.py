"""Codes that make up for each other: the error of one input is carried over to those still open.

GPTQ (Frantar et al., arXiv 2210.17323; LDLQ in Chee et al., arXiv 2307.13304): inputs are rounded
one after the other, and what each leaves is passed on as the inputs' second moment says. Then a few
sweeps of coordinate descent let every input answer to all others, and refit scales. Knows matrices
only.

Legend: N rows, K cols, G groups of 64 cols, g the 64 cols of one group. Weights lie [K, N] here, so
that one input of all rows is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expert_store.matrix.grid import DAMPING, column_weights, grid_levels, search
from expert_store.matrix.levels import (
    Levels,
    affine_levels,
    decode,
    encode,
    nearest_codes,
    pack_codes,
    symmetric_levels,
)
from expert_store.matrix.loss import row_errors
from expert_store.matrix.moments import Moment
from kernels.packing import middle_code
from kernels.types import GROUP_SIZE, Grid, QuantizedMatrix

SWEEPS = 2
"""Passes of coordinate descent. On SmolLM2 they take 5 to 8 % off the held-out error at 2 bits; two
more would take 1 to 2 % off."""
CHUNK_ROWS = 2048
"""Rows quantised at a time: a group of them is 512 KiB of float32, which stays in the L2 cache."""


def quantize_feedback(
    weight_NK: torch.Tensor, bits: int, *, grid: Grid, moment: Moment
) -> QuantizedMatrix:
    """The [N, K] weight with error feedback over all inputs, or within groups if the moment is
    block-diagonal.

    A row that feedback does not improve, by the moment's own measure, gets the codes of
    `quantize_grid`; so does a matrix whose moment is diagonal. Shrink the moment by its number of
    tokens first (`Moment.shrunk`): this trusts what it is given. Raises ValueError when shape, bits
    and moment do not fit.
    """
    weight_K = column_weights(weight_NK, moment)
    levels = grid_levels(weight_NK, bits, grid=grid, weight_K=weight_K)
    codes_NK = encode(weight_NK, levels, bits)
    if not _is_diagonal(moment):
        order = _Order.of(moment)
        for start in range(0, len(weight_NK), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            weight = weight_NK[rows].float()
            found = _Rounding(weight, levels.at(rows), order, bits)
            found.run()
            before_N = row_errors(weight - decode(codes_NK[rows], levels.at(rows)), moment)
            better_N = row_errors(found.residual_NK(), moment) < before_N
            codes_NK[rows][better_N] = found.codes_NK()[better_N]
            levels.at(rows).take(found.levels(), better_N)
    return pack_codes(codes_NK, levels, bits)


def _is_diagonal(moment: Moment) -> bool:
    energy = moment.values.diagonal(dim1=-2, dim2=-1)
    return int(moment.values.count_nonzero()) == int(energy.count_nonzero())


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """In which order inputs are rounded (loud ones first) and what each passes on to the rest.

    With R = M M^T, M upper triangular, and U = M^-1, an error of input j is best made up for when
    each later input i errs by U[j, i] / U[j, j] of it; M[j, j]^2 of its square is heard then.
    Everything below but the two permutations is in the order of rounding.
    """

    groups_G: torch.Tensor  # the groups as they come
    cols_K: torch.Tensor  # the inputs as they come, a whole group at a time
    moment: torch.Tensor  # damped, [K, K] or [G, 64, 64]
    shares: torch.Tensor  # U[j, i] / U[j, j], of the same shape
    weight_Gg: torch.Tensor  # M[j, j]^2

    @classmethod
    def of(cls, moment: Moment) -> _Order:
        energy_Gg = moment.diagonal().view(-1, GROUP_SIZE)
        groups_G = energy_Gg.sum(dim=1).argsort(descending=True, stable=True)
        within_Gg = energy_Gg[groups_G].argsort(dim=1, descending=True, stable=True)
        cols_K = (groups_G[:, None] * GROUP_SIZE + within_Gg).view(-1)
        damping = DAMPING * float(energy_Gg.mean())
        if moment.is_full:
            values = moment.values[cols_K][:, cols_K]
        else:
            values = moment.values[
                groups_G[:, None, None], within_Gg[:, :, None], within_Gg[:, None]
            ]
        values.diagonal(dim1=-2, dim2=-1).add_(damping)
        # Float64, since the loudest input may have a million times the energy of the quietest.
        root = torch.linalg.cholesky(values.double().flip(-1, -2)).flip(-1, -2)
        unit = torch.eye(values.shape[-1], dtype=torch.float64).expand_as(root)
        diagonal = root.diagonal(dim1=-2, dim2=-1)
        shares = torch.linalg.solve_triangular(root, unit, upper=True) * diagonal.unsqueeze(-1)
        weight_Gg = diagonal.square().view(-1, GROUP_SIZE).float()
        return cls(groups_G, cols_K, values, shares.float(), weight_Gg)

    def block(self, values: torch.Tensor, group: int) -> torch.Tensor:
        """[64, 64] of a group and itself, from `moment` or `shares`."""
        if values.dim() == 3:
            return values[group]
        part = _inputs(group)
        return values[part, part]


class _Rounding:
    """The codes of some rows while they are found. `left` is the weight still open (what the
    feedback made of it) before an input is rounded, and the error of its weight after."""

    def __init__(self, weight_NK: torch.Tensor, base: Levels, order: _Order, bits: int) -> None:
        rows, groups = base.scale_NG.shape
        self.order, self.bits, self.groups = order, bits, groups
        self.row_scale_N = base.row_scale_N
        self.grid: Grid = "affine" if base.row_scale_N is None else "symmetric"
        self.weight_KN = weight_NK.T[order.cols_K]
        self.left_KN = self.weight_KN.clone()
        self.codes_KN = torch.empty(self.weight_KN.shape, dtype=torch.uint8)
        self.scale_GN, self.zero_scaled_GN = torch.empty(2, groups, rows)
        self.scale8_GN = torch.empty(groups, rows, dtype=torch.uint8)

    def run(self) -> None:
        for group in range(self.groups):
            self._round(group)
        for _ in range(SWEEPS):
            for group in range(self.groups):
                self._sweep(group)

    def residual_NK(self) -> torch.Tensor:
        return self._in_place(self.left_KN)

    def codes_NK(self) -> torch.Tensor:
        return self._in_place(self.codes_KN)

    def levels(self) -> Levels:
        def back(values_GN: torch.Tensor) -> torch.Tensor:
            placed = torch.empty_like(values_GN)
            placed[self.order.groups_G] = values_GN
            return placed.T

        scale8 = None if self.row_scale_N is None else back(self.scale8_GN)
        return Levels(back(self.scale_GN), back(self.zero_scaled_GN), scale8, self.row_scale_N)

    def _in_place(self, values_KN: torch.Tensor) -> torch.Tensor:
        placed = torch.empty_like(values_KN)
        placed[self.order.cols_K] = values_KN
        return placed.T.contiguous()

    def _round(self, group: int) -> None:
        """Levels for a group as feedback left it, then its inputs one by one."""
        part, shares = _inputs(group), self.order.block(self.order.shares, group)
        open_gN = self.left_KN[part]
        weight_g1 = self.order.weight_Gg[group][:, None]
        self._store(group, *search(open_gN, self.bits, self.grid, weight_g1))
        scale_N, zero_scaled_N = self.scale_GN[group], self.zero_scaled_GN[group]
        error_gN = torch.empty_like(open_gN)
        for j in range(GROUP_SIZE):
            code_N = nearest_codes(open_gN[j], scale_N, zero_scaled_N, self.bits)
            self.codes_KN[part.start + j] = code_N
            error_gN[j] = open_gN[j] - (code_N * scale_N - zero_scaled_N)
            open_gN[j + 1 :].addr_(shares[j, j + 1 :], error_gN[j], alpha=-1)
        if self.order.shares.dim() == 2:
            later = slice(part.stop, None)
            self.left_KN[later].addmm_(self.order.shares[part, later].T, error_gN, alpha=-1)
        self.left_KN[part] = self.weight_KN[part] - self._rounded(group)

    def _sweep(self, group: int) -> None:
        """Refit the scale of a group, then move each input to the level that is best given all
        others: where the gradient R E of the error vanishes, rounded."""
        part, moment_gg = _inputs(group), self.order.block(self.order.moment, group)
        if self.order.moment.dim() == 2:
            gradient_gN = self.order.moment[part] @ self.left_KN
        else:
            gradient_gN = moment_gg @ self.left_KN[part]
        rounded_gN = self._rounded(group)
        self._refit(group, moment_gg, gradient_gN)
        moved_gN = self._rounded(group)
        gradient_gN.addmm_(moment_gg, moved_gN - rounded_gN, alpha=-1)
        scale_N, zero_scaled_N = self.scale_GN[group], self.zero_scaled_GN[group]
        energy_g = moment_gg.diagonal().tolist()
        for j in range(GROUP_SIZE):
            best_N = torch.add(moved_gN[j], gradient_gN[j], alpha=1 / energy_g[j])
            code_N = nearest_codes(best_N, scale_N, zero_scaled_N, self.bits)
            self.codes_KN[part.start + j] = code_N
            step_N = (code_N * scale_N - zero_scaled_N).sub_(moved_gN[j])
            gradient_gN.addr_(moment_gg[:, j], step_N, alpha=-1)
        self.left_KN[part] = self.weight_KN[part] - self._rounded(group)

    def _refit(self, group: int, moment_gg: torch.Tensor, gradient_gN: torch.Tensor) -> None:
        """The least-squares scale (and zero) of a group for its codes, all other groups fixed."""
        codes_gN = self.codes_KN[_inputs(group)].float()
        if self.grid == "symmetric":
            codes_gN -= middle_code(self.bits)
        by_code_N = (codes_gN * gradient_gN).sum(dim=0)
        code_code_N = (codes_gN * (moment_gg @ codes_gN)).sum(dim=0)
        scale_N, zero_scaled_N = self.scale_GN[group], self.zero_scaled_GN[group]
        if self.grid == "symmetric":
            self._store(group, scale_N + by_code_N / code_code_N, zero_scaled_N)
            return
        code_one_N = (codes_gN * moment_gg.sum(dim=1)[:, None]).sum(dim=0)
        by_one_N, one_one = gradient_gN.sum(dim=0), moment_gg.sum()
        determinant_N = code_code_N * one_one - code_one_N.square()
        more_scale_N = (by_code_N * one_one - by_one_N * code_one_N) / determinant_N
        more_zero_N = (by_code_N * code_one_N - by_one_N * code_code_N) / determinant_N
        # Not where all codes are about the same, nor where the levels would be turned round.
        is_fit_N = (determinant_N > 1e-5 * code_code_N * one_one) & (scale_N + more_scale_N > 0)
        self._store(
            group,
            torch.where(is_fit_N, scale_N + more_scale_N, scale_N),
            torch.where(is_fit_N, zero_scaled_N + more_zero_N, zero_scaled_N),
        )

    def _store(self, group: int, scale_N: torch.Tensor, zero_scaled_N: torch.Tensor) -> None:
        """Keep levels as a tile would give them back."""
        if self.row_scale_N is None:
            levels = affine_levels(scale_N[:, None], zero_scaled_N[:, None])
        else:
            levels = symmetric_levels(scale_N[:, None], self.row_scale_N, self.bits)
            assert levels.scale8_NG is not None, "symmetric levels have whole scales"
            self.scale8_GN[group] = levels.scale8_NG[:, 0]
        self.scale_GN[group] = levels.scale_NG[:, 0]
        self.zero_scaled_GN[group] = levels.zero_scaled_NG[:, 0]

    def _rounded(self, group: int) -> torch.Tensor:
        """[64, N]: a group's weights as its codes give them."""
        codes_gN = self.codes_KN[_inputs(group)].float()
        return codes_gN.mul_(self.scale_GN[group]).sub_(self.zero_scaled_GN[group])


def _inputs(group: int) -> slice:
    return slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
