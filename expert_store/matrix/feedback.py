"""Codes that make up for each other: the error of one input is carried over to those still open.

GPTQ (Frantar et al., arXiv 2210.17323; LDLQ in Chee et al., arXiv 2307.13304): inputs are rounded
one after the other, and what each leaves is passed on as the inputs' second moment says. Then a few
sweeps of coordinate descent let every input answer to all others, and refit scales. Knows matrices
only.

Legend: N rows, K cols, G groups of 64 cols, g the 64 cols of one group. Weights lie [K, N] here, so
that one input of all rows is contiguous.
"""

from __future__ import annotations

import torch

from expert_store.matrix.grid import column_weights, grid_levels, search
from expert_store.matrix.levels import (
    Levels,
    affine_levels,
    decode,
    encode,
    pack_codes,
    symmetric_levels,
)
from expert_store.matrix.loss import row_errors
from expert_store.matrix.moments import Moment
from expert_store.matrix.ordering import InputOrder, independent, inputs_of
from expert_store.matrix.refit import refitted
from kernels.types import GROUP_SIZE, Grid, QuantizedMatrix

SWEEPS = 2
"""Passes of coordinate descent. On SmolLM2 they take 5 to 8 % off the held-out error at 2 bits; two
more would take 1 to 2 % off."""
CHUNK_ROWS = 4096
"""Rows quantised at a time: a group of them is 1 MiB of float32, which stays in the L2 cache."""
_TURNS = 8
"""Inputs of a group that answer to each other one by one, before the rest of the group hears of
them all at once, by a matrix product."""


def quantize_feedback(
    weight_NK: torch.Tensor, bits: int, *, grid: Grid, moment: Moment
) -> QuantizedMatrix:
    """The [N, K] weight with error feedback over all inputs, or within groups if the moment is
    block-diagonal.

    A row (of a group, if block-diagonal) that feedback does not improve, by the moment's own
    measure, keeps the codes of `quantize_grid`; so does a matrix whose moment is diagonal. Shrink
    the moment by its number of tokens first (`Moment.shrunk`): this trusts what it is given. Raises
    ValueError when shape, bits and moment do not fit.
    """
    weight_K = column_weights(weight_NK, moment)
    levels = grid_levels(weight_NK, bits, grid=grid, weight_K=weight_K)
    codes_NK = encode(weight_NK, levels, bits)
    for groups, own in independent(moment):
        order = InputOrder.of(own)
        if order.is_diagonal:
            continue
        cols = slice(groups.start * GROUP_SIZE, groups.stop * GROUP_SIZE)
        for start in range(0, len(weight_NK), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            weight, codes, base = (
                weight_NK[rows, cols].float(),
                codes_NK[rows, cols],
                levels.at(rows, groups),
            )
            found = _Rounding(weight, base, order, bits, search_first=moment.is_full)
            found.run()
            before_N = row_errors(weight - decode(codes, base), own)
            better_N = row_errors(found.residual_NK(), own) < before_N
            codes[better_N] = found.codes_NK()[better_N]
            base.take(found.levels(), better_N)
    return pack_codes(codes_NK, levels, bits)


class _Rounding:
    """The codes of some rows while they are found. `left` is the weight still open (what the
    feedback made of it) before an input is rounded, and the error of its weight after."""

    def __init__(
        self,
        weight_NK: torch.Tensor,
        base: Levels,
        order: InputOrder,
        bits: int,
        *,
        search_first: bool,
    ) -> None:
        rows, groups = base.scale_NG.shape
        self.order, self.bits, self.groups, self.search_first = order, bits, groups, search_first
        self.row_scale_N = base.row_scale_N
        self.grid: Grid = "affine" if base.row_scale_N is None else "symmetric"
        self.weight_KN = weight_NK.T[order.cols_K]
        self.left_KN = self.weight_KN.clone()
        self.codes_KN = torch.empty(self.weight_KN.shape, dtype=torch.uint8)
        self.scale_GN = base.scale_NG.T[order.groups_G]
        self.zero_scaled_GN = base.zero_scaled_NG.T[order.groups_G]
        self.scale8_GN = torch.empty(groups, rows, dtype=torch.uint8)
        if base.scale8_NG is not None:
            self.scale8_GN = base.scale8_NG.T[order.groups_G]

    def run(self) -> None:
        for group in range(self.groups):
            self._round(group)
        for _ in range(SWEEPS):
            for group in range(self.groups):
                self._sweep(group)

    def residual_NK(self) -> torch.Tensor:
        return self.order.inputs_back(self.left_KN)

    def codes_NK(self) -> torch.Tensor:
        return self.order.inputs_back(self.codes_KN)

    def levels(self) -> Levels:
        back = self.order.groups_back
        scale8 = None if self.row_scale_N is None else back(self.scale8_GN)
        return Levels(back(self.scale_GN), back(self.zero_scaled_GN), scale8, self.row_scale_N)

    def _round(self, group: int) -> None:
        """Levels for a group as feedback left it, then its inputs one by one."""
        part = inputs_of(group)
        open_gN = self.left_KN[part]
        if self.search_first:
            found = search(open_gN, self.bits, self.grid, self.order.weight_Gg[group][:, None])
            self._store(group, *found)
        shares = self.order.shares[part]
        codes_gN, error_gN = self._in_turn(group, open_gN, shares[:, part], None)
        later = slice(part.stop, None)
        self.left_KN[later].addmm_(shares[:, later].T, error_gN, alpha=-1)
        self.codes_KN[part] = codes_gN
        self.left_KN[part] = self.weight_KN[part] - self._rounded(group, codes_gN)

    def _sweep(self, group: int) -> None:
        """Refit the scale of a group, then move each input to the level that is best given all
        others: where the gradient R E of the error vanishes, rounded."""
        part = inputs_of(group)
        moment_gg = self.order.moment[part, part]
        gradient_gN = self.order.moment[part] @ self.left_KN
        codes_gN = self.codes_KN[part].float()
        before_gN = self._rounded(group, codes_gN)
        self._refit(group, codes_gN, moment_gg, gradient_gN)
        refit_gN = self._rounded(group, codes_gN)
        gradient_gN.addmm_(moment_gg, before_gN.sub_(refit_gN))
        inverse_g1 = (1 / moment_gg.diagonal())[:, None]
        target_gN = gradient_gN.mul_(inverse_g1).add_(refit_gN)
        codes_gN, _ = self._in_turn(group, target_gN, moment_gg * inverse_g1.T, refit_gN)
        self.codes_KN[part] = codes_gN
        self.left_KN[part] = self.weight_KN[part] - self._rounded(group, codes_gN)

    def _in_turn(
        self,
        group: int,
        target_gN: torch.Tensor,
        shares_gg: torch.Tensor,
        before_gN: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [64, N] of the levels nearest to the targets, one input after the other; each
        moves the targets of those after it, in place, by what it left (None) or moved itself."""
        scale_N, zero_scaled_N = self.scale_GN[group], self.zero_scaled_GN[group]
        inverse_N = 1 / scale_N.clamp_min(torch.finfo(torch.float32).tiny)
        offset_N, low_N, largest = zero_scaled_N * inverse_N, -zero_scaled_N, 2**self.bits - 1
        codes_gN, passed_gN = torch.empty_like(target_gN), torch.empty_like(target_gN)
        targets, codes, passed = target_gN.unbind(), codes_gN.unbind(), passed_gN.unbind()
        for start in range(0, GROUP_SIZE, _TURNS):
            stop = start + _TURNS
            for j in range(start, stop):
                torch.addcmul(offset_N, targets[j], inverse_N, out=codes[j])
                codes[j].round_().clamp_(0, largest)
                torch.addcmul(low_N, codes[j], scale_N, out=passed[j])
                if before_gN is None:
                    torch.sub(targets[j], passed[j], out=passed[j])
                else:
                    passed[j].sub_(before_gN[j])
                target_gN[j + 1 : stop].addr_(shares_gg[j, j + 1 : stop], passed[j], alpha=-1)
            rest_gN, block_gg = target_gN[stop:], shares_gg[start:stop, stop:]
            rest_gN.addmm_(block_gg.T, passed_gN[start:stop], alpha=-1)
        return codes_gN, passed_gN

    def _refit(
        self,
        group: int,
        codes_gN: torch.Tensor,
        moment_gg: torch.Tensor,
        gradient_gN: torch.Tensor,
    ) -> None:
        """The best levels of a group for its codes, as a tile would give them back."""
        levels = self.scale_GN[group], self.zero_scaled_GN[group]
        found = refitted(codes_gN, moment_gg, gradient_gN, levels, self.bits, self.grid)
        self._store(group, *found)

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

    def _rounded(self, group: int, codes_gN: torch.Tensor) -> torch.Tensor:
        """[64, N]: a group's weights as these codes give them."""
        return (codes_gN * self.scale_GN[group]).sub_(self.zero_scaled_GN[group])
