"""The ways in which one matrix is used: with which planes, how often, aiming at what.

Knows matrices only.

Legend: N rows, K cols, S uses, P planes, C choices of signs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_store.matrix.levels import check_weight
from kernels.types import Grid

LEAST_SHARE = 0.02
"""A use counts at least this much, so that planes that are never used are still good."""
MAX_PLANES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One way in which the matrix is used: how often, with how many planes, aiming at what."""

    share: float
    num_planes: int
    target_NK: torch.Tensor  # the weight, less what else is added in this use


def checked_uses(uses: Sequence[Use], bits: int, grid: Grid) -> list[Use]:
    """The uses with shares that add up to 1. Raises ValueError when they do not fit together."""
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


class Shares:
    """How much each use counts, and the signs that its planes may have."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self.share_S = torch.tensor([use.share for use in uses])
        self.num_planes = max(use.num_planes for use in uses)
        of_use = torch.tensor([use.num_planes for use in uses])
        self.has_SP = (of_use[:, None] > torch.arange(self.num_planes)).float()
        self.weight_PS = self.share_S * self.has_SP.T
        self.with_planes = self.weight_PS.sum(dim=1).tolist()
        signs = list(itertools.product((-1.0, 1.0), repeat=self.num_planes))
        self.sign_CP = torch.tensor(signs).view(len(signs), self.num_planes)

    def mixed(self, values_kSN: torch.Tensor) -> torch.Tensor:
        """The mean over uses, [k, N]."""
        return torch.tensordot(values_kSN, self.share_S, dims=([1], [0]))

    def mixed_with(self, plane: int, values_kSN: torch.Tensor) -> torch.Tensor:
        """The mean over uses that have a plane, [k, N]."""
        weight_S = self.weight_PS[plane] / self.with_planes[plane]
        return torch.tensordot(values_kSN, weight_S, dims=([1], [0]))
