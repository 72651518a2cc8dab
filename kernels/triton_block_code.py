"""The block code decoded on a GPU: what crossed the link coded becomes float32 there.

Reads everything it needs from the device's memory, the header too, so that nothing waits for the
device; no read leaves the data, whatever its bytes. Checked under Triton's interpreter and
compiled for sm_90; not run on a GPU.

Legend: N rows, K cols, B blocks, L values of a block.
"""

# A Triton kernel's parameters are typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.block_code import BLOCK, ROWS_PER_CHUNK, BlockCodedMatrix, block_sections
from kernels.steps import GROUP_SIZE

BLOCKS_PER_STEP = 32
"""Blocks that a program decodes at once: 1024 values, 8 a thread."""


def decode_block_code(matrix: BlockCodedMatrix) -> torch.Tensor:
    """The [N, K] float32 weight, the same bits as `kernels.block_code`'s; one program a chunk."""
    data = matrix.data if matrix.data.data_ptr() % 4 == 0 else matrix.data.clone()
    rows, cols = matrix.rows, matrix.cols
    weight_NK = torch.empty(0, device=data.device).new_empty(rows, cols)
    sections = block_sections(rows, cols, 0)
    _decode_kernel[(triton.cdiv(rows, ROWS_PER_CHUNK),)](
        data, weight_NK, rows, cols // BLOCK, data.numel(),
        chunk_starts=sections.chunk_starts, plane_counts=sections.plane_counts,
        factors=sections.factors, table_bytes=sections.factors - sections.plane_counts,
        ROWS=ROWS_PER_CHUNK, STEP=BLOCKS_PER_STEP, PAIR=GROUP_SIZE // BLOCK,
    )  # fmt: skip
    return weight_NK


@triton.jit
def _decode_kernel(
    data, weight, rows, row_blocks, num_bytes, chunk_starts, plane_counts, factors, table_bytes,
    ROWS: tl.constexpr, STEP: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """One chunk of rows, STEP blocks at a time, front to back: planes, then signs, then steps."""
    chunk = tl.program_id(0)
    flags = tl.load(data + 5).to(tl.int32)
    grouped = (flags & 2) != 0
    payload = factors + tl.where(grouped, table_bytes, 0)
    num_words = (num_bytes - payload) // 4
    words = (data + payload).to(tl.pointer_type(tl.int32))
    starts = (data + chunk_starts).to(tl.pointer_type(tl.uint32)) + 2 * chunk
    plane_word = tl.load(starts).to(tl.int64)
    sign_word = tl.load(starts + 1).to(tl.int64)
    row_steps = (data + 32).to(tl.pointer_type(tl.float32))

    lane = tl.arange(0, 32)[None, :]
    num_blocks = tl.minimum(ROWS, rows - chunk * ROWS) * row_blocks
    num_factored = tl.where(grouped, num_blocks, 0)
    signs_seen = tl.zeros((), tl.int32)
    for first in range(0, num_blocks, STEP):
        block = first + tl.arange(0, STEP)
        inside = block < num_blocks
        place = chunk.to(tl.int64) * ROWS * row_blocks + block
        pair = place // PAIR
        count = tl.load(data + plane_counts + pair, mask=inside, other=0).to(tl.int32)
        count = (count >> (4 * (block % PAIR))) & 15
        planes = tl.where(count < 14, count, tl.where(count == 14, 18, 24))
        start = plane_word + tl.cumsum(planes, 0) - planes
        value = tl.zeros((STEP, 32), tl.int32)
        for plane in range(0, tl.max(planes, 0)):
            has = (plane < planes) & (start + plane < num_words)
            word = tl.load(words + start + plane, mask=has, other=0)
            value |= ((word[:, None] >> lane) & 1) << plane
        signed = (value != 0).to(tl.int32)
        num_signs = tl.sum(signed, 1)
        before = signs_seen + tl.cumsum(num_signs, 0) - num_signs
        at = before[:, None] + tl.cumsum(signed, 1) - signed
        word_at = sign_word + at // 32
        sign = tl.load(words + word_at, mask=(signed != 0) & (word_at < num_words), other=0)
        value = tl.where(((sign >> (at % 32)) & 1) != 0, -value, value)
        if (flags & 1) != 0:
            value = tl.cumsum(value, 1)
        row = chunk * ROWS + block // row_blocks
        step = tl.load(row_steps + row, mask=inside, other=0.0)
        has = (block < num_factored) & (factors + pair < num_bytes)
        factor = tl.load(data + factors + pair, mask=has, other=0).to(tl.int32)
        step *= (16 + (factor & 15)).to(tl.float32) * (1 << (factor >> 4)).to(tl.float32) * 0.0625
        out = place[:, None] * 32 + lane
        tl.store(weight + out, value.to(tl.float32) * step[:, None], mask=inside[:, None])
        plane_word += tl.sum(planes, 0)
        signs_seen += tl.sum(num_signs, 0)
