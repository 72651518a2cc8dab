"""Weights into the block code of `kernels/block_code.py`, within an error bound. On the CPU.

Legend: N rows, K cols, G groups of 64 cols, B blocks of a row, L values of a block.
"""

from __future__ import annotations

import torch

from kernels.block_code import (
    BLOCK,
    DIFFERENCED,
    GROUPED,
    HEADER,
    MAGIC,
    PLANES,
    ROWS_PER_CHUNK,
    VERSION,
    BlockCodedMatrix,
    before_in_chunk,
    block_sections,
    check_shape,
    per_chunk,
    row_pieces,
)
from kernels.steps import GROUP_SIZE, steps, steps_within


def encode_block_code(
    weight_NK: torch.Tensor, bound_NG: torch.Tensor, *, differenced: bool = False
) -> BlockCodedMatrix:
    """Code a float [N, K] weight so that |decoded - weight| <= bound everywhere.

    bound_NG is float64, [N, 1] or [N, K/64]. Bytes lie on the CPU. A bound under 2**-20 of a weight
    that it holds for is too tight for float32. Raises ValueError for that, for bounds under
    2**-100, for weights that are not finite, and for shapes that do not fit.
    """
    rows, cols = _checked(weight_NK, bound_NG)
    weight_NK, bound_NG = weight_NK.detach().cpu().float(), bound_NG.cpu().double()
    row_step_N, factor_NG = steps_within(weight_NK, bound_NG)
    step_NG = steps(row_step_N, factor_NG)
    nibbles, lengths, words = [], [], []
    for piece in row_pieces(rows, cols):
        step = step_NG[piece].repeat_interleave(cols // step_NG.shape[1], dim=1)
        codes_NK = (weight_NK[piece] / step).round().int()
        piece_nibbles, piece_lengths, piece_words = _encode_rows(codes_NK, differenced)
        nibbles.append(piece_nibbles)
        lengths.append(piece_lengths)
        words.append(piece_words)
    flags = DIFFERENCED * differenced + (GROUPED if factor_NG is not None else 0)
    data = _assemble(
        row_step_N, factor_NG, torch.cat(nibbles), torch.cat(lengths), torch.cat(words), flags, cols
    )
    return BlockCodedMatrix(data, rows, cols)


def _checked(weight_NK: torch.Tensor, bound_NG: torch.Tensor) -> tuple[int, int]:
    if weight_NK.dim() != 2 or not weight_NK.is_floating_point():
        raise ValueError(
            f"weight: expected float [rows, cols], got {weight_NK.dtype} {tuple(weight_NK.shape)}"
        )
    rows, cols = weight_NK.shape
    check_shape(rows, cols)
    if tuple(bound_NG.shape) not in {(rows, 1), (rows, cols // GROUP_SIZE)}:
        raise ValueError(
            f"bound: expected [{rows}, 1] or [{rows}, {cols // GROUP_SIZE}], got "
            f"{tuple(bound_NG.shape)}"
        )
    if not bool(torch.isfinite(weight_NK).all()):
        raise ValueError("weight: holds NaN or infinity; an error bound means nothing there")
    return rows, cols


def _encode_rows(
    codes_NK: torch.Tensor, differenced: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some chunks' rows: plane-count nibbles uint8 [n, B], lengths in words (planes, signs) int64
    [C, 2], and payload int32."""
    codes_BL = codes_NK.view(-1, BLOCK)
    if differenced:
        codes_BL = codes_BL - torch.nn.functional.pad(codes_BL[:, :-1], (1, 0))
    magnitude_BL = codes_BL.abs()
    needed_B = torch.frexp(magnitude_BL.amax(dim=1).double())[1]
    planes_of = torch.tensor(PLANES)
    nibble_B = torch.searchsorted(planes_of, needed_B)
    planes_B = planes_of[nibble_B]
    nibble_NB = nibble_B.view(codes_NK.shape[0], -1).to(torch.uint8)

    signed = (codes_BL != 0).view(-1)
    chunk_blocks = ROWS_PER_CHUNK * nibble_NB.shape[1]
    place = before_in_chunk(signed.long(), chunk_blocks * BLOCK)
    num_signs_C = per_chunk(signed.view(codes_NK.shape).sum(1))
    lengths_C2 = torch.stack(
        (per_chunk(planes_B.view(nibble_NB.shape).sum(1)), -(-num_signs_C // BLOCK)), dim=1
    )
    starts_C2 = (lengths_C2.view(-1).cumsum(0) - lengths_C2.view(-1)).view(-1, 2)
    chunk_B = torch.arange(planes_B.numel()) // chunk_blocks
    start_B = starts_C2[chunk_B, 0] + before_in_chunk(planes_B, chunk_blocks)

    words = torch.zeros(int(lengths_C2.sum()), dtype=torch.int32)
    for plane in range(int(planes_B.max())):
        has = planes_B > plane
        words[start_B[has] + plane] = _bits_to_words(magnitude_BL[has] >> plane & 1)
    signs = torch.zeros(words.numel() * BLOCK, dtype=torch.uint8)
    chunk = chunk_B[:, None].expand(codes_BL.shape).reshape(-1)[signed]
    negative = (codes_BL.view(-1)[signed] < 0).to(torch.uint8)
    signs[starts_C2[chunk, 1] * BLOCK + place[signed]] = negative
    words |= _bits_to_words(signs.view(-1, BLOCK))
    return nibble_NB, lengths_C2, words


def _bits_to_words(bits_BL: torch.Tensor) -> torch.Tensor:
    """0 or 1, [B, 32], to int32 [B], value i in bit i."""
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    octets = (bits_BL.reshape(-1, 8).to(torch.uint8) * place).sum(dim=1, dtype=torch.uint8)
    return octets.view(torch.int32)


def _assemble(
    row_step_N: torch.Tensor,
    factor_NG: torch.Tensor | None,
    nibble_NB: torch.Tensor,
    lengths_C2: torch.Tensor,
    words: torch.Tensor,
    flags: int,
    cols: int,
) -> torch.Tensor:
    rows = row_step_N.numel()
    sections = block_sections(rows, cols, flags)
    data = torch.zeros(sections.payload + 4 * words.numel(), dtype=torch.uint8)
    head = HEADER.pack(MAGIC, VERSION, flags, 0, rows, cols, words.numel(), 0)
    lengths = lengths_C2.view(-1)
    starts = lengths.cumsum(0) - lengths
    if words.numel() >= 1 << 32:
        raise ValueError(f"weight: its code has {words.numel()} words, at most 2**32 fit; split it")
    pairs = nibble_NB.view(rows, -1, 2)
    parts = [
        (0, torch.frombuffer(bytearray(head), dtype=torch.uint8)),
        (HEADER.size, row_step_N.view(torch.uint8)),
        (sections.chunk_starts, starts.to(torch.uint32).view(torch.uint8)),
        (sections.plane_counts, (pairs[..., 0] | pairs[..., 1] << 4).view(-1)),
        (sections.payload, words.view(torch.uint8)),
    ]
    if factor_NG is not None:
        parts.append((sections.factors, factor_NG.reshape(-1)))
    for start, part in parts:
        data[start : start + part.numel()] = part
    return data
