"""Codes and planes chosen together, for how often the matrix is used with and without its planes.

Error feedback (Frantar et al., arXiv 2210.17323) runs for every use of the matrix at once: a use is
a prefix of the planes, with what its rank blocks leave to be coded. The loss of all uses together
is one quadratic form, the moment times a small matrix of the uses' shares, so the best code and
signs of one input are found exactly, given those of the inputs before. Knows matrices only.

Legend: N rows, K cols, G groups of 64 cols, g the 64 cols of one group, S uses, P planes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from expert_store.matrix.levels import Levels, check_weight, nearest_codes, pack_codes, row_scales
from expert_store.matrix.moments import Moment
from expert_store.matrix.ordering import InputOrder, inputs_of
from expert_store.matrix.progressive_levels import GroupLevels, search_levels
from kernels.types import GROUP_SIZE, Grid, QuantizedMatrix

LEAST_SHARE = 0.02
"""A use counts at least this much, so that planes that are never used are still good."""
MAX_PLANES = 3
SWEEPS = 2
"""Passes of coordinate descent after the feedback."""
CHUNK_ROWS = 2048
"""Rows coded at a time: a group of them is 512 KiB of float32, which stays in the L2 cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One way in which the matrix is used: how often, with how many planes, aiming at what."""

    share: float
    num_planes: int
    target_NK: torch.Tensor  # the weight, less what else is added in this use


def quantize_progressive(
    uses: Sequence[Use], bits: int, *, grid: Grid, moment: Moment | None = None
) -> tuple[QuantizedMatrix, tuple[QuantizedMatrix, ...]]:
    """Codes and planes with the least sum over uses of share * loss(target - codes - planes).

    With a full moment, feedback runs over all inputs, with blocks within groups of 64, without one
    not at all. Shares are scaled to add up to 1. Of one use without planes it is
    `quantize_feedback`, but for rows that feedback does not improve. Raises ValueError when shapes,
    shares or numbers of planes do not fit.
    """
    uses = _checked(uses, bits, grid)
    rows, cols = uses[0].target_NK.shape
    if moment is None:
        moment = Moment(torch.eye(GROUP_SIZE).repeat(cols // GROUP_SIZE, 1, 1))
    elif moment.cols != cols:
        raise ValueError(f"moment: expected {cols} inputs, got {moment.cols}")
    order = InputOrder.of(moment)
    codes: list[list[torch.Tensor]] = []
    levels: list[list[Levels]] = []
    for start in range(0, rows, CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        found = _Rounding(
            [replace(u, target_NK=u.target_NK[part]) for u in uses], order, bits, grid
        )
        found.run()
        codes.append(found.codes_NK())
        levels.append(found.levels.as_stored(order.groups_G))
    made = [
        pack_codes(torch.cat(of_all), _joined(of_levels), width)
        for of_all, of_levels, width in zip(
            zip(*codes, strict=True),
            zip(*levels, strict=True),
            [bits] + [1] * (len(codes[0]) - 1),
            strict=True,
        )
    ]
    return made[0], tuple(made[1:])


def _checked(uses: Sequence[Use], bits: int, grid: Grid) -> list[Use]:
    if not uses:
        raise ValueError("uses: expected at least one")
    for use in uses:
        check_weight(use.target_NK, bits, grid)
        if use.target_NK.shape != uses[0].target_NK.shape:
            raise ValueError(
                f"uses: targets differ in shape, {tuple(use.target_NK.shape)} and "
                f"{tuple(uses[0].target_NK.shape)}"
            )
        if not 0 <= use.num_planes <= MAX_PLANES:
            raise ValueError(f"num_planes: got {use.num_planes}, expected 0 to {MAX_PLANES}")
        if not (math.isfinite(use.share) and use.share >= 0):
            raise ValueError(f"share: got {use.share}, expected at least 0")
    total = sum(use.share for use in uses)
    if total <= 0:
        raise ValueError("shares: expected one above 0")
    shares = [max(use.share / total, LEAST_SHARE) for use in uses]
    return [
        Use(share / sum(shares), use.num_planes, use.target_NK)
        for use, share in zip(uses, shares, strict=True)
    ]


class _Rounding:
    """Codes and signs of some rows while they are found.

    `left` is, for each use, the weight still open (what feedback made of it) before an input is
    rounded, and the error of its weight after.
    """

    def __init__(self, uses: list[Use], order: InputOrder, bits: int, grid: Grid) -> None:
        self.order, self.bits = order, bits
        self.shares = [use.share for use in uses]
        self.planes_of = [use.num_planes for use in uses]
        num_planes = max(self.planes_of)
        self.with_planes = [
            sum(s for s, n in zip(self.shares, self.planes_of, strict=True) if n > i)
            for i in range(num_planes)
        ]
        self.target_KN = [use.target_NK.float().T[order.cols_K] for use in uses]
        self.left_KN = [each.clone() for each in self.target_KN]
        self.codes_KN = torch.empty(self.target_KN[0].shape, dtype=torch.uint8)
        self.signs_PKN = torch.empty(num_planes, *self.codes_KN.shape, dtype=torch.uint8)
        cols, rows = self.codes_KN.shape
        self.num_groups = cols // GROUP_SIZE
        # Scales of a row are fractions of its largest, so a first look at all groups comes first.
        first = [self._searched(group, grid) for group in range(self.num_groups)]
        largest = [
            row_scales(torch.stack([found[i] for found in first], dim=1))
            for i in (0, *range(2, 2 + num_planes))
        ]
        for i in range(1, 1 + num_planes):
            largest[i] = row_scales(2 * largest[i][:, None])
        self.levels = GroupLevels(self.num_groups, rows, bits=bits, grid=grid, row_scales=largest)

    def run(self) -> None:
        for group in range(self.num_groups):
            self._round(group)
        for _ in range(SWEEPS):
            for group in range(self.num_groups):
                self._sweep(group)

    def codes_NK(self) -> list[torch.Tensor]:
        """Of the codes and of each plane, uint8."""
        return [self.order.inputs_back(each) for each in (self.codes_KN, *self.signs_PKN)]

    def _searched(self, group: int, grid: Grid) -> list[torch.Tensor]:
        mixed_gN = _mix([left_KN[inputs_of(group)] for left_KN in self.left_KN], self.shares)
        weight_g1 = self.order.weight_Gg[group][:, None]
        return search_levels(mixed_gN, self.bits, grid, weight_g1, self.with_planes)

    def _round(self, group: int) -> None:
        """Levels for a group as feedback left it, then its inputs one by one."""
        part, shares = inputs_of(group), self.order.block(self.order.shares, group)
        scale, zero_scaled, *halves = self._searched(group, self.levels.grid)
        self.levels.store(group, scale, zero_scaled)
        for plane, half in enumerate(halves):
            self.levels.store_plane(plane, group, half)
        open_gN = [left_KN[part] for left_KN in self.left_KN]
        error_gN = [torch.empty_like(each) for each in open_gN]
        for j in range(GROUP_SIZE):
            rest = self._choose(group, j, [each[j] for each in open_gN])
            for each, error, rest_N in zip(open_gN, error_gN, rest, strict=True):
                error[j] = rest_N
                if not self.order.is_diagonal:
                    each[j + 1 :].addr_(shares[j, j + 1 :], rest_N, alpha=-1)
        if self.order.shares.dim() == 2 and not self.order.is_diagonal:
            later = slice(part.stop, None)
            for left_KN, error in zip(self.left_KN, error_gN, strict=True):
                left_KN[later].addmm_(self.order.shares[part, later].T, error, alpha=-1)
        self._set_errors(group)

    def _sweep(self, group: int) -> None:
        """Refit the scales of a group, then move each input to the levels that are best given all
        others: where the gradient R E of the errors vanishes, rounded."""
        part, moment_gg = inputs_of(group), self.order.block(self.order.moment, group)
        self._refit(group, moment_gg)
        gradient_gN = self._gradients(group, moment_gg)
        left_gN = [left_KN[part] for left_KN in self.left_KN]
        energy_g = moment_gg.diagonal().tolist()
        for j in range(GROUP_SIZE):
            # The error that would be left if the input's levels were 0, others making up for it.
            steps = [gradient[j] / energy_g[j] for gradient in gradient_gN]
            wanted = [
                target_KN[part.start + j] - left[j] + step
                for target_KN, left, step in zip(self.target_KN, left_gN, steps, strict=True)
            ]
            rest = self._choose(group, j, wanted)
            if self.order.is_diagonal:
                continue
            for gradient, step, rest_N in zip(gradient_gN, steps, rest, strict=True):
                gradient.addr_(moment_gg[:, j], step - rest_N, alpha=-1)
        self._set_errors(group)

    def _refit(self, group: int, moment_gg: torch.Tensor) -> None:
        part = inputs_of(group)
        mixed_gN = _mix(self._gradients(group, moment_gg), self.shares)
        self.levels.refit(group, self.codes_KN[part], moment_gg, mixed_gN)
        self._set_errors(group)
        for plane, share in enumerate(self.with_planes):
            shares = [
                s / share if n > plane else 0.0
                for s, n in zip(self.shares, self.planes_of, strict=True)
            ]
            mixed_gN = _mix(self._gradients(group, moment_gg), shares)
            sign_gN = self.signs_PKN[plane, part].float().mul_(2).sub_(1)
            self.levels.refit_plane(plane, group, sign_gN, moment_gg, mixed_gN)
            self._set_errors(group)

    def _gradients(self, group: int, moment_gg: torch.Tensor) -> list[torch.Tensor]:
        """R E of a group's inputs for each use, [64, N]."""
        part = inputs_of(group)
        if self.order.moment.dim() == 2 and not self.order.is_diagonal:
            return [self.order.moment[part] @ left_KN for left_KN in self.left_KN]
        return [moment_gg @ left_KN[part] for left_KN in self.left_KN]

    def _choose(self, group: int, j: int, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
        """Set the best code and signs of one input of every row for what each use wants of it, [N];
        return what they leave of it."""
        scale_N, zero_scaled_N = self.levels.scale_GN[group], self.levels.zero_scaled_GN[group]
        num_planes = len(self.with_planes)
        best: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]] | None = None
        choice = torch.zeros(len(scale_N), dtype=torch.uint8)
        for number, signs in enumerate(itertools.product((-1, 1), repeat=num_planes)):
            rest = list(wanted)
            for plane, sign in enumerate(signs):
                half_N = self.levels.half_PGN[plane, group]
                rest = [
                    torch.sub(each, half_N, alpha=sign) if num > plane else each
                    for each, num in zip(rest, self.planes_of, strict=True)
                ]
            mixed = _mix(rest, self.shares)
            codes = nearest_codes(mixed, scale_N, zero_scaled_N, self.bits)
            value = torch.addcmul(-zero_scaled_N, codes, scale_N)
            rest = [each - value for each in rest]
            if num_planes == 0:
                best = mixed, codes, rest
                break
            error = _mix([each.square() for each in rest], self.shares)
            if best is None:
                best = error, codes, rest
                continue
            better = error < best[0]
            choice[better] = number
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, codes, best[1]),
                [torch.where(better, a, b) for a, b in zip(rest, best[2], strict=True)],
            )
        assert best is not None, "there is at least one choice of signs"
        k = group * GROUP_SIZE + j
        self.codes_KN[k] = best[1]
        for plane in range(num_planes):
            self.signs_PKN[plane, k] = choice >> (num_planes - 1 - plane) & 1
        return best[2]

    def _set_errors(self, group: int) -> None:
        """What a group's codes and signs leave of its weights, for each use."""
        part, levels = inputs_of(group), self.levels
        value_gN = self.codes_KN[part].float()
        value_gN.mul_(levels.scale_GN[group]).sub_(levels.zero_scaled_GN[group])
        for num in range(len(self.with_planes) + 1):
            if num:
                sign_gN = self.signs_PKN[num - 1, part].float().mul_(2).sub_(1)
                value_gN = value_gN + sign_gN * levels.half_PGN[num - 1, group]
            for i, of_use in enumerate(self.planes_of):
                if of_use == num:
                    self.left_KN[i][part] = self.target_KN[i][part] - value_gN


def _mix(values: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    mixed = values[0] * shares[0]
    for value, share in zip(values[1:], shares[1:], strict=True):
        mixed = torch.add(mixed, value, alpha=share)
    return mixed


def _joined(levels: Sequence[Levels]) -> Levels:
    """Levels of parts of the rows as one."""

    def cat(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    return Levels(
        torch.cat([each.scale_NG for each in levels]),
        torch.cat([each.zero_scaled_NG for each in levels]),
        cat([each.scale8_NG for each in levels]),
        cat([each.row_scale_N for each in levels]),
    )
