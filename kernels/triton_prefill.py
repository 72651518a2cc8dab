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

from kernels.triton_tile import gather_weight, load_row_scale
from kernels.types import GROUP_SIZE, TILE_ROWS, QuantizedMatrix, padded_rows, tile_bytes

BLOCK_TOKENS = 32
BLOCK_ROWS = 64
GROUPS_PER_PROGRAM = 4
"""Groups of 64 inputs that a program of `reconstruct` writes: whole 128-byte lines of each row."""


def matmul_prefill(matrix: QuantizedMatrix, x_TK: torch.Tensor) -> torch.Tensor:
    """x @ W.T as [T, N] float32 for a packed matrix; x is contiguous float32 on its device."""
    num_tokens = x_TK.shape[0]
    y_TN = x_TK.new_empty(num_tokens, matrix.rows)
    grid = (triton.cdiv(matrix.rows, BLOCK_ROWS), triton.cdiv(num_tokens, BLOCK_TOKENS))
    _prefill_kernel[grid](
        matrix.data, x_TK, y_TN,
        num_tokens, matrix.rows, padded_rows(matrix.rows) // TILE_ROWS, matrix.cols,
        BITS=matrix.bits, SYMMETRIC=matrix.grid == "symmetric",
        TILE_BYTES=tile_bytes(matrix.bits, matrix.grid),
        BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_ROWS=BLOCK_ROWS,
    )  # fmt: skip
    return y_TN


def reconstruct(matrix: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The [N, K] weight in a float dtype, from one launch, for a dense product to follow."""
    weight_NK = torch.empty(0, device=matrix.data.device).new_empty(
        (matrix.rows, matrix.cols), dtype=dtype
    )
    row_blocks, num_groups = padded_rows(matrix.rows) // TILE_ROWS, matrix.cols // GROUP_SIZE
    _reconstruct_kernel[(row_blocks, triton.cdiv(num_groups, GROUPS_PER_PROGRAM))](
        matrix.data, weight_NK, matrix.rows, row_blocks, matrix.cols,
        BITS=matrix.bits, SYMMETRIC=matrix.grid == "symmetric",
        TILE_BYTES=tile_bytes(matrix.bits, matrix.grid), GROUPS=GROUPS_PER_PROGRAM,
    )  # fmt: skip
    return weight_NK


@triton.jit
def _reconstruct_kernel(
    data, weight, rows, row_blocks, cols,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_BYTES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A row block of 16 and GROUPS groups: weights in float32, rounded to the weight's dtype."""
    block = tl.program_id(0)
    num_groups = cols // 64
    row = block * 16 + tl.arange(0, 16)[:, None]
    col = tl.program_id(1) * (GROUPS * 64) + tl.arange(0, GROUPS * 64)[None, :]
    group = tl.minimum(col // 64, num_groups - 1)
    tile = (block.to(tl.int64) * num_groups + group) * TILE_BYTES
    value = gather_weight(data, tile, row, col, BITS, SYMMETRIC)
    if SYMMETRIC:
        row_scales = num_groups.to(tl.int64) * row_blocks * TILE_BYTES
        value *= load_row_scale(data, row_scales + 2 * row)
    at = weight + row.to(tl.int64) * cols + col
    tl.store(at, value, mask=(row < rows) & (col < cols))


@triton.jit
def _prefill_kernel(
    data, x, y, num_tokens, rows, row_blocks, cols,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_BYTES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """BLOCK_TOKENS x BLOCK_ROWS of the result, one group of 64 inputs at a time.

    The products run as three TF32 passes, which keeps float32's accuracy on tensor cores.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    col = tl.arange(0, 64)
    num_groups = cols // 64
    # Rows past the end read the last row block again and are not stored.
    row_block = tl.minimum(row // 16, row_blocks - 1).to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
    for group in range(0, num_groups):
        tile = (row_block * num_groups + group) * TILE_BYTES
        weight = gather_weight(data, tile, row[:, None], col[None, :], BITS, SYMMETRIC)
        place = token * cols + group * 64 + col[None, :]
        values = tl.load(x + place, mask=token < num_tokens, other=0.0)
        total = tl.dot(values, tl.trans(weight), total, input_precision="tf32x3")
    if SYMMETRIC:
        row_scales = num_groups.to(tl.int64) * row_blocks * TILE_BYTES
        stored_row = tl.minimum(row, row_blocks * 16 - 1)[None, :]
        total *= load_row_scale(data, row_scales + 2 * stored_row)
    out = token * rows + row[None, :]
    tl.store(y + out, total, mask=(token < num_tokens) & (row[None, :] < rows))
