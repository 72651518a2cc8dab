"""How an expert's two records are coded: codec, widths and grids, blocks in order. Pure nouns.

Knows no bytes: where the parts of a record lie is `expert_store/records.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kernels.types import GRID_BITS, GROUP_SIZE, TILE_ROWS, Grid, check_group_size

Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
Codec = Literal["tiles", "sz3", "cuszp"]
"""tiles: low-bit codes as the kernels read them, or bfloat16. sz3, cuszp: error-bounded, of lengths
that depend on the weights; sz3 is decoded by the host that fetches it, cuszp by the kernels."""
CODECS: tuple[Codec, ...] = get_args(Codec)
BlockKind = Literal["rank", "plane"]
"""rank: 16 more ranks, two quantised factors. plane: one more bit, a symmetric 1-bit matrix."""
BLOCK_KINDS: tuple[BlockKind, ...] = get_args(BlockKind)

GRIDS: tuple[Grid, ...] = get_args(Grid)
CODE_BITS: Mapping[Grid, tuple[int, ...]] = {**GRID_BITS, "affine": (*GRID_BITS["affine"], 16)}
"""Widths of codes by grid. 16 is row-major bfloat16, which has no grid: it goes as "affine"."""


@dataclass(frozen=True, slots=True)
class CodesForm:
    """How a codes record holds its three matrices; every triple is gate, up, down.

    Bits and grid may differ by matrix; the group size is that of all that have groups. `part_bytes`
    are the lengths of a codec's three streams; there bits are 0 and grids "affine". Raises
    ValueError when the parts do not fit together.
    """

    codec: Codec
    bits: tuple[int, int, int]
    grids: tuple[Grid, Grid, Grid]
    part_bytes: tuple[int, int, int] | None = None
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec: got {self.codec!r}, expected one of {', '.join(CODECS)}")
        if len(self.bits) != 3 or len(self.grids) != 3:
            raise ValueError(
                f"bits, grids: got {self.bits} and {self.grids}, expected one each for gate, up "
                "and down"
            )
        check_group_size(self.group_size)
        if self.codec != "tiles":
            self._check_streams()
            return
        if self.part_bytes is not None:
            raise ValueError(f"part_bytes: got {self.part_bytes}, but tiles have fixed lengths")
        for name, bits, grid in zip(PROJECTIONS, self.bits, self.grids, strict=True):
            _check_width(f"bits of {name}", bits, grid, CODE_BITS)
        if set(self.bits) == {16} and self.group_size != GROUP_SIZE:
            raise ValueError(f"group_size: got {self.group_size}, but bfloat16 has no groups")

    def _check_streams(self) -> None:
        if self.group_size != GROUP_SIZE:
            raise ValueError(f"group_size: got {self.group_size}, but {self.codec} has no groups")
        if self.bits != (0, 0, 0) or self.grids != ("affine",) * 3:
            raise ValueError(
                f"bits, grids: got {self.bits} and {self.grids}, expected 0 and affine for codec "
                f"{self.codec}"
            )
        sizes = self.part_bytes
        if sizes is None or len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(
                f"part_bytes: got {sizes}, expected three lengths of at least 1 for codec "
                f"{self.codec}"
            )

    @staticmethod
    def uniform(bits: int, grid: Grid = "affine", group_size: int = GROUP_SIZE) -> CodesForm:
        """Tiles of one width and grid for all three matrices."""
        return CodesForm("tiles", (bits,) * 3, (grid,) * 3, group_size=group_size)

    def matrix_group_size(self, index: int) -> int:
        """Of gate, up or down: bfloat16 has none, and says 64."""
        return GROUP_SIZE if self.bits[index] == 16 else self.group_size

    @staticmethod
    def streams(codec: Codec, part_bytes: Sequence[int]) -> CodesForm:
        """A codec's three streams of these lengths."""
        gate, up, down = part_bytes
        return CodesForm(codec, (0, 0, 0), ("affine",) * 3, (gate, up, down))

    def mean_bits(self, num_weights: int) -> float:
        """Code bits per weight: of tiles without scales and zeros, of a codec all it stores.

        `num_weights` is that of one matrix; all three have as many.
        """
        if self.part_bytes is not None:
            return 8 * sum(self.part_bytes) / (3 * num_weights)
        return sum(self.bits) / 3


@dataclass(frozen=True, slots=True)
class RepairBlockSpec:
    """One block of a factors record: which matrix it repairs, and how."""

    projection: Projection
    kind: BlockKind

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS or self.kind not in BLOCK_KINDS:
            raise ValueError(
                f"block: got {self.projection!r}, {self.kind!r}, expected one of "
                f"{', '.join(PROJECTIONS)} and one of {', '.join(BLOCK_KINDS)}"
            )


@dataclass(frozen=True, slots=True)
class RepairForm:
    """What a factors record holds: blocks in record order, and bits and grid of the rank blocks.

    Planes have 1 bit and are symmetric, always. Raises ValueError for a width the grid lacks.
    """

    bits: int
    grid: Grid
    blocks: tuple[RepairBlockSpec, ...]

    def __post_init__(self) -> None:
        _check_width("factor bits", self.bits, self.grid, GRID_BITS)

    @staticmethod
    def of_letters(bits: int, grid: Grid, letters: str) -> RepairForm:
        """From the manifest's letters: g, u, d are rank blocks, G, U, D planes."""
        if unknown := sorted(set(letters) - _SPECS.keys()):
            raise ValueError(f"blocks: got {unknown[0]!r}, expected letters of {''.join(_SPECS)}")
        return RepairForm(bits, grid, tuple(_SPECS[letter] for letter in letters))

    @property
    def letters(self) -> str:
        """One letter a block, in record order: g, u, d for rank blocks, G, U, D for planes."""
        return "".join(_LETTERS[block] for block in self.blocks)

    def prefix(self, num_blocks: int) -> RepairForm:
        """The same with only its first `num_blocks` blocks."""
        return RepairForm(self.bits, self.grid, self.blocks[:num_blocks])

    def num_blocks(self, projection: Projection, kind: BlockKind) -> int:
        return self.blocks.count(RepairBlockSpec(projection, kind))

    def rank(self, projection: Projection) -> int:
        return TILE_ROWS * self.num_blocks(projection, "rank")


_SPECS = {name[0]: RepairBlockSpec(name, "rank") for name in PROJECTIONS}
_SPECS |= {name[0].upper(): RepairBlockSpec(name, "plane") for name in PROJECTIONS}
_LETTERS = {spec: letter for letter, spec in _SPECS.items()}


def _check_width(name: str, bits: int, grid: Grid, allowed: Mapping[Grid, tuple[int, ...]]) -> None:
    if grid not in allowed:
        raise ValueError(f"grid: got {grid!r}, expected one of {', '.join(allowed)}")
    if isinstance(bits, bool) or bits not in allowed[grid]:
        raise ValueError(f"{name}: got {bits}, expected one of {allowed[grid]} on grid {grid}")
