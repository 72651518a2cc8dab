"""Few tokens on a GPU: unpack, dequantise and multiply fused, bound by reading the weights once.

Also the low-rank addition, whose rank blocks are found through a tensor of offsets so that one
launch reads them all. Checked under Triton's interpreter and compiled for sm_90; not run on a GPU.

Legend: T tokens, N rows, K cols, R rank.
"""

# A Triton kernel's parameters are typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton_tile import field, gather_weight, load_byte, load_half, load_row_scale
from kernels.types import (
    GROUP_SIZE,
    TILE_ROWS,
    Grid,
    LowRank,
    QuantizedMatrix,
    left_offset,
    padded_rows,
    tile_bytes,
)

MAX_TOKENS = 8
"""Tokens of one program; more take more programs and read the weights again (from cache)."""
GROUPS_PER_STEP = 4


def matmul_decode(matrix: QuantizedMatrix, x_TK: torch.Tensor) -> torch.Tensor:
    """x @ W.T as [T, N] float32 for a packed matrix; x is contiguous float32 on its device."""
    y_TN = x_TK.new_empty(x_TK.shape[0], matrix.rows)
    num_blocks = padded_rows(matrix.rows) // TILE_ROWS
    _launch_rows(matrix.data, None, num_blocks, matrix.bits, matrix.grid, x_TK, y_TN)
    return y_TN


def low_rank_matmul_decode(factors: LowRank, x_TK: torch.Tensor) -> torch.Tensor:
    """left @ (right @ x) per token as [T, N] float32; rank must not be 0."""
    num_tokens, num_blocks = x_TK.shape[0], len(factors.block_offsets)
    # From pageable memory an asynchronous copy is staged before it returns: safe, and no wait.
    offsets = torch.tensor(factors.block_offsets, dtype=torch.int64)
    offsets = offsets.to(x_TK.device, non_blocking=True)
    z_TR = x_TK.new_empty(num_tokens, factors.rank)
    _launch_rows(factors.data, offsets, num_blocks, factors.bits, factors.grid, x_TK, z_TR)
    y_TN = x_TK.new_empty(num_tokens, factors.rows)
    tokens = _tokens_per_program(num_tokens)
    grid = (factors.rows // GROUP_SIZE, triton.cdiv(num_tokens, tokens))
    _left_kernel[grid](
        factors.data, offsets, z_TR, y_TN,
        num_tokens, num_blocks, factors.rows,
        left_start=left_offset(factors.cols, factors.bits, factors.grid),
        **_form(factors.bits, factors.grid), TOKENS=tokens,
    )  # fmt: skip
    return y_TN


def _launch_rows(
    data: torch.Tensor,
    offsets: torch.Tensor | None,
    num_blocks: int,
    bits: int,
    grid: Grid,
    x_TK: torch.Tensor,
    y_TN: torch.Tensor,
) -> None:
    (num_tokens, cols), rows = x_TK.shape, y_TN.shape[1]
    tokens = _tokens_per_program(num_tokens)
    _rows_kernel[(num_blocks, triton.cdiv(num_tokens, tokens))](
        data, data if offsets is None else offsets, x_TK, y_TN,
        num_tokens, rows, cols,
        **_form(bits, grid), TOKENS=tokens, GROUPS=GROUPS_PER_STEP,
        HAS_OFFSETS=offsets is not None,
    )  # fmt: skip


def _form(bits: int, grid: Grid) -> dict[str, int | bool]:
    return {
        "BITS": bits,
        "SYMMETRIC": grid == "symmetric",
        "TILE_BYTES": tile_bytes(bits, grid),
    }


def _tokens_per_program(num_tokens: int) -> int:
    return min(int(triton.next_power_of_2(num_tokens)), MAX_TOKENS)


@triton.jit
def _rows_kernel(
    data, offsets, x, y, num_tokens, rows, cols,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_BYTES: tl.constexpr, TOKENS: tl.constexpr,
    GROUPS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    """One row block of 16 with TOKENS tokens, GROUPS tiles at a time.

    A program reads each plane of its tiles as consecutive bytes; byte e belongs to group e // 64,
    row e % 64 // 4 and input e % 4 of each vector. Products of codes are summed per byte position
    first, the scale and the zero point are applied once a step, row scales once at the end.
    """
    block = tl.program_id(0)
    num_groups = cols // 64
    start = block.to(tl.int64) * num_groups * TILE_BYTES
    row_scales = tl.num_programs(0).to(tl.int64) * num_groups * TILE_BYTES + block * 32
    if HAS_OFFSETS:  # each block is a matrix of its own
        start = tl.load(offsets + block)
        row_scales = start + num_groups * TILE_BYTES
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    byte = tl.arange(0, GROUPS * 64)[None, :]
    lane_byte, step_group = byte % 64, byte // 64
    total = tl.zeros((TOKENS, 16), tl.float32)
    for first in range(0, num_groups, GROUPS):
        group = first + step_group
        inside = group < num_groups
        # Groups past the end read the last one again; their inputs are zero.
        tile = start + tl.minimum(group, num_groups - 1).to(tl.int64) * TILE_BYTES
        dot = tl.zeros((TOKENS, GROUPS * 64), tl.float32)
        sum_x = tl.zeros((TOKENS, GROUPS * 64), tl.float32)
        for vector in tl.static_range(16):
            col = group * 64 + 4 * vector + lane_byte % 4
            values = tl.load(x + token * cols + col, mask=(token < num_tokens) & inside, other=0.0)
            dot += field(data, tile, lane_byte, vector, BITS) * values
            sum_x += values
        scales = tile + BITS * 128
        if SYMMETRIC:
            middle: tl.constexpr = ((1 << BITS) - 1) * 0.5
            part = (dot - middle * sum_x) * load_byte(data, scales + lane_byte // 4)
        else:
            scales += 2 * (lane_byte // 4)
            part = dot * load_half(data, scales) - sum_x * load_half(data, scales + 32)
        part = tl.reshape(part, (TOKENS, GROUPS, 16, 4))
        total += tl.sum(tl.sum(part, axis=3), axis=1)
    row = block * 16 + tl.arange(0, 16)[None, :]
    if SYMMETRIC:
        total *= load_row_scale(data, row_scales + 2 * tl.arange(0, 16)[None, :])
    tl.store(y + token * rows + row, total, mask=(token < num_tokens) & (row < rows))


@triton.jit
def _left_kernel(
    data, offsets, z, y, num_tokens, num_blocks, rows, left_start,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_BYTES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """64 outputs of left @ z with TOKENS tokens: a tile of each block's transposed left factor."""
    group = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    rank = tl.arange(0, 16)[:, None]
    col = tl.arange(0, 64)[None, :]
    total = tl.zeros((TOKENS, 64), tl.float32)
    for block in range(0, num_blocks):
        start = tl.load(offsets + block) + left_start
        weight = gather_weight(data, start + group * TILE_BYTES, rank, col, BITS, SYMMETRIC)
        if SYMMETRIC:
            weight *= load_row_scale(data, start + rows // 64 * TILE_BYTES + 2 * rank)
        place = token * (num_blocks * 16) + block * 16 + tl.arange(0, 16)[None, :]
        values = tl.load(z + place, mask=token < num_tokens, other=0.0)
        total += tl.sum(values[:, :, None] * weight[None, :, :], axis=1)
    row = group * 64 + col
    tl.store(y + token * rows + row, total, mask=token < num_tokens)
