"""Block-wise fixed-length code of an error-bounded weight, in the style of cuSZp.

After Huang et al., SC'23, with two changes for weights: signs only of what is not zero, and no
prediction unless asked for. A value is a whole number of its row's (or group's) step, twice the
error bound; 32 of them are a block, stored as the bit planes that its largest needs, none for a
block of zeros. Eight rows are a chunk, which decodes alone. The layout, all little-endian, every
section at a multiple of 4 bytes:

    header, 32 bytes   "MTBC", u8 version 1, u8 flags (1: differences, 2: a step per group of 64),
                       u16 0, u32 rows, u32 cols, u64 words of payload, u64 0
    row steps          float32 [rows]
    chunk starts       u32 [chunks, 2]: first payload word of the chunk's planes, of its signs
    plane counts       u8 [rows, cols / 64]: two blocks each, the first in the low four bits;
                       0 to 13 are that many planes, 14 is 18 and 15 is 24
    group factors      u8 [rows, cols / 64], only with flag 2; see `kernels/steps.py`
    payload            u32 words, chunk by chunk: each block's planes from the lowest up, value i
                       of the block in bit i; then the signs of the chunk's values that are not
                       zero, in order, from the lowest bit up (1: negative)

With flag 1 a value is the difference from the one before it in its block (the first from zero).

Legend: N rows, K cols, G groups of 64 cols, B blocks, L values of a block, C chunks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.steps import GROUP_SIZE, steps

MAGIC = b"MTBC"
VERSION = 1
DIFFERENCED, GROUPED = 1, 2  # bits of the flags
BLOCK = 32
ROWS_PER_CHUNK = 8
HEADER = struct.Struct("<4sBBHIIQQ")
PLANES = (*range(14), 18, 24)
"""Bit planes by the four bits that say so."""
MAX_SIZE = 1 << 24
"""Rows, and cols, of a matrix."""
VALUES_AT_ONCE = 1 << 20  # bounds the memory of encoding and decoding


@dataclass(frozen=True, slots=True)
class BlockCodedMatrix:
    """A [rows, cols] weight in the layout of `kernels/block_code.py`; cols is a multiple of 64.

    `data` is a flat uint8 tensor, maybe a read-only view of a mapped file. Data on the CPU is
    checked against its own header here, and wholly by `check_block_code`; of data elsewhere only
    the length is looked at, because more would wait for the device.

    Raises ValueError when shape, header and length do not fit together.
    """

    data: torch.Tensor  # [num_bytes] uint8
    rows: int
    cols: int

    def __post_init__(self) -> None:
        check_shape(self.rows, self.cols)
        if self.data.dtype != torch.uint8 or self.data.dim() != 1:
            raise ValueError(f"data: expected a flat uint8 tensor, got {self.data.dtype}")
        if self.data.device.type == "cpu":
            _read_header(self.data, self.rows, self.cols)
        elif self.data.numel() < (least := block_sections(self.rows, self.cols, 0).payload):
            raise ValueError(f"data: {self.data.numel()} bytes, the tables alone have {least}")


@dataclass(frozen=True, slots=True)
class BlockSections:
    """Where the sections of a block code start, in bytes, and what its flags say."""

    is_differenced: bool
    is_grouped: bool
    chunk_starts: int
    plane_counts: int
    factors: int
    payload: int


def block_sections(rows: int, cols: int, flags: int) -> BlockSections:
    """The sections of a [rows, cols] code; everything but the payload's length follows."""
    chunk_starts = HEADER.size + 4 * rows
    plane_counts = chunk_starts + 8 * -(-rows // ROWS_PER_CHUNK)
    table_bytes = -(-rows * (cols // GROUP_SIZE) // 4) * 4
    factors = plane_counts + table_bytes
    payload = factors + (table_bytes if flags & GROUPED else 0)
    return BlockSections(
        bool(flags & DIFFERENCED), bool(flags & GROUPED), chunk_starts, plane_counts, factors,
        payload,
    )  # fmt: skip


def decode_block_code(matrix: BlockCodedMatrix) -> torch.Tensor:
    """The [N, K] float32 weight, in plain torch on the data's device: the truth for faster forms.

    Raises ValueError for data whose parts contradict one another.
    """
    data = check_block_code(matrix)
    rows, cols = matrix.rows, matrix.cols
    sections = block_sections(rows, cols, _read_header(data, rows, cols))
    words = data[sections.payload :].view(torch.int32)
    words_C3 = _chunk_words(data, sections)
    planes_NB = _planes(data, sections, rows, cols)
    row_step_N, factor_NG = _step_tables(data, sections, rows, cols)
    weight_NK = torch.empty(rows, cols, device=data.device)
    for piece in row_pieces(rows, cols):
        chunks = slice(piece.start // ROWS_PER_CHUNK, -(-piece.stop // ROWS_PER_CHUNK))
        codes_BL = _decode_rows(words, words_C3[chunks], planes_NB[piece])
        if sections.is_differenced:
            codes_BL = codes_BL.cumsum(dim=1)
        step = steps(row_step_N[piece], None if factor_NG is None else factor_NG[piece])
        weight = codes_BL.view(*step.shape, -1).float() * step[:, :, None]
        weight_NK[piece] = weight.view(-1, cols)
    return weight_NK


def check_block_code(matrix: BlockCodedMatrix) -> torch.Tensor:
    """The matrix's data at a 4-byte aligned address, after a check of all but the payload's bits.

    Raises ValueError for tables that contradict one another or the payload's length.
    """
    data, rows, cols = matrix.data.contiguous(), matrix.rows, matrix.cols
    data = data.clone() if data.data_ptr() % 4 or data.storage_offset() % 4 else data
    sections = block_sections(rows, cols, _read_header(data, rows, cols))
    planes_C, signs_C, ends_C = _chunk_words(data, sections).T
    told_C = planes_C + per_chunk(_planes(data, sections, rows, cols).sum(1))
    if int(planes_C[0]) or not bool(((signs_C == told_C) & (signs_C <= ends_C)).all()):
        raise ValueError(
            f"block code of [{rows}, {cols}]: its chunk starts contradict its plane counts or its "
            f"{data.numel()} bytes"
        )
    row_step_N = _step_tables(data, sections, rows, cols)[0]
    if not bool((torch.isfinite(row_step_N) & (row_step_N > 0)).all()):
        raise ValueError(f"block code of [{rows}, {cols}]: a row's step is not a positive number")
    return data


def block_flags(matrix: BlockCodedMatrix) -> int:
    """The flags in the header, which is checked again. Waits for the data's device."""
    return _read_header(matrix.data, matrix.rows, matrix.cols)


def _read_header(data: torch.Tensor, rows: int, cols: int) -> int:
    """The flags, after a check of header and length. Reads 32 bytes."""
    if data.numel() < HEADER.size:
        raise ValueError(f"block code: {data.numel()} bytes, a header alone has {HEADER.size}")
    head = data[: HEADER.size].cpu().contiguous().numpy().tobytes()
    magic, version, flags, zero, told_rows, told_cols, words, rest = HEADER.unpack(head)
    if magic != MAGIC or version != VERSION or flags > DIFFERENCED + GROUPED or zero or rest:
        raise ValueError(f"block code: expected a header {MAGIC!r} {VERSION}, got {head[:8]!r}")
    if (told_rows, told_cols) != (rows, cols):
        raise ValueError(
            f"block code: expected a [{rows}, {cols}] matrix, its header says "
            f"[{told_rows}, {told_cols}]"
        )
    expected = block_sections(rows, cols, flags).payload + 4 * words
    if data.numel() != expected:
        raise ValueError(
            f"block code of [{rows}, {cols}]: its header announces {expected} bytes, got "
            f"{data.numel()}"
        )
    return int(flags)


def check_shape(rows: int, cols: int) -> None:
    if not (0 < rows <= MAX_SIZE and 0 < cols <= MAX_SIZE) or cols % GROUP_SIZE:
        raise ValueError(
            f"shape: got [{rows}, {cols}], expected 1 to {MAX_SIZE} rows and a multiple of "
            f"{GROUP_SIZE} cols"
        )


def row_pieces(rows: int, cols: int) -> Iterator[slice]:
    """Whole chunks of rows, of about VALUES_AT_ONCE values."""
    step = max(1, VALUES_AT_ONCE // (cols * ROWS_PER_CHUNK)) * ROWS_PER_CHUNK
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def per_chunk(of_N: torch.Tensor) -> torch.Tensor:
    """Sums over the rows of each chunk, [C]."""
    padding = -of_N.numel() % ROWS_PER_CHUNK
    return torch.nn.functional.pad(of_N, (0, padding)).view(-1, ROWS_PER_CHUNK).sum(1)


def before_in_chunk(counts: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """How many were counted before each place, from its chunk's first place on; flat int64."""
    before = counts.cumsum(0) - counts
    first = torch.arange(0, counts.numel(), chunk_size, device=counts.device)
    return before - before[first].repeat_interleave(chunk_size)[: counts.numel()]


def _decode_rows(
    words: torch.Tensor, words_C3: torch.Tensor, planes_NB: torch.Tensor
) -> torch.Tensor:
    """The whole numbers of some chunks' rows, int32 [n * B, L]."""
    planes_B = planes_NB.reshape(-1)
    chunk_blocks = ROWS_PER_CHUNK * planes_NB.shape[1]
    chunk_B = torch.arange(planes_B.numel(), device=words.device) // chunk_blocks
    start_B = words_C3[chunk_B, 0] + before_in_chunk(planes_B, chunk_blocks)
    lane_L = torch.arange(BLOCK, dtype=torch.int32, device=words.device)
    codes_BL = torch.zeros(planes_B.numel(), BLOCK, dtype=torch.int32, device=words.device)
    for plane in range(int(planes_B.max())):
        has = planes_B > plane
        codes_BL[has] |= (words[start_B[has] + plane][:, None] >> lane_L & 1) << plane
    signed = (codes_BL != 0).view(-1)
    place = before_in_chunk(signed.long(), chunk_blocks * BLOCK)[signed]
    chunk = chunk_B[:, None].expand(codes_BL.shape).reshape(-1)[signed]
    word = words_C3[chunk, 1] + place // BLOCK
    if bool((word >= words_C3[chunk, 2]).any()):
        raise ValueError("block code: a chunk's signs contradict the start of the next chunk")
    negative = words[word] >> (place % BLOCK).int() & 1
    flat = codes_BL.view(-1)
    flat[signed] *= 1 - 2 * negative
    return codes_BL


def _chunk_words(data: torch.Tensor, sections: BlockSections) -> torch.Tensor:
    """Of every chunk the first plane word, the first sign word and the end, int64 [C, 3]."""
    told = data[sections.chunk_starts : sections.plane_counts].view(torch.int32)
    starts_C2 = told.long().view(-1, 2) & 0xFFFFFFFF
    num_words = (data.numel() - sections.payload) // 4
    ends_C = torch.cat((starts_C2[1:, 0], starts_C2.new_tensor([num_words])))
    return torch.cat((starts_C2, ends_C[:, None]), dim=1)


def _planes(data: torch.Tensor, sections: BlockSections, rows: int, cols: int) -> torch.Tensor:
    """Planes of every block, int64 [N, B]."""
    size = rows * (cols // GROUP_SIZE)
    pair = data[sections.plane_counts : sections.plane_counts + size].view(rows, -1, 1)
    nibble = torch.cat((pair & 15, pair >> 4), dim=2).view(rows, -1)
    return torch.tensor(PLANES, device=data.device)[nibble.long()]


def _step_tables(
    data: torch.Tensor, sections: BlockSections, rows: int, cols: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    row_step_N = data[HEADER.size : sections.chunk_starts].view(torch.float32)
    if not sections.is_grouped:
        return row_step_N, None
    size = rows * (cols // GROUP_SIZE)
    return row_step_N, data[sections.factors : sections.factors + size].view(rows, -1)
