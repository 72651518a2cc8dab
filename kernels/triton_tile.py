"""Reading packed tiles inside a Triton kernel: the bit order of `kernels/packing.py`.

Checked under Triton's interpreter and compiled for sm_90; not run on a GPU.
"""

# A Triton kernel's parameters are typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def field(data, plane_start, lane_byte, vector: tl.constexpr, BITS: tl.constexpr):
    """Codes of one vector (0..15) at byte `lane_byte` of its planes, as float32.

    plane_start is the byte offset of the tile's first plane, lane_byte is 4 * row + input % 4.
    """
    if BITS != 3:
        planes: tl.constexpr = 2 * BITS
        byte = tl.load(data + plane_start + (vector % planes) * 64 + lane_byte).to(tl.int32)
        code = (byte >> (BITS * (vector // planes))) & ((1 << BITS) - 1)
    else:
        half = plane_start + (vector // 8) * 192 + lane_byte
        if vector % 8 < 6:
            byte = tl.load(data + half + (vector % 8 % 3) * 64).to(tl.int32)
            code = (byte >> (3 * (vector % 8 // 3))) & 7
        else:
            code = (_left_over(data, half) >> (3 * (vector % 8 - 6))) & 7
    return code.to(tl.float32)


@triton.jit
def gather_codes(data, tile_start, row, col, BITS: tl.constexpr):
    """Codes of (row % 16, col % 64) in the tiles at `tile_start`, as float32; all broadcast."""
    vector = col % 64 // 4
    lane_byte = 4 * (row % 16) + col % 4
    if BITS != 3:
        planes: tl.constexpr = 2 * BITS
        byte = tl.load(data + tile_start + (vector % planes) * 64 + lane_byte).to(tl.int32)
        code = (byte >> (BITS * (vector // planes))) & ((1 << BITS) - 1)
    else:
        half = tile_start + (vector // 8) * 192 + lane_byte
        place = vector % 8
        byte = tl.load(data + half + (place % 3) * 64).to(tl.int32)
        whole = byte >> (3 * (place // 3))
        split = _left_over(data, half) >> (3 * (place - 6))
        code = tl.where(place < 6, whole, split) & 7
    return code.to(tl.float32)


@triton.jit
def _left_over(data, half):
    """The six bits that three planes have left over: vector 6 of the half low, vector 7 high."""
    a = tl.load(data + half).to(tl.int32)
    b = tl.load(data + half + 64).to(tl.int32)
    c = tl.load(data + half + 128).to(tl.int32)
    return (a >> 6) | ((b >> 6) << 2) | ((c >> 6) << 4)


@triton.jit
def load_half(data, byte_offset):
    """float16 at even byte offsets, as float32."""
    pointer = (data + byte_offset).to(tl.pointer_type(tl.float16))
    return tl.load(pointer).to(tl.float32)


@triton.jit
def load_byte(data, byte_offset):
    """A scale byte, as float32."""
    return tl.load(data + byte_offset).to(tl.float32)


@triton.jit
def load_row_scale(data, byte_offset):
    """A symmetric matrix's float16 row scale over 255, so that it meets scale bytes; float32."""
    return load_half(data, byte_offset) * (1.0 / 255.0)


@triton.jit
def gather_weight(data, tile_start, row, col, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Weights of (row % 16, col % 64) in the tiles at `tile_start`; symmetric: over the row scale.

    `row` and `tile_start` broadcast against each other, and both against `col`.
    """
    code = gather_codes(data, tile_start, row, col, BITS)
    scales = tile_start + BITS * 128
    if SYMMETRIC:
        weight = (code - ((1 << BITS) - 1) * 0.5) * load_byte(data, scales + row % 16)
    else:
        scales += 2 * (row % 16)
        weight = code * load_half(data, scales) - load_half(data, scales + 32)
    return weight
