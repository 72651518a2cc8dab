"""The best levels for every group of a weight, by a search over clip ratios with closed-form fits.

Given codes, the best scale (and zero) is a least-squares fit; given levels, the best codes are the
nearest. From a few clip ratios, and from small moves of the best so far, one round of both is done
and the least error kept: no group is ever worse than at any start. Knows matrices only.

Legend: N rows, K cols, G groups of cols, g the cols of one group, * any shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expert_store.matrix.levels import (
    Levels,
    affine_levels,
    check_weight,
    encode,
    pack_codes,
    row_scales,
    symmetric_levels,
)
from expert_store.matrix.moments import Moment
from kernels.packing import middle_code
from kernels.types import GROUP_SIZE, Grid, QuantizedMatrix

DAMPING = 0.01
"""Share of the mean energy added to that of every input: an input that was silent in the
calibration text still counts a little."""
CHUNK_GROUPS = 4096
"""Groups searched at a time: 1 MiB of float32, so that the passes over it stay in the L2 cache."""
# Widest and narrowest clip ratio that were best for some group of real weights, by bits.
_CLIP_RANGE = {1: (0.3, 0.8), 2: (0.4, 1.0), 3: (0.55, 1.0), 4: (0.7, 1.0)}
_NUM_CLIPS = {"affine": 4, "symmetric": 6}
# Moves of the best affine levels so far, in shares of the scale and in codes; halved once.
_MOVES = tuple((scale, shift) for scale in (-0.08, 0.08) for shift in (-0.33, 0.33))
_MOVE_SIZES = (1.0, 0.5)


def quantize_grid(
    weight_NK: torch.Tensor,
    bits: int,
    *,
    grid: Grid,
    moment: Moment | None = None,
    group_size: int = GROUP_SIZE,
) -> QuantizedMatrix:
    """The [N, K] weight on searched levels; with a moment, its diagonal weights the errors.

    About 8 passes (symmetric) or 14 (affine) over the weights. Raises ValueError when shape, bits
    and moment do not fit.
    """
    weight_K = column_weights(weight_NK, moment)
    levels = grid_levels(weight_NK, bits, grid=grid, weight_K=weight_K, group_size=group_size)
    return pack_codes(encode(weight_NK, levels, bits), levels, bits)


def column_weights(weight_NK: torch.Tensor, moment: Moment | None) -> torch.Tensor | None:
    """[K] damped mean squares of the inputs; None where all are alike, which is faster."""
    if moment is None:
        return None
    if moment.cols != weight_NK.shape[1]:
        raise ValueError(f"moment: expected {weight_NK.shape[1]} inputs, got {moment.cols}")
    energy_K = moment.diagonal()
    if bool((energy_K == energy_K[0]).all()):
        return None
    return energy_K + DAMPING * energy_K.mean()


def grid_levels(
    weight_NK: torch.Tensor,
    bits: int,
    *,
    grid: Grid,
    weight_K: torch.Tensor | None,
    group_size: int = GROUP_SIZE,
) -> Levels:
    """The searched levels of every row and group, rounded as stored."""
    check_weight(weight_NK, bits, grid, group_size)
    rows, cols = weight_NK.shape
    groups = cols // group_size
    weight_gG = None if weight_K is None else weight_K.view(groups, group_size).T.contiguous()
    scale_NG, zero_scaled_NG = torch.empty(rows, groups), torch.empty(rows, groups)
    step = max(1, CHUNK_GROUPS // groups)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        x_gNG = weight_NK[part].float().reshape(-1, groups, group_size).permute(2, 0, 1)
        scale_NG[part], zero_scaled_NG[part] = search(
            x_gNG.contiguous(), bits, grid, None if weight_gG is None else weight_gG[:, None]
        )
    if grid == "symmetric":
        return symmetric_levels(scale_NG, row_scales(scale_NG), bits)
    return affine_levels(scale_NG, zero_scaled_NG)


def search(
    x: torch.Tensor, bits: int, grid: Grid, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and scaled zero, [*] float32, of each group in x [g, *], before any rounding.

    `weight` broadcasts to x: how much each squared error counts. A group of equal weights gets the
    scale 0.
    """
    if grid == "symmetric":
        return _search_symmetric(x, bits, weight)
    return _search_affine(x, bits, weight)


@dataclass(slots=True, eq=False)
class _Best:
    """The least error of every group so far, and the levels that gave it."""

    scale: torch.Tensor  # [*]
    zero: torch.Tensor  # [*] in codes
    error: torch.Tensor  # [*]

    def keep(self, other: _Best) -> None:
        better = other.error < self.error
        self.scale = torch.where(better, other.scale, self.scale)
        self.zero = torch.where(better, other.zero, self.zero)
        self.error = torch.where(better, other.error, self.error)


def _search_affine(
    x: torch.Tensor, bits: int, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if weight is None:
        mean = x.mean(dim=0)
        fit = _AffineFit(x - mean, None, bits)
    else:
        weight = weight / weight.mean(dim=0)
        mean = (x * weight).mean(dim=0)
        fit = _AffineFit(x - mean, weight, bits)
    low, high = fit.x.aminmax(dim=0)
    widest, center = (high - low) / (2**bits - 1), (low + high) / 2
    best: _Best | None = None
    for clip in torch.linspace(*_CLIP_RANGE[bits], _NUM_CLIPS["affine"]).tolist():
        scale = widest * clip
        found = fit.fitted(scale, middle_code(bits) - center * _inverse(scale))
        if best is None:
            best = found
        else:
            best.keep(found)
    assert best is not None
    best.keep(fit.fitted(best.scale, best.zero))
    for size in _MOVE_SIZES:
        base = _Best(best.scale, best.zero, best.error)
        for stretch, shift in _MOVES:
            scale = base.scale * (1 + stretch * size)
            # The weight in the middle of the levels stays there, but for the shift.
            zero = (base.zero - middle_code(bits)) / (1 + stretch * size)
            best.keep(fit.fitted(scale, zero + middle_code(bits) + shift * size))
    best.keep(fit.fitted(best.scale, best.zero))
    return best.scale, best.scale * best.zero - mean


class _AffineFit:
    """Least-squares scale and zero of weights x [g, *] whose (weighted) mean is 0."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor | None, bits: int) -> None:
        self.x, self.weight, self.largest = x, weight, 2**bits - 1
        self._weighted_x = x if weight is None else x * weight
        self._energy = (self._weighted_x * x).sum(dim=0)
        self._codes, self._product = torch.empty_like(x), torch.empty_like(x)

    def fitted(self, scale: torch.Tensor, zero: torch.Tensor) -> _Best:
        """The best levels for the codes nearest to these, and their error."""
        codes, product = self._codes, self._product
        torch.addcmul(zero, self.x, _inverse(scale), out=codes).round_().clamp_(0, self.largest)
        covariance = torch.mul(codes, self._weighted_x, out=product).sum(dim=0)
        if self.weight is None:
            mean = codes.mean(dim=0)
            square = torch.mul(codes, codes, out=product).sum(dim=0)
        else:
            weighted = torch.mul(codes, self.weight, out=product)
            mean = weighted.mean(dim=0)
            square = weighted.mul_(codes).sum(dim=0)
        variance = square - len(codes) * mean * mean
        # One code only, up to rounding: any scale will do, and the level is the mean weight, 0.
        fits = (variance > 1e-5 * square) & (covariance > 0)
        new_scale = torch.where(fits, covariance / variance, scale)
        explained = torch.where(fits, covariance * new_scale, torch.zeros_like(scale))
        return _Best(new_scale, mean, self._energy - explained)


def _search_symmetric(
    x: torch.Tensor, bits: int, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    fit = _SymmetricFit(x, weight, bits)
    low, high = x.aminmax(dim=0)
    widest = torch.maximum(high, -low) / middle_code(bits)
    best: _Best | None = None
    # At 1 bit the codes are the signs, whatever the scale: one fit is the answer.
    clips = torch.linspace(*_CLIP_RANGE[bits], _NUM_CLIPS["symmetric"] if bits > 1 else 1)
    for clip in clips.tolist():
        found = fit.fitted(widest * clip)
        if best is None:
            best = found
        else:
            best.keep(found)
    assert best is not None
    if bits > 1:
        best.keep(fit.fitted(best.scale))
    return best.scale, best.scale * middle_code(bits)


class _SymmetricFit:
    """Least-squares scale of weights x [g, *] on levels evenly about zero."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor | None, bits: int) -> None:
        self.x, self.weight, self.bits = x, weight, bits
        self._weighted_x = x if weight is None else x * weight
        self._energy = (self._weighted_x * x).sum(dim=0)
        self._levels, self._product = torch.empty_like(x), torch.empty_like(x)

    def fitted(self, scale: torch.Tensor) -> _Best:
        """The best scale for the codes nearest at this one, and its error."""
        levels, product = self._levels, self._product
        middle = middle_code(self.bits)
        torch.mul(self.x, _inverse(scale), out=levels).add_(middle).round_()
        levels.clamp_(0, 2 * middle).sub_(middle)
        covariance = torch.mul(levels, self._weighted_x, out=product).sum(dim=0)
        torch.mul(levels, levels, out=product)
        if self.weight is not None:
            product *= self.weight
        new_scale = (covariance / product.sum(dim=0).clamp_min(1e-30)).clamp_min_(0)
        return _Best(new_scale, torch.zeros_like(scale), self._energy - covariance * new_scale)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is 0: all weights of such a group are equal."""
    return torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
