"""The weight shapes of this room: low-bit matrices, low-rank factors, and the gated MLP made of
them.

These are views over packed bytes. The bit order inside a tile is written once, in
`kernels/packing.py`.
Knows no expert, no layer, no file.

Legend: N rows (outputs), K cols (inputs), R rank, T tokens, H hidden, F ffn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

TILE_ROWS = 16
"""Rows of one tile; also the rank of one rank block."""
GROUP_SIZE = 64
"""Inputs that share one scale and one zero; also the columns of one tile."""

Bits = Literal[2, 3, 4, 16]
"""Code widths. 16 means unquantised bfloat16, row-major: the baseline, not a tile layout."""
FactorBits = Literal[2, 3, 4]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"]
"""What joins gate and up: `act(gate) * up`; `clamped_swiglu` is gpt-oss' (alpha 1.702, limit 7)."""


def tile_bytes(bits: int) -> int:
    """Bytes of one 16x64 tile: bits*128 of codes, 32 of fp16 scales, 32 of fp16 zero*scale."""
    return bits * (TILE_ROWS * GROUP_SIZE // 8) + 2 * (TILE_ROWS * 2)


def padded_rows(rows: int) -> int:
    """Rows as stored: the next multiple of 16. Padding rows hold zeros and are never returned."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def matrix_bytes(rows: int, cols: int, bits: int) -> int:
    """Bytes of a packed [rows, cols] matrix; [rows, cols] bfloat16 when bits is 16."""
    if bits == 16:
        return rows * cols * 2
    return (padded_rows(rows) // TILE_ROWS) * (cols // GROUP_SIZE) * tile_bytes(bits)


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A [rows, cols] weight W[n, k] = scale[n, k//64] * code[n, k] - zero_scaled[n, k//64].

    `data` is a flat uint8 tensor of `matrix_bytes(rows, cols, bits)`: tiles of 16 rows x 64
    inputs, row
    block by row block, groups within a row block in order, each tile followed by its own scales
    and zeros.
    With bits 16 it is row-major bfloat16. The tensor may be a read-only view of a mapped file.

    Raises ValueError when shape, bits and length do not fit together.
    """

    data: torch.Tensor  # [num_bytes] uint8
    rows: int
    cols: int
    bits: int
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise ValueError(f"bits: got {self.bits}, expected one of {get_args(Bits)}")
        if self.group_size != GROUP_SIZE:
            raise ValueError(
                f"group_size: got {self.group_size}, this layout has only {GROUP_SIZE}"
            )
        if self.rows <= 0 or self.cols <= 0:
            raise ValueError(f"shape: got [{self.rows}, {self.cols}], expected positive sizes")
        if self.bits != 16 and self.cols % GROUP_SIZE:
            raise ValueError(
                f"cols: got {self.cols}, expected a multiple of the group size {GROUP_SIZE}"
            )
        expected = matrix_bytes(self.rows, self.cols, self.bits)
        if self.data.dtype != torch.uint8 or self.data.dim() != 1 or self.data.numel() != expected:
            raise ValueError(
                f"data: expected a flat uint8 tensor of {expected} bytes for "
                f"[{self.rows}, {self.cols}] at {self.bits} bits, "
                f"got {self.data.dtype} of shape {tuple(self.data.shape)}"
            )


def block_bytes(rows: int, cols: int, bits: int) -> int:
    """Bytes of one rank block: right [16, cols], then left transposed [16, rows], both packed."""
    return matrix_bytes(TILE_ROWS, cols, bits) + matrix_bytes(TILE_ROWS, rows, bits)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A [rows, cols] matrix left @ right of rank 16 * len(block_offsets), factors quantised.

    Block b lies in `data` at `block_offsets[b]`: right [16, cols] packed, then left transposed
    [16, rows] packed (groups of 64 along its rows, so both factors have whole tiles). Any prefix of
    the blocks is a valid LowRank of smaller rank. rank 0 is an empty tuple.

    Raises ValueError when rows or cols is not a multiple of 64 or a block reaches past the data.
    """

    data: torch.Tensor  # [num_bytes] uint8, may hold blocks of other matrices too
    block_offsets: tuple[int, ...]
    rows: int
    cols: int
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in get_args(FactorBits):
            raise ValueError(f"bits: got {self.bits}, expected one of {get_args(FactorBits)}")
        if self.rows % GROUP_SIZE or self.cols % GROUP_SIZE:
            raise ValueError(
                f"shape: got [{self.rows}, {self.cols}], expected multiples of {GROUP_SIZE}"
            )
        if self.data.dtype != torch.uint8 or self.data.dim() != 1:
            raise ValueError(f"data: expected a flat uint8 tensor, got {self.data.dtype}")
        size = block_bytes(self.rows, self.cols, self.bits)
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
        return LowRank(self.data, self.block_offsets[:num_blocks], self.rows, self.cols, self.bits)

    def right(self, block: int) -> QuantizedMatrix:
        """Right factor of one block, [16, cols]."""
        start = self.block_offsets[block]
        size = matrix_bytes(TILE_ROWS, self.cols, self.bits)
        return QuantizedMatrix(self.data[start : start + size], TILE_ROWS, self.cols, self.bits)

    def left_t(self, block: int) -> QuantizedMatrix:
        """Left factor of one block, transposed, [16, rows]."""
        start = self.block_offsets[block] + matrix_bytes(TILE_ROWS, self.cols, self.bits)
        size = matrix_bytes(TILE_ROWS, self.rows, self.bits)
        return QuantizedMatrix(self.data[start : start + size], TILE_ROWS, self.rows, self.bits)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(act(gate x + gate_bias) * (up x + up_bias)) + down_bias. Biases are fp32 or absent
    together."""

    gate: QuantizedMatrix  # [F, H]
    up: QuantizedMatrix  # [F, H]
    down: QuantizedMatrix  # [H, F]
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
        if (gate.rows, gate.cols) != (up.rows, up.cols) or (down.cols, down.rows) != (
            gate.rows,
            gate.cols,
        ):
            raise ValueError(
                f"shapes do not chain: gate [{gate.rows}, {gate.cols}], up [{up.rows}, {up.cols}], "
                f"down [{down.rows}, {down.cols}]"
            )


@dataclass(frozen=True, slots=True)
class GatedLowRank:
    """Low-rank additions to the three matrices of a GatedMLP."""

    gate: LowRank  # [F, H]
    up: LowRank  # [F, H]
    down: LowRank  # [H, F]
