"""Reading packed tiles inside a Triton kernel: the bit order of `kernels/packing.py`.

Two ways: whole tiles as the integer operand of `tl.dot` (`tile_codes` and the scales that follow),
and weights at any (row, col) as float32 (`gather_weight`). Checked under Triton's interpreter and
compiled for sm_90; not run on a GPU.
"""

# A Triton kernel's parameters are typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_places(
    tile,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_COLS: tl.constexpr, GROUP_TILES: tl.constexpr,
):  # fmt: skip
    """Where the codes of tiles lie and the scales of their groups: bytes from the matrix's start.

    Tiles, of TILE_COLS inputs, are numbered row block by row block; GROUP_TILES make a group.
    """
    code_bytes: tl.constexpr = 2 * BITS * TILE_COLS
    scale_bytes: tl.constexpr = 16 if SYMMETRIC else 64
    group = tile // GROUP_TILES * (GROUP_TILES * code_bytes + scale_bytes)
    return group + tile % GROUP_TILES * code_bytes, group + GROUP_TILES * code_bytes


@triton.jit
def tile_codes(tile, BITS: tl.constexpr, TILE_COLS: tl.constexpr, PACKED: tl.constexpr):
    """Codes int8 [T, 16, TILE_COLS] of the tiles at the 16-byte aligned pointers tile [T].

    Planes are read whole, in consecutive bytes. Vectors that share a plane are joined as new outer
    dimensions of the inputs, so that input 4 * vector + lane comes out in its place and, on a GPU,
    each thread holds its part of the tensor core's operand without moving a byte.
    """
    T: tl.constexpr = tile.shape[0]
    if BITS == 3:
        HALVES: tl.constexpr = TILE_COLS // 32
        half = tl.arange(0, HALVES)[None, :, None] * 192 + tl.arange(0, 64)[None, None, :]
        at = tile[:, None, None] + half
        a = tl.reshape(tl.load(at), (T, HALVES, 16, 4))
        b = tl.reshape(tl.load(at + 64), (T, HALVES, 16, 4))
        c = tl.reshape(tl.load(at + 128), (T, HALVES, 16, 4))
        # The bits left over: a's and the low one of b's are vector 6, the others vector 7.
        sixth = _bits(a, 6, 3, PACKED) | _bits(b, 4, 4, PACKED)
        seventh = _bits(b, 7, 1, PACKED) | _bits(c, 5, 6, PACKED)
        codes = _join8(
            _bits(a, 0, 7, PACKED), _bits(b, 0, 7, PACKED), _bits(c, 0, 7, PACKED),
            _bits(a, 3, 7, PACKED), _bits(b, 3, 7, PACKED), _bits(c, 3, 7, PACKED),
            sixth, seventh,
        )  # fmt: skip
        codes = tl.permute(codes, (0, 2, 1, 4, 5, 6, 3))
    else:
        PLANES: tl.constexpr = BITS * TILE_COLS // 32
        byte = tl.load(tile[:, None] + tl.arange(0, 64 * PLANES)[None, :])
        byte = tl.permute(tl.reshape(byte, (T, PLANES, 16, 4)), (0, 2, 1, 3))
        byte = tl.reshape(byte, (T, 16, 4 * PLANES))
        if BITS == 4:
            codes = tl.join(_bits(byte, 0, 15, PACKED), _bits(byte, 4, 15, PACKED))
            codes = tl.permute(codes, (0, 1, 3, 2))
        elif BITS == 2:
            even = tl.join(_bits(byte, 0, 3, PACKED), _bits(byte, 4, 3, PACKED))
            odd = tl.join(_bits(byte, 2, 3, PACKED), _bits(byte, 6, 3, PACKED))
            codes = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2))
        else:
            codes = _join8(
                _bits(byte, 0, 1, PACKED), _bits(byte, 1, 1, PACKED),
                _bits(byte, 2, 1, PACKED), _bits(byte, 3, 1, PACKED),
                _bits(byte, 4, 1, PACKED), _bits(byte, 5, 1, PACKED),
                _bits(byte, 6, 1, PACKED), _bits(byte, 7, 1, PACKED),
            )  # fmt: skip
            codes = tl.permute(codes, (0, 1, 3, 4, 5, 2))
    return tl.reshape(codes, (T, 16, TILE_COLS))


@triton.jit
def _join8(p0, p1, p2, p3, p4, p5, p6, p7):
    """Eight tensors as three new last dimensions of 2, the index's high bit first."""
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
    return tl.join(even, tl.join(tl.join(p1, p5), tl.join(p3, p7)))


@triton.jit
def _bits(byte, SHIFT: tl.constexpr, MASK: tl.constexpr, PACKED: tl.constexpr):
    """(byte >> SHIFT) & MASK as int8.

    PACKED: four bytes of a register at once, which the compiler does not find by itself (its sm_90
    code has 3 instructions a code otherwise, this 2 for four). The interpreter has no such thing.
    """
    if PACKED:
        out = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 $0, t, {MASK * 0x01010101}; }}",
            "=r,r",
            [byte],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        out = ((byte >> SHIFT) & MASK).to(tl.int8)
    return out


@triton.jit
def tile_halves(at):
    """The 16 float16 at each of the pointers at [G], as float32 [G, 16]; read as 32-bit words."""
    G: tl.constexpr = at.shape[0]
    word = tl.load(at[:, None].to(tl.pointer_type(tl.int32)) + tl.arange(0, 8)[None, :])
    half = tl.reshape(tl.join(word & 0xFFFF, (word >> 16) & 0xFFFF), (G, 16)).to(tl.int16)
    return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def tile_bytes16(at):
    """The 16 bytes at each of the pointers at [G], as float32 [G, 16]; read as 32-bit words."""
    G: tl.constexpr = at.shape[0]
    word = tl.load(at[:, None].to(tl.pointer_type(tl.int32)) + tl.arange(0, 4)[None, :])
    even = tl.join(word & 255, (word >> 16) & 255)
    odd = tl.join((word >> 8) & 255, (word >> 24) & 255)
    return tl.reshape(tl.join(even, odd), (G, 16)).to(tl.float32)


@triton.jit
def gather_codes(data, tile_start, row, col, BITS: tl.constexpr, TILE_COLS: tl.constexpr):
    """Codes of (row % 16, col % TILE_COLS) in the tiles at `tile_start`, as float32; all broadcast.

    Tiles start TILE_COLS inputs after each other.
    """
    vector = col % TILE_COLS // 4
    lane_byte = 4 * (row % 16) + col % 4
    if BITS != 3:
        planes: tl.constexpr = BITS * TILE_COLS // 32
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
def gather_weight(
    data, tile, row, col,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_COLS: tl.constexpr, GROUP_TILES: tl.constexpr,
):  # fmt: skip
    """Weights of (row % 16, col % TILE_COLS) in tiles number `tile` (as in `tile_places`).

    Of a symmetric matrix, over the row scale. `row` and `tile` broadcast against each other, and
    both against `col`.
    """
    tile_start, scales = tile_places(tile, BITS, SYMMETRIC, TILE_COLS, GROUP_TILES)
    code = gather_codes(data, tile_start, row, col, BITS, TILE_COLS)
    if SYMMETRIC:
        weight = (code - ((1 << BITS) - 1) * 0.5) * load_byte(data, scales + row % 16)
    else:
        scales += 2 * (row % 16)
        weight = code * load_half(data, scales) - load_half(data, scales + 32)
    return weight
