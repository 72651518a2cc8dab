"""Codes and repair of one matrix, each made for the other as it is, for how often each is used.

Of all uses of the matrix a share p adds the repair, the others see the codes alone. Both losses are
quadratic in the codes, so (1-p) * loss(W - Q) + p * loss(W - Q - A) is, but for a constant, the
loss of coding the one target W - p A; planes are even chosen with the codes (`progressive.py`).
MiLo (arXiv 2504.02658) is p = 1: the codes are made for the repaired matrix only.

Legend: N rows, K cols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from expert_store.forms import BlockKind
from expert_store.matrix.feedback import quantize_feedback
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.low_rank import FactorForm, RankRepair
from expert_store.matrix.planes import PlaneRepair
from expert_store.matrix.progressive import quantize_progressive
from expert_store.matrix.repair import Repair, repairs_of_kinds
from expert_store.matrix.uses import Use
from expert_store.matrix.weighting import Weighting
from kernels.reference import dequantize
from kernels.types import Grid, QuantizedMatrix

MILO_ROUNDS = 8
LEAST_GAIN = 1e-3
"""A round that lowers the loss by less than this share was the last."""


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """Codes, the blocks that repair them in falling order of worth, and both weighted errors."""

    codes: QuantizedMatrix
    blocks: tuple[Repair, ...]
    error: float  # of the codes alone
    restored_error: float  # with all blocks
    rounds: int  # alternations that the best one took; 0 is the plain order

    def loss(self, share: float) -> float:
        """(1 - share) * error + share * restored_error."""
        return (1 - share) * self.error + share * self.restored_error


def quantize_jointly(
    weight_NK: torch.Tensor,
    bits: int,
    kinds: Sequence[BlockKind],
    *,
    grid: Grid,
    weighting: Weighting,
    share: float,
    factors: FactorForm | None = None,
    rounds: int = 1,
) -> Joint:
    """Codes by error feedback and these blocks, for a matrix that is repaired in `share` of uses.

    Never a larger loss than in the plain order, codes first and then what repairs them, which is
    tried too; each round more alternates once, and the best is kept. Planes come before rank blocks
    whatever the order asked for: rank then repairs what planes cannot. A block that would remove
    nothing is left out. Raises ValueError when shapes do not fit or the share is not in 0..1.
    """
    _check_share(share)
    kinds = sorted(kinds, key=lambda kind: kind != "plane")
    codes = _codes_alone(weight_NK, bits, grid, weighting)
    blocks = repairs_of_kinds(weight_NK - dequantize(codes), weighting, kinds, factors=factors)
    best = _judged(weight_NK, codes, blocks, weighting, rounds=0)
    if not kinds or share == 0:
        return best
    ranks: list[Repair] = [block for block in best.blocks if isinstance(block, RankRepair)]
    for done in range(1, rounds + 1):
        found = _round(weight_NK, bits, kinds, grid, weighting, share, factors, ranks)
        if found.loss(share) >= best.loss(share):
            break
        settled = found.loss(share) >= (1 - LEAST_GAIN) * best.loss(share)
        best = replace(found, rounds=done)
        ranks = [block for block in found.blocks if isinstance(block, RankRepair)]
        if settled or not ranks:
            break
    return best


def quantize_with_planes(
    weight_NK: torch.Tensor,
    bits: int,
    kinds: Sequence[BlockKind],
    *,
    grid: Grid,
    weighting: Weighting,
    share: float,
    factors: FactorForm | None = None,
) -> Joint:
    """One round of `quantize_jointly` and no look at the plain order: a third of the time."""
    _check_share(share)
    kinds = sorted(kinds, key=lambda kind: kind != "plane")
    return _round(weight_NK, bits, kinds, grid, weighting, share, factors, [])


def _codes_alone(
    weight_NK: torch.Tensor, bits: int, grid: Grid, weighting: Weighting
) -> QuantizedMatrix:
    if weighting.moment is None:
        return quantize_grid(weight_NK, bits, grid=grid)
    return quantize_feedback(weight_NK, bits, grid=grid, moment=weighting.moment)


def _round(
    weight_NK: torch.Tensor,
    bits: int,
    kinds: Sequence[BlockKind],
    grid: Grid,
    weighting: Weighting,
    share: float,
    factors: FactorForm | None,
    ranks: Sequence[Repair],
) -> Joint:
    """Codes and planes made for the rank blocks there are, then new rank blocks for those."""
    uses = [
        Use(1 - share, 0, weight_NK),
        Use(share, kinds.count("plane"), weight_NK - _sum(ranks, weight_NK)),
    ]
    codes, planes = quantize_progressive(uses, bits, grid=grid, moment=weighting.moment)
    blocks: list[Repair] = [PlaneRepair(plane, 0.0) for plane in planes]
    left_NK = weight_NK - dequantize(codes) - _sum(blocks, weight_NK)
    rank_kinds = [kind for kind in kinds if kind == "rank"]
    blocks += repairs_of_kinds(left_NK, weighting, rank_kinds, factors=factors)
    return _judged(weight_NK, codes, blocks, weighting, rounds=1)


def quantize_milo(
    weight_NK: torch.Tensor,
    quantize: Callable[[torch.Tensor], QuantizedMatrix],
    num_ranks: int,
    *,
    weighting: Weighting,
    factors: FactorForm | None = None,
    rounds: int = MILO_ROUNDS,
) -> Joint:
    """MiLo's alternation: codes of W - A, then A as the best `num_ranks` blocks of W - Q, again.

    `quantize` makes the codes (MiLo takes HQQ). Ends after `rounds` rounds, or when one lowers the
    restored error by less than 0.1 %; the best round is kept, so it is never worse than round 0,
    the plain order, with its repair. The codes alone only get worse. Raises ValueError when shapes
    do not fit.
    """
    kinds: list[BlockKind] = ["rank"] * num_ranks
    ranks_NK = torch.zeros_like(weight_NK)
    best: Joint | None = None
    for done in range(rounds + 1):
        codes = quantize(weight_NK - ranks_NK)
        residual_NK = weight_NK - dequantize(codes)
        blocks = repairs_of_kinds(residual_NK, weighting, kinds, factors=factors)
        found = _judged(weight_NK, codes, blocks, weighting, rounds=done)
        before = best
        if best is None or found.restored_error < best.restored_error:
            best = found
        if before is not None and (
            found.restored_error >= (1 - LEAST_GAIN) * before.restored_error
        ):
            break
        ranks_NK = _sum(blocks, weight_NK)
    assert best is not None, "round 0 always counts"
    return best


def _judged(
    weight_NK: torch.Tensor,
    codes: QuantizedMatrix,
    blocks: Sequence[Repair],
    weighting: Weighting,
    *,
    rounds: int,
) -> Joint:
    """The gain of every block given those before it; one without any is left out."""
    left_NK = weight_NK - dequantize(codes)
    error = before = weighting.error(left_NK)
    kept: list[Repair] = []
    for block in blocks:
        without_NK = left_NK - block.dense()
        after = weighting.error(without_NK)
        if after < before:
            kept.append(replace(block, gain=before - after))
            left_NK, before = without_NK, after
    return Joint(codes, tuple(kept), error, before, rounds)


def _sum(blocks: Sequence[Repair], weight_NK: torch.Tensor) -> torch.Tensor:
    total_NK = torch.zeros_like(weight_NK)
    for block in blocks:
        total_NK += block.dense()
    return total_NK


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share: got {share}, expected 0 to 1")
