"""The weight shapes of this room: low-bit matrices, low-rank factors, a gated MLP and its repair.

Views over packed bytes; the bit order inside a tile is written once, in `kernels/packing.py`.
Knows no expert, no layer, no file.

Legend: N rows (outputs), K cols (inputs), R rank, T tokens, H hidden, F ffn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from kernels.block_code import BlockCodedMatrix

TILE_ROWS = 16
"""Rows of one tile; also the rank of one rank block."""
TILE_COLS = 64
"""Inputs of one tile. Half tiles, of 32, make up groups that are no multiple of this."""
GROUP_SIZE = 64
"""Inputs that share one scale and one zero by default: then a tile is a group. Factors and planes
have no other."""
GROUP_STEP, MAX_GROUP_SIZE = 32, 4096
"""Group sizes are the multiples of the one up to the other."""

Bits = Literal[1, 2, 3, 4, 16]
"""Code widths. 16 means unquantised bfloat16, row-major: the baseline, not a tile layout."""
Grid = Literal["affine", "symmetric"]
"""Where a code's levels lie: affine has a float16 scale and zero per row and group; symmetric has
levels about zero, an 8-bit scale per row and group and one float16 scale per row."""
FactorBits = Literal[2, 3, 4]
"""Code widths that stores use for rank blocks."""
GRID_BITS: Mapping[Grid, tuple[int, ...]] = {"affine": (2, 3, 4), "symmetric": (1, 2, 3, 4)}
"""The code widths of each grid's tiles. Planes are symmetric of 1 bit."""
SCALE8_MAX = 255
"""A symmetric tile's scale byte of this value means the row's whole scale."""
BLOCK_ALIGNMENT = 64
"""Bytes: where a rank block and each of its factors may start, counted from the block's start."""

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"]
"""What joins gate and up: `act(gate) * up`; `clamped_swiglu` is gpt-oss' (alpha 1.702, limit 7)."""


def group_bytes(bits: int, grid: Grid = "affine", group_size: int = GROUP_SIZE) -> int:
    """Bytes of 16 rows of a group: codes, bits*2 an input, and its scales.

    affine: 32 of fp16 scales and 32 of fp16 zero*scale. symmetric: 16 of uint8 scales.
    """
    scale_bytes = TILE_ROWS if grid == "symmetric" else 2 * (TILE_ROWS * 2)
    return bits * (TILE_ROWS * group_size // 8) + scale_bytes


def tile_cols(group_size: int) -> int:
    """Inputs of the tiles that make up such a group: 64, or 32 where 64 does not divide it."""
    return GROUP_STEP if group_size % TILE_COLS else TILE_COLS


def check_group_size(group_size: int, cols: int | None = None) -> None:
    """ValueError for a group size that the layout does not have, or that does not divide `cols`."""
    if group_size % GROUP_STEP or not 0 < group_size <= MAX_GROUP_SIZE:
        allowed = f"a multiple of {GROUP_STEP} up to {MAX_GROUP_SIZE}"
        raise ValueError(f"group_size: got {group_size}, expected {allowed}")
    step = math.lcm(group_size, TILE_COLS)
    if cols is not None and (cols <= 0 or cols % step):
        raise ValueError(f"cols: got {cols}, groups of {group_size} need a multiple of {step}")


def padded_rows(rows: int) -> int:
    """Rows as stored: the next multiple of 16. Padding rows hold zeros and are never returned."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def tiles_bytes(
    rows: int, cols: int, bits: int, grid: Grid = "affine", group_size: int = GROUP_SIZE
) -> int:
    """Bytes of all groups of a packed [rows, cols] matrix; a symmetric one's row scales follow."""
    num_groups = padded_rows(rows) // TILE_ROWS * (cols // group_size)
    return num_groups * group_bytes(bits, grid, group_size)


def matrix_bytes(
    rows: int, cols: int, bits: int, grid: Grid = "affine", group_size: int = GROUP_SIZE
) -> int:
    """Bytes of a packed [rows, cols] matrix; [rows, cols] bfloat16 when bits is 16."""
    if bits == 16:
        return rows * cols * 2
    row_scales = 2 * padded_rows(rows) if grid == "symmetric" else 0
    return tiles_bytes(rows, cols, bits, grid, group_size) + row_scales


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A packed [rows, cols] weight; n is a row, k an input, g = k//group_size its group.

    affine:    W[n, k] = scale[n, g] * code[n, k] - zero_scaled[n, g]
    symmetric: W[n, k] = row_scale[n] * scale8[n, g]/255 * (code[n, k] - (2**bits - 1)/2)

    `data` is a flat uint8 tensor of `matrix_bytes(rows, cols, bits, grid, group_size)`: row blocks
    of 16, in each the groups in order, of each group the codes of its tiles of 16 rows x 64 inputs
    (x 32, where 64 does not divide the group size), then its scales and zeros; after all groups of
    a symmetric matrix its float16 row scales, padding rows included. With bits 16 it is row-major
    bfloat16 (grid stays "affine", the group size 64). The tensor may be a read-only view of a
    mapped file.

    Raises ValueError when shape, bits, grid, group size and length do not fit together.
    """

    data: torch.Tensor  # [num_bytes] uint8
    rows: int
    cols: int
    bits: int
    group_size: int = GROUP_SIZE
    grid: Grid = "affine"

    def __post_init__(self) -> None:
        if not (self.bits == 16 and self.grid == "affine"):
            _check_bits(self.bits, self.grid)
        if self.bits == 16 and self.group_size != GROUP_SIZE:
            raise ValueError(f"group_size: got {self.group_size}, but bfloat16 has no groups")
        if self.rows <= 0 or self.cols <= 0:
            raise ValueError(f"shape: got [{self.rows}, {self.cols}], expected positive sizes")
        if self.bits < 16:
            check_group_size(self.group_size, self.cols)
        expected = matrix_bytes(self.rows, self.cols, self.bits, self.grid, self.group_size)
        if self.data.dtype != torch.uint8 or self.data.dim() != 1 or self.data.numel() != expected:
            form = _form_text(self.rows, self.cols, self.bits, self.grid, self.group_size)
            raise ValueError(
                f"data: expected a flat uint8 tensor of {expected} bytes for {form}, "
                f"got {self.data.dtype} of shape {tuple(self.data.shape)}"
            )


def _form_text(rows: int, cols: int, bits: int, grid: Grid, group_size: int) -> str:
    return f"[{rows}, {cols}] of {bits} bit ({grid}), groups of {group_size}"


def _check_bits(bits: int, grid: Grid) -> None:
    if grid not in GRID_BITS:
        raise ValueError(f"grid: got {grid!r}, expected one of {get_args(Grid)}")
    if bits not in GRID_BITS[grid]:
        raise ValueError(f"bits: got {bits}, a grid {grid!r} has one of {GRID_BITS[grid]}")


def left_offset(cols: int, bits: int, grid: Grid = "affine") -> int:
    """Bytes from a rank block's start to its left factor: right [16, cols], then up to 63 free."""
    return _aligned(matrix_bytes(TILE_ROWS, cols, bits, grid))


def block_bytes(rows: int, cols: int, bits: int, grid: Grid = "affine") -> int:
    """Bytes of one rank block: right [16, cols], then left transposed [16, rows], both packed.

    Each is rounded up to a multiple of 64 bytes, which affine tiles are anyway.
    """
    return left_offset(cols, bits, grid) + _aligned(matrix_bytes(TILE_ROWS, rows, bits, grid))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


@dataclass(frozen=True, slots=True)
class LowRank:
    """A [rows, cols] matrix left @ right of rank 16 * len(block_offsets), factors quantised.

    Block b lies in `data` at `block_offsets[b]`: right [16, cols] packed, then, from the next
    multiple of 64 bytes on, left transposed [16, rows] packed (groups of 64 along its rows, so both
    factors have whole tiles). Any prefix of the blocks is a valid LowRank of smaller rank. rank 0
    is an empty tuple.

    Raises ValueError when rows or cols is not a multiple of 64, bits and grid do not fit together
    or a block reaches past the data.
    """

    data: torch.Tensor  # [num_bytes] uint8, may hold blocks of other matrices too
    block_offsets: tuple[int, ...]
    rows: int
    cols: int
    bits: int
    grid: Grid = "affine"

    def __post_init__(self) -> None:
        _check_bits(self.bits, self.grid)
        if self.rows % GROUP_SIZE or self.cols % GROUP_SIZE:
            got = [self.rows, self.cols]
            raise ValueError(f"shape: got {got}, expected multiples of {GROUP_SIZE}")
        if self.data.dtype != torch.uint8 or self.data.dim() != 1:
            raise ValueError(f"data: expected a flat uint8 tensor, got {self.data.dtype}")
        size = block_bytes(self.rows, self.cols, self.bits, self.grid)
        for offset in self.block_offsets:
            if offset < 0 or offset + size > self.data.numel():
                raise ValueError(
                    f"block_offsets: block of {size} bytes at {offset} reaches past the "
                    f"{self.data.numel()} bytes of data"
                )

    @property
    def rank(self) -> int:
        return TILE_ROWS * len(self.block_offsets)

    def prefix(self, num_blocks: int) -> LowRank:
        """The same matrix with only its first `num_blocks` rank blocks."""
        return replace(self, block_offsets=self.block_offsets[:num_blocks])

    def right(self, block: int) -> QuantizedMatrix:
        """Right factor of one block, [16, cols]."""
        return self._factor(self.block_offsets[block], self.cols)

    def left_t(self, block: int) -> QuantizedMatrix:
        """Left factor of one block, transposed, [16, rows]."""
        start = self.block_offsets[block] + left_offset(self.cols, self.bits, self.grid)
        return self._factor(start, self.rows)

    def _factor(self, start: int, cols: int) -> QuantizedMatrix:
        size = matrix_bytes(TILE_ROWS, cols, self.bits, self.grid)
        data = self.data[start : start + size]
        return QuantizedMatrix(data, TILE_ROWS, cols, self.bits, grid=self.grid)


Matrix = QuantizedMatrix | BlockCodedMatrix
"""A weight in any form that `kernels/ops.py` multiplies by."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class GatedMLP:
    """down(act(gate x + gate_bias) * (up x + up_bias)) + down_bias.

    Biases are fp32 or absent together.
    """

    gate: Matrix  # [F, H]
    up: Matrix  # [F, H]
    down: Matrix  # [H, F]
    activation: Activation
    gate_bias: torch.Tensor | None = None  # [F] float32
    up_bias: torch.Tensor | None = None  # [F] float32
    down_bias: torch.Tensor | None = None  # [H] float32

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"activation: got {self.activation!r}, expected one of {get_args(Activation)}"
            )
        gate, up, down = self.gate, self.up, self.down
        shape = (gate.rows, gate.cols)
        if shape != (up.rows, up.cols) or shape != (down.cols, down.rows):
            raise ValueError(
                f"shapes do not chain: gate [{gate.rows}, {gate.cols}], up [{up.rows}, {up.cols}], "
                f"down [{down.rows}, {down.cols}]"
            )


@dataclass(frozen=True, slots=True, weakref_slot=True)
class GatedRepair:
    """What a compensator adds to the three matrices of a GatedMLP: W ~ codes + planes + left@right.

    A plane is a symmetric matrix of 1 bit and its matrix's shape: one more bit of the codes, with
    its own scales. Raises ValueError for a plane of another form.
    """

    gate: LowRank  # [F, H]
    up: LowRank  # [F, H]
    down: LowRank  # [H, F]
    gate_planes: tuple[QuantizedMatrix, ...] = ()  # [F, H] each
    up_planes: tuple[QuantizedMatrix, ...] = ()  # [F, H] each
    down_planes: tuple[QuantizedMatrix, ...] = ()  # [H, F] each

    def __post_init__(self) -> None:
        for name, low_rank, planes in (
            ("gate", self.gate, self.gate_planes),
            ("up", self.up, self.up_planes),
            ("down", self.down, self.down_planes),
        ):
            for i, plane in enumerate(planes):
                got = _form_text(plane.rows, plane.cols, plane.bits, plane.grid, plane.group_size)
                expected = _form_text(low_rank.rows, low_rank.cols, 1, "symmetric", GROUP_SIZE)
                if got != expected:
                    raise ValueError(f"{name}_planes[{i}]: expected {expected}, got {got}")

    @property
    def is_empty(self) -> bool:
        """Whether it adds nothing at all: no rank and no plane anywhere."""
        ranks = self.gate.rank + self.up.rank + self.down.rank
        return ranks == 0 and not (self.gate_planes or self.up_planes or self.down_planes)


@dataclass(frozen=True, slots=True)
class MlpCall:
    """One MLP, its own tokens, and for some of those its repair.

    `repair` is added in rows where restored_T is true, in all of them when that is None.
    """

    x_TH: torch.Tensor  # [T, H] float, on the mlp's device
    mlp: GatedMLP
    repair: GatedRepair | None = None
    restored_T: torch.Tensor | None = None  # [T] bool, any device
