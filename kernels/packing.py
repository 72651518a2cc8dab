"""The bit order of a tile, written once: codes and scales to bytes and back, in plain torch.

A tile is 16 rows x 64 inputs. Its codes are sixteen 64-byte vectors; vector j holds inputs
4j..4j+3 of every row, row r in bytes 4r..4r+3: one operand of a 32-bit dot-product instruction.
Vectors share bytes ("planes") so that a mask or one shift brings a vector out. A half tile has 32
inputs and so 8 vectors, in half as many planes. A group of inputs is one tile, or several, or half
tiles where 64 does not divide its size; its scales follow the codes of its last tile: 16 float16
scales and 16 zeros (affine), or 16 bytes (symmetric, whose float16 row scales follow the last
group). Knows no file.

Legend: N rows, K cols, G groups of cols, B row blocks of 16, M tiles of a group, V vectors and P
planes of a tile.
"""

from __future__ import annotations

import torch

from kernels.types import (
    GRID_BITS,
    GROUP_SIZE,
    SCALE8_MAX,
    TILE_ROWS,
    Grid,
    QuantizedMatrix,
    check_group_size,
    group_bytes,
    padded_rows,
    tile_cols,
    tiles_bytes,
)

VECTOR_BYTES = 64
INPUTS_PER_LANE = 4
FLOAT16_MAX = 65504.0


def pack(
    codes_NK: torch.Tensor,
    scale_NG: torch.Tensor,
    zero_NG: torch.Tensor,
    bits: int,
    *,
    group_size: int = GROUP_SIZE,
) -> QuantizedMatrix:
    """Pack W = (codes - zero) * scale, one scale and zero per row and group of inputs.

    codes_NK is uint8 below 2**bits; scale_NG and zero_NG are float, the zero in code units (it need
    not be whole). Scale and zero * scale are stored as float16. Works on any device; the bytes lie
    where the codes lie.

    Raises ValueError when shapes, bits or values do not fit the layout.
    """
    _check_codes(codes_NK, bits, "affine", group_size)
    rows, cols = codes_NK.shape
    groups = cols // group_size
    for name, values in (("scale", scale_NG), ("zero", zero_NG)):
        _check_float(name, values, (rows, groups))
    scale = scale_NG.float()
    zero_scaled = zero_NG.float() * scale
    _check_float16("scale", scale)
    _check_float16("zero * scale", zero_scaled)

    groups_BG, code_bytes = _groups_with_codes(codes_NK, bits, "affine", group_size)
    for values, start in ((scale, code_bytes), (zero_scaled, code_bytes + 2 * TILE_ROWS)):
        halves = _per_group(values.half())
        groups_BG[:, :, start : start + 2 * TILE_ROWS] = halves.view(torch.uint8)
    return QuantizedMatrix(groups_BG.view(-1), rows, cols, bits, group_size)


def pack_symmetric(
    codes_NK: torch.Tensor,
    scale8_NG: torch.Tensor,
    row_scale_N: torch.Tensor,
    bits: int,
    *,
    group_size: int = GROUP_SIZE,
) -> QuantizedMatrix:
    """Pack W = row_scale * scale8/255 * (codes - (2**bits - 1)/2), levels evenly about zero.

    codes_NK is uint8 below 2**bits, scale8_NG uint8 (one per row and group of inputs) and
    row_scale_N float, stored as float16. Works on any device; the bytes lie where the codes lie.

    Raises ValueError when shapes, bits or values do not fit the layout.
    """
    _check_codes(codes_NK, bits, "symmetric", group_size)
    rows, cols = codes_NK.shape
    expected = (rows, cols // group_size)
    if tuple(scale8_NG.shape) != expected or scale8_NG.dtype != torch.uint8:
        raise ValueError(
            f"scale8: expected uint8 {expected}, got {scale8_NG.dtype} {tuple(scale8_NG.shape)}"
        )
    _check_float("row_scale", row_scale_N, (rows,))
    _check_float16("row_scale", row_scale_N)
    groups_BG, code_bytes = _groups_with_codes(codes_NK, bits, "symmetric", group_size)
    groups_BG[:, :, code_bytes:] = _per_group(scale8_NG)
    row_scales = _pad_rows(row_scale_N.half()[:, None]).view(-1).view(torch.uint8)
    return QuantizedMatrix(
        torch.cat((groups_BG.view(-1), row_scales)), rows, cols, bits, group_size, "symmetric"
    )


def pack_bf16(weight_NK: torch.Tensor) -> QuantizedMatrix:
    """The unquantised baseline: a [N, K] weight as row-major bfloat16 (bits 16)."""
    if weight_NK.dim() != 2:
        raise ValueError(f"weight: expected [rows, cols], got shape {tuple(weight_NK.shape)}")
    rows, cols = weight_NK.shape
    data = weight_NK.to(torch.bfloat16).contiguous().view(torch.uint8).reshape(-1)
    return QuantizedMatrix(data, rows, cols, 16)


def unpack(matrix: QuantizedMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K] uint8, scale [N, G] float32 and zero * scale [N, G] float32 of a packed matrix.

    W = scale * codes - zero_scaled. Of a symmetric matrix, scale is its row and group scale in one,
    and zero_scaled the middle code times it; see `unpack_symmetric` for what it stores. Raises
    ValueError for bits 16, which has no codes.
    """
    if matrix.grid == "symmetric":
        codes_NK, scale8_NG, row_scale_N = unpack_symmetric(matrix)
        scale_NG = (row_scale_N * (1 / SCALE8_MAX))[:, None] * scale8_NG.float()
        return codes_NK, scale_NG, scale_NG * middle_code(matrix.bits)
    codes_NK, scale_bytes = _codes_and_scale_bytes(matrix)
    blocks, groups = scale_bytes.shape[:2]
    halves = scale_bytes.view(torch.float16).float()
    per_row = halves.view(blocks, groups, 2, TILE_ROWS).permute(2, 0, 3, 1)
    scale_NG, zero_scaled_NG = per_row.reshape(2, blocks * TILE_ROWS, groups)
    return codes_NK, scale_NG[: matrix.rows], zero_scaled_NG[: matrix.rows]


def unpack_symmetric(matrix: QuantizedMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K] uint8, scale8 [N, G] uint8, row_scale [N] float32: what `pack_symmetric` took.

    Raises ValueError for an affine matrix.
    """
    if matrix.grid != "symmetric":
        raise ValueError(f"grid: got {matrix.grid!r}, expected 'symmetric'")
    codes_NK, scale_bytes = _codes_and_scale_bytes(matrix)
    scale8_NG = scale_bytes.transpose(1, 2).reshape(-1, scale_bytes.shape[1])
    start = tiles_bytes(matrix.rows, matrix.cols, matrix.bits, matrix.grid, matrix.group_size)
    # A copy of its own starts at an aligned address, wherever the bytes lie.
    row_scale = matrix.data[start:].clone(memory_format=torch.contiguous_format)
    row_scale_N = row_scale.view(torch.float16).float()
    return codes_NK, scale8_NG[: matrix.rows], row_scale_N[: matrix.rows]


def middle_code(bits: int) -> float:
    """The code that a symmetric grid takes for zero; between two codes, so that zero is none."""
    return (2**bits - 1) / 2


def bf16_weight(matrix: QuantizedMatrix) -> torch.Tensor:
    """The [N, K] bfloat16 weight of a bits-16 matrix; a view where the bytes are 2-byte aligned."""
    if matrix.bits != 16:
        raise ValueError(f"bits: got {matrix.bits}, expected 16")
    data = matrix.data.contiguous()
    if data.storage_offset() % 2:
        data = data.clone()
    return data.view(torch.bfloat16).view(matrix.rows, matrix.cols)


def _groups_with_codes(
    codes_NK: torch.Tensor, bits: int, grid: Grid, group_size: int
) -> tuple[torch.Tensor, int]:
    """Groups [B, G, group_bytes] with their codes written and scales not; and where those go."""
    rows, cols = codes_NK.shape
    blocks, groups, vectors = (
        padded_rows(rows) // TILE_ROWS,
        cols // group_size,
        _vectors(group_size),
    )
    vectors_BGMVC = (
        _pad_rows(codes_NK)
        .view(blocks, TILE_ROWS, groups, -1, vectors, INPUTS_PER_LANE)
        .permute(0, 2, 3, 4, 1, 5)
        .reshape(blocks, groups, -1, vectors, VECTOR_BYTES)
    )
    groups_BG = codes_NK.new_empty(blocks, groups, group_bytes(bits, grid, group_size))
    code_bytes = bits * group_size * TILE_ROWS // 8
    planes = groups_BG[:, :, :code_bytes].view(*vectors_BGMVC.shape[:3], -1, VECTOR_BYTES)
    _put_planes(vectors_BGMVC, planes, bits)
    return groups_BG, code_bytes


def _vectors(group_size: int) -> int:
    """Of a tile of such a group."""
    return tile_cols(group_size) // INPUTS_PER_LANE


def _per_group(values_NG: torch.Tensor) -> torch.Tensor:
    """[B, G, 16] from one value per row and group; padding rows are zero."""
    padded = _pad_rows(values_NG)
    return padded.view(-1, TILE_ROWS, padded.shape[1]).transpose(1, 2).contiguous()


def _codes_and_scale_bytes(matrix: QuantizedMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] uint8, and what follows the codes of each group, [B, G, bytes] uint8 copied."""
    if matrix.bits == 16:
        raise ValueError("bits: got 16, which holds no codes to unpack")
    rows, cols, bits, group_size = matrix.rows, matrix.cols, matrix.bits, matrix.group_size
    blocks, groups = padded_rows(rows) // TILE_ROWS, cols // group_size
    size = tiles_bytes(rows, cols, bits, matrix.grid, group_size)
    groups_BG = matrix.data[:size].view(blocks, groups, -1)
    code_bytes = bits * group_size * TILE_ROWS // 8
    vectors = _vectors(group_size)
    planes = groups_BG[:, :, :code_bytes].view(
        blocks, groups, -1, bits * vectors // 8, VECTOR_BYTES
    )
    # The four inputs of a row in one vector move together, as one int32.
    lanes = _get_vectors(planes, bits).view(torch.int32)  # [B, G, M, V, 16]
    codes_NK = lanes.permute(0, 4, 1, 2, 3).contiguous().view(torch.uint8)
    codes_NK = codes_NK.view(blocks * TILE_ROWS, cols)
    # A copy of its own starts at an aligned address, wherever the bytes lie.
    scale_bytes = groups_BG[:, :, code_bytes:].clone(memory_format=torch.contiguous_format)
    return codes_NK[:rows], scale_bytes


def _put_planes(vectors: torch.Tensor, planes: torch.Tensor, bits: int) -> None:
    """Write 16 (or 8) vectors of codes [..., V, 64] into bits*V/8 planes of bytes [..., P, 64]."""
    if bits != 3:
        # Plane p holds vectors p, p + P, p + 2 P, ... from the low bits up.
        count = planes.shape[-2]
        planes.copy_(vectors[..., :count, :])
        for step in range(1, 8 // bits):
            at = count * step
            planes.bitwise_or_(vectors[..., at : at + count, :] << (bits * step))
        return
    # Eight vectors in 3 planes, twice in a whole tile: vectors 0..2 in bits 0-2, 3..5 in bits 3-5;
    # the two bits left over in each of the three bytes hold vectors 6 and 7, lowest bits first.
    for half in range(vectors.shape[-2] // 8):
        v = vectors[..., 8 * half : 8 * half + 8, :]
        left_over = v[..., 6, :] | v[..., 7, :] << 3
        for k in (0, 1, 2):
            top = (left_over >> (2 * k) & 3) << 6
            planes[..., 3 * half + k, :] = v[..., k, :] | v[..., k + 3, :] << 3 | top


def _get_vectors(planes: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `_put_planes`: [..., P, 64] bytes to [..., V, 64] codes."""
    if bits != 3:
        steps, mask = 8 // bits, 2**bits - 1
        return torch.cat([planes >> (bits * step) & mask for step in range(steps)], dim=-2)
    halves = []
    for half in range(planes.shape[-2] // 3):
        p = planes[..., 3 * half : 3 * half + 3, :]
        left_over = p[..., 0, :] >> 6 | p[..., 1, :] >> 6 << 2 | p[..., 2, :] >> 6 << 4
        sixth, seventh = left_over & 7, left_over >> 3
        halves += [p & 7, p >> 3 & 7, sixth[..., None, :], seventh[..., None, :]]
    return torch.cat(halves, dim=-2)


def _pad_rows(values: torch.Tensor) -> torch.Tensor:
    """values [N, ...] with zero rows added up to a multiple of 16, contiguous."""
    rows = values.shape[0]
    if padded_rows(rows) == rows:
        return values.contiguous()
    return torch.cat((values, values.new_zeros(padded_rows(rows) - rows, *values.shape[1:])))


def _check_codes(codes: torch.Tensor, bits: int, grid: Grid, group_size: int) -> None:
    allowed = GRID_BITS[grid]
    if bits not in allowed:
        raise ValueError(f"bits: got {bits}, expected one of {allowed} (16: use pack_bf16)")
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(
            f"codes: expected [rows, cols] uint8, got {codes.dtype} {tuple(codes.shape)}"
        )
    if codes.shape[0] == 0:
        raise ValueError(f"codes: got shape {tuple(codes.shape)}, expected at least one row")
    check_group_size(group_size, codes.shape[1])
    largest = int(codes.max())
    if largest >= 2**bits:
        raise ValueError(f"codes: largest is {largest}, {bits} bits hold at most {2**bits - 1}")


def _check_float(name: str, values: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(values.shape) != expected or not values.is_floating_point():
        raise ValueError(
            f"{name}: expected float {expected}, got {values.dtype} {tuple(values.shape)}"
        )


def _check_float16(name: str, values: torch.Tensor) -> None:
    largest = float(values.abs().max())
    if not largest <= FLOAT16_MAX:  # also catches NaN
        raise ValueError(
            f"{name}: largest magnitude is {largest}, the layout stores float16 "
            f"(at most {FLOAT16_MAX}); rescale the matrix or choose another grid"
        )
