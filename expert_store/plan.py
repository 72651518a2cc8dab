"""How one expert is to be stored: for each matrix its codes' form and what repairs them.

Pure nouns with their bytes. Who decides is `expert_store/budget.py`, who does it
`expert_store/recipe.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from expert_store.types import PROJECTIONS, BlockKind, Codec, ExpertShape, Projection
from kernels.types import GROUP_SIZE, TILE_ROWS, Grid, block_bytes, matrix_bytes


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """One matrix: form of its codes, and the kinds of its repair blocks in order."""

    bits: int
    grid: Grid
    blocks: tuple[BlockKind, ...] = ()
    group_size: int = GROUP_SIZE  # of the codes

    def code_bytes(self, rows: int, cols: int) -> int:
        return matrix_bytes(rows, cols, self.bits, self.grid, self.group_size)

    def repair_bytes(self, rows: int, cols: int, *, factor_bits: int, factor_grid: Grid) -> int:
        counts = Counter(self.blocks)
        plane = matrix_bytes(rows, cols, 1, "symmetric")
        rank = block_bytes(rows, cols, factor_bits, factor_grid)
        return counts["plane"] * aligned_plane(plane) + counts["rank"] * rank

    @property
    def rank(self) -> int:
        return TILE_ROWS * self.blocks.count("rank")

    @property
    def num_planes(self) -> int:
        return self.blocks.count("plane")


def aligned_plane(num_bytes: int) -> int:
    """A plane's bytes in a record: every block starts at a multiple of 64."""
    return -(-num_bytes // 64) * 64


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """One expert: a plan for each of its three matrices.

    `restored_share` is the share of its uses in which the compensator is applied, each use counted
    with its squared router weight.
    """

    matrices: Mapping[Projection, MatrixPlan] = field(default_factory=dict)
    restored_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.restored_share <= 1:
            raise ValueError(f"restored_share: got {self.restored_share}, expected 0 to 1")
        if set(self.matrices) != set(PROJECTIONS):
            raise ValueError(
                f"plan: expected gate, up and down, got {', '.join(self.matrices) or 'nothing'}"
            )

    @staticmethod
    def uniform(
        bits: int,
        grid: Grid,
        blocks: tuple[BlockKind, ...] = (),
        group_size: int = GROUP_SIZE,
    ) -> ExpertPlan:
        """The same plan for all three matrices."""
        return ExpertPlan(dict.fromkeys(PROJECTIONS, MatrixPlan(bits, grid, blocks, group_size)))

    def code_bytes(self, shape: ExpertShape) -> int:
        """Bytes of the codes, without biases."""
        return sum(plan.code_bytes(*shape.projection(name)) for name, plan in self.matrices.items())

    def repair_bytes(self, shape: ExpertShape, *, factor_bits: int, factor_grid: Grid) -> int:
        return sum(
            plan.repair_bytes(
                *shape.projection(name), factor_bits=factor_bits, factor_grid=factor_grid
            )
            for name, plan in self.matrices.items()
        )


@dataclass(frozen=True, slots=True)
class CodecPlan:
    """One expert through an error-bounded codec; how many bytes that takes only doing it tells."""

    codec: Codec
    bound: str  # as ErrorBound reads it
