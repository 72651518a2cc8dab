"""Codes and planes chosen together, for how often the matrix is used with and without its planes.

Error feedback (Frantar et al., arXiv 2210.17323) runs for every use of the matrix at once: a use is
a prefix of the planes, with what its rank blocks leave to be coded. The loss of all uses together
is one quadratic form, the moment times a small matrix of the uses' shares, so the best code and
signs of one input are found exactly, given those of the inputs before. Knows matrices only.

Legend: N rows, K cols, G groups of 64 cols, g the 64 cols of one group, S uses, P planes, C choices
of signs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from expert_store.matrix.grid import column_weights
from expert_store.matrix.levels import Levels, pack_codes
from expert_store.matrix.moments import Moment
from expert_store.matrix.ordering import InputOrder, independent, inputs_of
from expert_store.matrix.progressive_levels import GroupLevels, first_levels, search_levels
from expert_store.matrix.uses import Shares, Use, checked_uses
from kernels.types import GROUP_SIZE, Grid, QuantizedMatrix

SWEEPS = 2
"""Passes of coordinate descent after the feedback."""
CHUNK_ROWS = 2048
"""Rows coded at a time: a group of them for two uses is 1 MiB of float32, as the L2 cache has."""
_TURNS = 8
"""Inputs of a group that answer to each other one by one, before the rest of the group hears of
them all at once, by a matrix product."""


def quantize_progressive(
    uses: Sequence[Use], bits: int, *, grid: Grid, moment: Moment | None = None
) -> tuple[QuantizedMatrix, tuple[QuantizedMatrix, ...]]:
    """Codes and planes with the least sum over uses of share * loss(target - codes - planes).

    With a full moment, feedback runs over all inputs, with blocks within groups of 64, without one
    not at all. Shares are scaled to add up to 1. Of one use without planes it is
    `quantize_feedback`, but for rows that feedback does not improve. Raises ValueError when shapes,
    shares or numbers of planes do not fit.
    """
    uses = checked_uses(uses, bits, grid)
    rows, cols = uses[0].target_NK.shape
    mixed_NK = torch.zeros(rows, cols)
    for use in uses:
        mixed_NK.add_(use.target_NK, alpha=use.share)
    weight_K = column_weights(mixed_NK, moment)
    if moment is None:
        moment = Moment(torch.eye(GROUP_SIZE).repeat(cols // GROUP_SIZE, 1, 1))
    share = Shares(uses)
    levels = first_levels(mixed_NK, bits, grid, weight_K, share.with_planes)
    codes = torch.empty(1 + share.num_planes, rows, cols, dtype=torch.uint8)
    for groups, own in independent(moment):
        order = InputOrder.of(own)
        part = slice(groups.start * GROUP_SIZE, groups.stop * GROUP_SIZE)
        for start in range(0, rows, CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            base = [each.at(chunk, groups) for each in levels]
            targets = [use.target_NK[chunk, part] for use in uses]
            found = _Rounding(targets, share, base, order, bits, search_first=moment.is_full)
            found.run()
            found.levels.put_back(base, order.groups_G)
            codes[:, chunk, part] = found.codes()
    made = [
        pack_codes(each, of_all, width)
        for each, of_all, width in zip(codes, levels, [bits] + [1] * share.num_planes, strict=True)
    ]
    return made[0], tuple(made[1:])


class _Rounding:
    """Codes and signs of some rows while they are found.

    `left` is, for each use, the weight still open (what feedback made of it) before an input is
    rounded, and the error of its weight after.
    """

    def __init__(
        self,
        targets: Sequence[torch.Tensor],
        shares: Shares,
        base: Sequence[Levels],
        order: InputOrder,
        bits: int,
        *,
        search_first: bool,
    ) -> None:
        self.order, self.shares, self.bits, self.search_first = order, shares, bits, search_first
        self.levels = GroupLevels(base, bits, order.groups_G)
        self.target_KSN = torch.stack([each.float().T[order.cols_K] for each in targets], dim=1)
        self.left_KSN = self.target_KSN.clone()
        cols, _, rows = self.target_KSN.shape
        self.num_groups = cols // GROUP_SIZE
        self.codes_KN = torch.empty(cols, rows)
        self.sign_KPN = torch.empty(cols, shares.num_planes, rows)

    def run(self) -> None:
        for group in range(self.num_groups):
            self._round(group)
        for _ in range(SWEEPS):
            for group in range(self.num_groups):
                self._sweep(group)

    def codes(self) -> torch.Tensor:
        """Of the codes and of each plane, [1 + P, N, K] uint8, inputs as they lie."""
        bits = [(self.sign_KPN[:, i] > 0).float() for i in range(self.shares.num_planes)]
        found = [self.order.inputs_back(each) for each in (self.codes_KN, *bits)]
        return torch.stack(found).to(torch.uint8)

    def _round(self, group: int) -> None:
        """Levels for a group as feedback left it, then its inputs one by one."""
        part = inputs_of(group)
        open_gSN = self.left_KSN[part]
        if self.search_first:
            scale, zero_scaled, *halves = search_levels(
                self.shares.mixed(open_gSN),
                self.bits,
                self.levels.grid,
                self.order.weight_Gg[group][:, None],
                self.shares.with_planes,
            )
            self.levels.store(group, scale, zero_scaled)
            for plane, half in enumerate(halves):
                self.levels.store_plane(plane, group, half)
        shares = self.order.shares[part]
        passed_gSN = self._in_turn(group, open_gSN, shares[:, part], None)
        if not self.order.is_diagonal and part.stop < len(self.left_KSN):
            later = self.left_KSN[part.stop :].flatten(1)
            later.addmm_(shares[:, part.stop :].T, passed_gSN.flatten(1), alpha=-1)
        self.left_KSN[part] = self.target_KSN[part] - self._rounded(group)

    def _sweep(self, group: int) -> None:
        """Refit the scales of a group, then move each input to the levels that are best given all
        others: where the gradient R E of the errors vanishes, rounded."""
        part = inputs_of(group)
        moment_gg = self.order.moment[part, part]
        if self.order.is_diagonal:
            gradient = moment_gg @ self.left_KSN[part].flatten(1)
        else:
            gradient = self.order.moment[part] @ self.left_KSN.flatten(1)
        gradient_gSN = gradient.view(GROUP_SIZE, *self.left_KSN.shape[1:])
        before_gSN = self._rounded(group)
        before_gSN = self._refit(group, moment_gg, gradient_gSN, before_gSN)
        inverse_g = 1 / moment_gg.diagonal()
        target_gSN = gradient_gSN.mul_(inverse_g[:, None, None]).add_(before_gSN)
        self._in_turn(group, target_gSN, moment_gg * inverse_g, before_gSN)
        self.left_KSN[part] = self.target_KSN[part] - self._rounded(group)

    def _refit(
        self,
        group: int,
        moment_gg: torch.Tensor,
        gradient_gSN: torch.Tensor,
        before_gSN: torch.Tensor,
    ) -> torch.Tensor:
        """Better scales for the codes and signs there are; the gradient follows, in place. Returns
        the group's weights as they then are."""
        part = inputs_of(group)
        for plane in range(-1, self.shares.num_planes):
            if plane < 0:
                mixed_gN = self.shares.mixed(gradient_gSN)
                self.levels.refit(group, self.codes_KN[part], moment_gg, mixed_gN)
            else:
                mixed_gN = self.shares.mixed_with(plane, gradient_gSN)
                sign_gN = self.sign_KPN[part, plane]
                self.levels.refit_plane(plane, group, sign_gN, moment_gg, mixed_gN)
            now_gSN = self._rounded(group)
            step = before_gSN.sub_(now_gSN).flatten(1)
            gradient_gSN.view(GROUP_SIZE, -1).addmm_(moment_gg, step)
            before_gSN = now_gSN
        return before_gSN

    def _in_turn(
        self,
        group: int,
        target_gSN: torch.Tensor,
        shares_gg: torch.Tensor,
        before_gSN: torch.Tensor | None,
    ) -> torch.Tensor:
        """Set codes and signs of a group, one input after the other, to the best for what each use
        wants of it; each moves the targets of those after it, in place, by what it left (None) or
        moved itself, which is returned [64, S, N]."""
        choose = self._chooser(group)
        first = inputs_of(group).start
        passed_gSN = torch.empty_like(target_gSN)
        targets, passed = target_gSN.view(GROUP_SIZE, -1), passed_gSN.view(GROUP_SIZE, -1)
        for start in range(0, GROUP_SIZE, _TURNS):
            stop = start + _TURNS
            for j in range(start, stop):
                value_SN = choose(first + j, target_gSN[j])
                if before_gSN is None:
                    torch.sub(target_gSN[j], value_SN, out=passed_gSN[j])
                else:
                    torch.sub(value_SN, before_gSN[j], out=passed_gSN[j])
                if not self.order.is_diagonal:
                    targets[j + 1 : stop].addr_(shares_gg[j, j + 1 : stop], passed[j], alpha=-1)
            if not self.order.is_diagonal:
                targets[stop:].addmm_(shares_gg[start:stop, stop:].T, passed[start:stop], alpha=-1)
        return passed_gSN

    def _chooser(self, group: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """What sets the best code and signs of one input, given what each use wants [S, N] of it,
        and returns what each use then gets, [S, N]."""
        levels, shares = self.levels, self.shares
        scale_N, low_N = levels.scale_GN[group], -levels.zero_scaled_GN[group]
        inverse_N = 1 / scale_N.clamp_min(torch.finfo(torch.float32).tiny)
        offset_N, largest = -low_N * inverse_N, 2**self.bits - 1
        half_PN = levels.half_PGN[:, group]
        weight_PS = torch.cat((shares.share_S[None], shares.weight_PS))
        # Of each choice of signs: what the uses' planes add on average, and its mean square.
        plane_CPN = shares.sign_CP[:, :, None] * half_PN
        added_CSN = torch.einsum("sp,cpn->csn", shares.has_SP, plane_CPN)
        mean_CN = torch.einsum("s,csn->cn", shares.share_S, added_CSN)
        square_CN = torch.einsum("s,csn->cn", shares.share_S, added_CSN.square())

        def choose(k: int, wanted_SN: torch.Tensor) -> torch.Tensor:
            mixed_QN = weight_PS @ wanted_SN  # over all uses, then over those with each plane
            rest_CN = mixed_QN[0] - mean_CN
            codes_CN = torch.addcmul(offset_N, rest_CN, inverse_N).round_().clamp_(0, largest)
            if not shares.num_planes:
                self.codes_KN[k] = codes_CN[0]
                return torch.addcmul(low_N, codes_CN[0], scale_N).expand_as(wanted_SN)
            value_CN = torch.addcmul(low_N, codes_CN, scale_N)
            # The error of a choice, less what is the same for all.
            error_CN = torch.sub(value_CN, rest_CN, alpha=2).mul_(value_CN).add_(square_CN)
            error_CN.sub_(shares.sign_CP @ (half_PN * mixed_QN[1:]), alpha=2)
            if len(error_CN) == 2:
                second = error_CN[1] < error_CN[0]
                code_N = torch.where(second, codes_CN[1], codes_CN[0])
                sign_PN = torch.where(second, 1.0, -1.0)[None]
                added_SN = torch.where(second, added_CSN[1], added_CSN[0])
            else:
                best_N = error_CN.argmin(dim=0)
                code_N = codes_CN.gather(0, best_N[None])[0]
                sign_PN = shares.sign_CP.T[:, best_N]
                added_SN = shares.has_SP @ (sign_PN * half_PN)
            self.codes_KN[k], self.sign_KPN[k] = code_N, sign_PN
            return torch.addcmul(low_N, code_N, scale_N) + added_SN

        return choose

    def _rounded(self, group: int) -> torch.Tensor:
        """A group's weights as its codes and signs give them to each use, [64, S, N]."""
        part, levels = inputs_of(group), self.levels
        value_gN = self.codes_KN[part] * levels.scale_GN[group]
        value_gN.sub_(levels.zero_scaled_GN[group])
        rounded_gSN = value_gN[:, None].repeat(1, len(self.shares.share_S), 1)
        for plane in range(self.shares.num_planes):
            added_gN = self.sign_KPN[part, plane] * levels.half_PGN[plane, group]
            rounded_gSN.addcmul_(self.shares.has_SP[:, plane, None], added_gN[:, None])
        return rounded_gSN
