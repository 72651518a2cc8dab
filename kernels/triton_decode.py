"""Few tokens on a GPU: packed rows times digits of activations, many matrices in one launch.

What bounds it should be reading the weights once: bytes come as 16-byte asynchronous copies, codes
become an integer tensor core's operand in registers, and activations are the digits of
`kernels/triton_digits.py`, so that the products are exact. Expected, not measured: in the sm_90
code (Triton 3.9) of 2 affine bits at up to 2 tokens a step of 8 tiles, 2560 bytes, is 264
instructions of each of 64 threads, 6.6 a byte; an H200 issues about 8.2 lanes' instructions (132
multiprocessors, 4 x 32 lanes, 1.75 GHz) in the time that a byte takes at 75 % of 4.8 TB/s. Triton
3.6 makes 10.4 a byte of the same kernel, over that budget: prefer 3.9.
Checked under Triton's interpreter and compiled for sm_90; not run on a GPU.

Legend: P pairs (a token at an expert), T tokens, N rows, K cols, J jobs.
"""

# A Triton kernel's parameters are typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton_digits import Digits, to_digits
from kernels.triton_tile import (
    load_row_scale,
    tile_bytes16,
    tile_codes,
    tile_halves,
    tile_places,
)
from kernels.types import GROUP_SIZE, Grid, QuantizedMatrix, tile_cols, tiles_bytes

MAX_TOKENS = 8
"""Tokens of one job; more take more jobs and read the weights again (from cache). The sm_90 code of
8 takes 168 registers of a thread, that of 2 takes 64."""
MIN_TOKENS = 2
"""Fewer would leave columns of the tensor core's operand empty all the same."""
TILES_PER_STEP = 8
NUM_WARPS = 2
"""Each has half the tiles of a step. The same for any number of tokens, and the sums are written
as fused multiply-adds, so that a token's result has the same bits in each."""
STAGES = 3
"""Two steps' bytes are under way while one is worked on. At 14 KB a program 15 fit on a
multiprocessor: 77 KB under way at 2 bits, where 25 KB cover 700 ns of latency at 4.8 TB/s
(arithmetic, not measured)."""
DATA, ROW_SCALES, Y_COLUMN, FIRST_PAIR, NUM_PAIRS = range(5)
"""Rows of a job table: addresses of the tiles and of a symmetric matrix's row scales, the result's
first column, and the run of pairs."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a kernel is compiled for: one way of coding a matrix."""

    bits: int
    grid: Grid
    group_size: int = GROUP_SIZE

    @staticmethod
    def of(matrix: QuantizedMatrix) -> Form:
        return Form(matrix.bits, matrix.grid, matrix.group_size)

    @property
    def constants(self) -> dict[str, int | bool]:
        cols = tile_cols(self.group_size)
        return {
            "BITS": self.bits,
            "SYMMETRIC": self.grid == "symmetric",
            "TILE_COLS": cols,
            "GROUP_TILES": self.group_size // cols,
        }


def tokens_per_job(most: int) -> int:
    """Columns that suit runs of at most `most` pairs."""
    return min(max(int(triton.next_power_of_2(most)), MIN_TOKENS), MAX_TOKENS)


def multiply_rows(
    jobs: torch.Tensor,
    form: Form,
    x: Digits,
    y: torch.Tensor,
    y_rows: torch.Tensor,
    *,
    rows: int,
    tokens: int,
    add: bool,
) -> None:
    """y[y_rows[p], column + n] = (or +=, with `add`) W[n] . x[p] for every job's rows and pairs.

    jobs is [5, J] int64 on the device, each of a matrix of `rows` rows in one form with
    its tiles at a 16-byte aligned address, and of at most `tokens` pairs. y is [*, *] float32 with
    consecutive rows, y_rows [P] int64. Jobs of one launch must not share outputs.
    """
    _rows_kernel[(triton.cdiv(rows, 16), jobs.shape[1])](
        jobs, jobs.shape[1], x.digits, x.sizes, x.sums, y, y_rows, rows, y.stride(0),
        x.num_groups, **form.constants, TOKENS=tokens, STEP=TILES_PER_STEP, ADD=add,
        PACKED=not triton.knobs.runtime.interpret, STAGES=STAGES, num_warps=NUM_WARPS,
    )  # fmt: skip


def matmul_decode(matrix: QuantizedMatrix, x_TK: torch.Tensor) -> torch.Tensor:
    """x @ W.T as [T, N] float32 for one packed matrix; x is contiguous on its device.

    The matrix's bytes start at a multiple of 16.
    """
    num_tokens, device = x_TK.shape[0], x_TK.device
    row_bytes = x_TK.stride(0) * x_TK.element_size()
    in_order = torch.arange(num_tokens, device=device)
    x = to_digits(x_TK.data_ptr() + in_order * row_bytes, matrix.cols, x_TK)
    y_TN = x_TK.new_empty((num_tokens, matrix.rows), dtype=torch.float32)
    tokens = tokens_per_job(num_tokens)
    table = single_jobs(matrix, num_tokens, tokens)
    form = Form.of(matrix)
    multiply_rows(table, form, x, y_TN, in_order, rows=matrix.rows, tokens=tokens, add=False)
    return y_TN


def single_jobs(matrix: QuantizedMatrix, num_tokens: int, tokens: int) -> torch.Tensor:
    """The job table, on its device, of one matrix for `num_tokens` pairs, `tokens` a job."""
    data = matrix.data.data_ptr()
    scales = data + tiles_bytes(
        matrix.rows, matrix.cols, matrix.bits, matrix.grid, matrix.group_size
    )
    jobs = [
        (data, scales, 0, first, min(tokens, num_tokens - first))
        for first in range(0, num_tokens, tokens)
    ]
    # From pageable memory an asynchronous copy is staged before it returns: safe, and no wait.
    table = torch.tensor(jobs, dtype=torch.int64).T.contiguous()
    return table.to(matrix.data.device, non_blocking=True)


@triton.jit
def _rows_kernel(
    jobs, num_jobs, digits, sizes, sums, y, y_rows, rows, y_stride, num_groups,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_COLS: tl.constexpr,
    GROUP_TILES: tl.constexpr, TOKENS: tl.constexpr,
    STEP: tl.constexpr, ADD: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row block of 16 with TOKENS pairs, STEP tiles at a time; num_groups is the digits'.

    Each tile is an exact integer product of [16, 64] codes and [64, 4 * TOKENS] digits; sizes,
    scales and zero points are applied to it in float32, summed per tile of the step over all
    steps, then over tiles, then over a token's two halves: in this order whatever TOKENS is.
    """
    block = tl.program_id(0)
    job = jobs + tl.program_id(1)
    num_tiles = num_groups * (64 // TILE_COLS)
    data = tl.multiple_of(tl.load(job).to(tl.pointer_type(tl.uint8)), 16)
    data += tile_places(
        block.to(tl.int64) * num_tiles, BITS, SYMMETRIC, TILE_COLS, GROUP_TILES
    )[0]  # fmt: skip
    first = tl.load(job + 3 * num_jobs)
    count = tl.load(job + 4 * num_jobs)
    column = tl.arange(0, 4 * TOKENS)
    # Columns past the last pair repeat it and are not stored.
    pair = first + tl.minimum(column // 4, count - 1)
    half = tl.arange(0, 2 * TOKENS)
    pair_of_half = first + tl.minimum(half // 2, count - 1)
    total = tl.zeros((STEP, 16, 2 * TOKENS), tl.float32)
    for start in tl.range(0, num_tiles, STEP, num_stages=STAGES):
        tile = start + tl.arange(0, STEP)
        inside = tile < num_tiles
        # Tiles past the end read the last one again; their inputs are zero.
        codes_at, scales_at = tile_places(
            tl.minimum(tile, num_tiles - 1), BITS, SYMMETRIC, TILE_COLS, GROUP_TILES
        )
        codes = tile_codes(data + codes_at, BITS, TILE_COLS, PACKED)
        # Digits are in groups of 64 whatever the codes are in: a half tile meets half of one.
        group, part = tile * TILE_COLS // 64, tile % (64 // TILE_COLS)
        place = pair[None, :] * num_groups + group[:, None]
        at = place * 256 + (column % 4 * 64)[None, :] + (part * TILE_COLS)[:, None]
        at = at[:, :, None] + tl.arange(0, TILE_COLS)[None, None, :]
        x = tl.load(digits + at, mask=inside[:, None, None], other=0)
        dot = tl.dot(codes, tl.permute(x, (0, 2, 1)), out_dtype=tl.int32)
        # Digits two by two: a thread has both. Exact below 2**25, then rounded to float32 once.
        high, low = tl.split(tl.reshape(dot, (STEP, 16, 2 * TOKENS, 2)))
        dot = (high * 256 + low).to(tl.float32)
        meta = (pair_of_half[None, :] * num_groups + group[:, None]) * 2
        digit_pair = (half % 2)[None, :]
        size = tl.load(sizes + meta + digit_pair, mask=inside[:, None], other=0.0)
        sum_x = _input_sums(sums + meta, digit_pair, part[:, None], inside[:, None], TILE_COLS)
        if SYMMETRIC:
            middle: tl.constexpr = ((1 << BITS) - 1) * 0.5
            part = tl.fma(dot, size[:, None, :], -middle * sum_x[:, None, :])
            total = tl.fma(part, tile_bytes16(data + scales_at)[:, :, None], total)
        else:
            scale, zero = tile_halves(data + scales_at), tile_halves(data + scales_at + 32)
            total = tl.fma(dot * size[:, None, :], scale[:, :, None], total)
            total = tl.fma(-zero[:, :, None], sum_x[:, None, :], total)
    result = tl.sum(tl.reshape(tl.sum(total, 0), (16, TOKENS, 2)), 2)
    row = block * 16 + tl.arange(0, 16)
    if SYMMETRIC:
        row_scales = tl.load(job + num_jobs).to(tl.pointer_type(tl.uint8))
        result *= load_row_scale(row_scales, 2 * row)[:, None]
    token = tl.arange(0, TOKENS)
    mask = (row < rows)[:, None] & (token < count)[None, :]
    y_row = tl.load(y_rows + first + token, mask=token < count, other=0)
    out = y + y_row[None, :] * y_stride + (tl.load(job + 2 * num_jobs) + row)[:, None]
    if ADD:
        result += tl.load(out, mask=mask, other=0.0)
    tl.store(out, result, mask=mask)


@triton.jit
def _input_sums(sums, digit_pair, part, inside, TILE_COLS: tl.constexpr):
    """What meets the zero points. The two halves of a token are added up later: each takes the sum
    of half a whole tile's inputs, or the first that of a half tile's."""
    if TILE_COLS == 64:
        total = tl.load(sums + digit_pair, mask=inside, other=0.0)
    else:
        total = tl.load(sums + part, mask=inside & (digit_pair == 0), other=0.0)
    return total
