"""Which blocks repair a matrix, and in which order: the most error removed per byte comes first.

Rank blocks and planes compete for what is left after the blocks before them, so that any prefix of
the list is a valid repair and knows its own error. Knows matrices only; the matrices of an expert
are merged by the weights that the caller gives them.

Legend: N rows, K cols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_store.forms import BLOCK_KINDS, BlockKind
from expert_store.matrix.low_rank import FactorForm, RankFinder, RankRepair
from expert_store.matrix.planes import PlaneRepair, plane_bytes, plane_repair
from expert_store.matrix.weighting import Weighting
from kernels.types import block_bytes

Repair = RankRepair | PlaneRepair


@dataclass(frozen=True, slots=True)
class RepairLimits:
    """Where a repair ends: at a number of bytes, of rank blocks or of planes; None for no limit.

    Raises ValueError for a negative limit, or when nothing ends it.
    """

    max_bytes: int | None = None
    max_ranks: int | None = None  # blocks of 16
    max_planes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_ranks", "max_planes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value}, expected at least 0, or None for no limit")
        if self.max_bytes is None and (self.max_ranks is None or self.max_planes is None):
            raise ValueError("limits: without max_bytes, expected max_ranks and max_planes")


def repair_blocks(
    residual_NK: torch.Tensor,
    weighting: Weighting,
    limits: RepairLimits,
    *,
    factors: FactorForm | None = None,
) -> list[Repair]:
    """Blocks in the order they are worth their bytes, each for what those before it left.

    At each step, of the next rank block and the next plane that the limits allow, the one that
    removes more weighted error per byte is taken; one that removed less per byte before is not made
    again to see. It ends early when neither removes any. Raises ValueError when the sides do not
    fit the blocks.
    """
    maker = _Maker(residual_NK, weighting, factors)
    worth = dict.fromkeys(BLOCK_KINDS, math.inf)  # at most, per byte: it falls from block to block
    while True:
        allowed = [kind for kind in BLOCK_KINDS if maker.allows(kind, limits)]
        best: Repair | None = None
        for kind in sorted(allowed, key=lambda kind: -worth[kind]):
            if best is not None and _worth(best) >= worth[kind]:
                break
            found = maker.made(kind)
            worth[kind] = 0.0 if found is None else _worth(found)
            if found is not None and (best is None or _worth(found) > _worth(best)):
                best = found
        if best is None:
            return maker.taken
        maker.take(best)


def repairs_of_kinds(
    residual_NK: torch.Tensor,
    weighting: Weighting,
    kinds: Sequence[BlockKind],
    *,
    factors: FactorForm | None = None,
) -> list[Repair]:
    """One block of each kind asked for, in that order; one that would remove nothing is left out.

    Raises ValueError when the sides do not fit the blocks.
    """
    maker = _Maker(residual_NK, weighting, factors)
    for kind in kinds:
        block = maker.made(kind)
        if block is not None:
            maker.take(block)
    return maker.taken


def best_within(
    residual_NK: torch.Tensor,
    weighting: Weighting,
    max_bytes: int,
    *,
    max_planes: int = 2,
    factors: FactorForm | None = None,
) -> list[Repair]:
    """The blocks that leave least in all, for at most `max_bytes`: planes first, then rank blocks.

    Every number of planes that fits is tried, the rest of the bytes going to rank. A plane is worth
    less per byte than the first rank blocks of nearly any residual, so `repair_blocks`, which has
    to be good at any prefix, puts it last; yet where the residual is noise it is worth more than as
    many bytes of rank, and rank after planes leaves 2 to 12 % less than planes after rank, since it
    sees what they could not repair. Raises ValueError when the sides do not fit the blocks.
    """
    rows, cols = residual_NK.shape
    best: list[Repair] = []
    for num in range(max_planes + 1):
        if num * plane_bytes(rows, cols) > max_bytes:
            break
        maker = _Maker(residual_NK, weighting, factors)
        steps: tuple[tuple[BlockKind, int | None], ...] = (("plane", num), ("rank", None))
        for kind, most in steps:
            limits = RepairLimits(max_bytes=max_bytes, max_ranks=most, max_planes=most)
            while maker.allows(kind, limits) and (block := maker.made(kind)) is not None:
                maker.take(block)
        if sum(block.gain for block in maker.taken) > sum(block.gain for block in best):
            best = maker.taken
    return best


def _worth(block: Repair) -> float:
    """Error energy removed per byte."""
    return block.gain / block.num_bytes


class _Maker:
    """The blocks taken so far of one matrix, and the next of each kind."""

    def __init__(
        self, residual_NK: torch.Tensor, weighting: Weighting, factors: FactorForm | None
    ) -> None:
        self._left_NK, self._weighting = residual_NK.clone(), weighting
        self._factors = factors or FactorForm()
        self._finder: RankFinder | None = None
        self.taken: list[Repair] = []

    def allows(self, kind: BlockKind, limits: RepairLimits) -> bool:
        rows, cols = self._left_NK.shape
        if kind == "rank":
            size = block_bytes(rows, cols, self._factors.bits, self._factors.grid)
            most, num = limits.max_ranks, sum(isinstance(b, RankRepair) for b in self.taken)
        else:
            size = plane_bytes(rows, cols)
            most, num = limits.max_planes, sum(isinstance(b, PlaneRepair) for b in self.taken)
        used = sum(block.num_bytes for block in self.taken)
        fits = limits.max_bytes is None or used + size <= limits.max_bytes
        return fits and (most is None or num < most)

    def made(self, kind: BlockKind) -> Repair | None:
        if kind == "plane":
            return plane_repair(self._left_NK, self._weighting)
        if self._finder is None:
            rows, cols = self._left_NK.shape
            self._finder = RankFinder(rows, cols, self._weighting, self._factors)
        return self._finder.next(self._left_NK)

    def take(self, block: Repair) -> None:
        self._left_NK -= block.dense()
        self.taken.append(block)


def merged(blocks: Sequence[Sequence[Repair]], weights: Sequence[float]) -> list[tuple[int, int]]:
    """The blocks of several matrices in one order: (matrix, block), most error per byte first.

    A matrix' own blocks keep their order, since each was made for what those before it left. So a
    block that is worth more than the one before it goes with that one, at their mean worth: of all
    orders this one has the least error, averaged over the bytes sent so far. `weights` turn the
    gains of each matrix into one currency.
    """
    runs: list[tuple[float, int, int, int]] = []  # worth, matrix, first block, end
    for matrix, (own, weight) in enumerate(zip(blocks, weights, strict=True)):
        of_matrix: list[tuple[float, int, int, int]] = []  # gain, bytes, first, end
        for i, block in enumerate(own):
            run = (weight * block.gain, block.num_bytes, i, i + 1)
            while of_matrix and of_matrix[-1][0] * run[1] < run[0] * of_matrix[-1][1]:
                gain, num_bytes, first, _ = of_matrix.pop()
                run = (gain + run[0], num_bytes + run[1], first, run[3])
            of_matrix.append(run)
        runs += [(gain / size, matrix, first, end) for gain, size, first, end in of_matrix]
    runs.sort(key=lambda run: -run[0])  # stable: ties keep the order of matrices and blocks
    return [(matrix, i) for _, matrix, first, end in runs for i in range(first, end)]
