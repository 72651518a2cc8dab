"""Many tokens on a GPU: tiles dequantised into tensor-core products, or once into memory.

Checked under Triton's interpreter and compiled for sm_90; not run on a GPU.

Legend: T tokens, N rows, K cols.
"""

# A Triton kernel's parameters are typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton_decode import Form
from kernels.triton_tile import gather_weight, load_row_scale, tile_places
from kernels.types import TILE_COLS, TILE_ROWS, QuantizedMatrix, padded_rows

BLOCK_TOKENS = 32
BLOCK_ROWS = 64
TILES_PER_PROGRAM = 4
"""Tiles of 64 inputs that a program of `reconstruct` writes: whole 128-byte lines of each row."""


def matmul_prefill(matrix: QuantizedMatrix, x_TK: torch.Tensor) -> torch.Tensor:
    """x @ W.T as [T, N] float32 for a packed matrix; x is contiguous float32 on its device."""
    num_tokens = x_TK.shape[0]
    y_TN = x_TK.new_empty(num_tokens, matrix.rows)
    grid = (triton.cdiv(matrix.rows, BLOCK_ROWS), triton.cdiv(num_tokens, BLOCK_TOKENS))
    _prefill_kernel[grid](
        matrix.data, x_TK, y_TN,
        num_tokens, matrix.rows, padded_rows(matrix.rows) // TILE_ROWS, matrix.cols,
        **Form.of(matrix).constants,
        BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_ROWS=BLOCK_ROWS,
    )  # fmt: skip
    return y_TN


def reconstruct(matrix: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The [N, K] weight in a float dtype, from one launch, for a dense product to follow."""
    weight_NK = torch.empty(0, device=matrix.data.device).new_empty(
        (matrix.rows, matrix.cols), dtype=dtype
    )
    row_blocks, block_cols = padded_rows(matrix.rows) // TILE_ROWS, TILES_PER_PROGRAM * TILE_COLS
    _reconstruct_kernel[(row_blocks, triton.cdiv(matrix.cols, block_cols))](
        matrix.data, weight_NK, matrix.rows, row_blocks, matrix.cols,
        **Form.of(matrix).constants, BLOCK_COLS=block_cols,
    )  # fmt: skip
    return weight_NK


@triton.jit
def _reconstruct_kernel(
    data, weight, rows, row_blocks, cols,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_COLS: tl.constexpr,
    GROUP_TILES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A row block and BLOCK_COLS inputs: weights in float32, rounded to the weight's dtype."""
    block = tl.program_id(0)
    num_tiles = cols // TILE_COLS
    row = block * 16 + tl.arange(0, 16)[:, None]
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    tile = block.to(tl.int64) * num_tiles + tl.minimum(col // TILE_COLS, num_tiles - 1)
    value = gather_weight(data, tile, row, col, BITS, SYMMETRIC, TILE_COLS, GROUP_TILES)
    if SYMMETRIC:
        end = num_tiles.to(tl.int64) * row_blocks
        row_scales = tile_places(end, BITS, SYMMETRIC, TILE_COLS, GROUP_TILES)[0]
        value *= load_row_scale(data, row_scales + 2 * row)
    at = weight + row.to(tl.int64) * cols + col
    tl.store(at, value, mask=(row < rows) & (col < cols))


@triton.jit
def _prefill_kernel(
    data, x, y, num_tokens, rows, row_blocks, cols,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_COLS: tl.constexpr,
    GROUP_TILES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """BLOCK_TOKENS x BLOCK_ROWS of the result, the inputs of one tile at a time.

    The products run as three TF32 passes, which keeps float32's accuracy on tensor cores.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    col = tl.arange(0, TILE_COLS)
    num_tiles = cols // TILE_COLS
    # Rows past the end read the last row block again and are not stored.
    row_block = tl.minimum(row // 16, row_blocks - 1).to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
    for tile in range(0, num_tiles):
        weight = gather_weight(
            data, row_block * num_tiles + tile, row[:, None], col[None, :],
            BITS, SYMMETRIC, TILE_COLS, GROUP_TILES,
        )  # fmt: skip
        place = token * cols + tile * TILE_COLS + col[None, :]
        values = tl.load(x + place, mask=token < num_tokens, other=0.0)
        total = tl.dot(values, tl.trans(weight), total, input_precision="tf32x3")
    if SYMMETRIC:
        end = num_tiles.to(tl.int64) * row_blocks
        row_scales = tile_places(end, BITS, SYMMETRIC, TILE_COLS, GROUP_TILES)[0]
        stored_row = tl.minimum(row, row_blocks * 16 - 1)[None, :]
        total *= load_row_scale(data, row_scales + 2 * stored_row)
    out = token * rows + row[None, :]
    tl.store(y + out, total, mask=(token < num_tokens) & (row[None, :] < rows))
