"""Goal: the bytes of a tile are what the layout says, for good. Method: golden bytes of one small
matrix, a bit-by-bit packer as an oracle, a round-trip property, and refused inputs."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.packing import (
    bf16_weight,
    pack,
    pack_bf16,
    pack_symmetric,
    unpack,
    unpack_symmetric,
)
from kernels.types import (
    GatedRepair,
    LowRank,
    QuantizedMatrix,
    block_bytes,
    group_bytes,
    left_offset,
    matrix_bytes,
    padded_rows,
)

GOLDEN_SHA256 = {
    2: "13dafa376dfadd6751eecb526732ad582dee67c6aa417666f8216e7fc46c7123",
    3: "259eb85590382a5c5a1574b166cc27017f5efc6b4cdf6e7bb629537a6c7d37d8",
    4: "3ea7798735cc5459056516098a82f1fa5c0127ea140be9615ef62ed8438b9659",
}


def golden_codes(bits: int) -> torch.Tensor:
    place = torch.arange(18 * 128).view(18, 128)
    return ((place * 7 + place // 5) % 2**bits).to(torch.uint8)


def golden_matrix(bits: int) -> QuantizedMatrix:
    groups = torch.arange(18 * 2).view(18, 2).float()
    return pack(golden_codes(bits), 0.5 + groups / 8, groups / 4, bits)


def golden_symmetric(bits: int) -> QuantizedMatrix:
    scale8 = (torch.arange(18 * 2).view(18, 2) * 7 + 3).to(torch.uint8)
    return pack_symmetric(golden_codes(bits), scale8, 0.5 + torch.arange(18) / 8, bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_golden_bytes(bits: int) -> None:
    data = golden_matrix(bits).data
    assert data.numel() == 2 * 2 * group_bytes(bits)
    assert hashlib.sha256(data.numpy().tobytes()).hexdigest() == GOLDEN_SHA256[bits]


GOLDEN_SYMMETRIC_SHA256 = {
    1: "6d99ab1fb036fc1d0eb2306e7c7fb0e9ba3fe1945a10a7a07abf8323508019dd",
    2: "285e82da0d843a055f5d946f57b5e37066c5c792c0fbb4db43fb1f6d4729182a",
    3: "a4d14e8b2af82ed048eb0a0487d0434a0167a9227028ca189fc0bd95734434ae",
    4: "102bd428ef9a78a6de32ff92ae90a7555f1a70b79641adf18f263854dba972f4",
}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_golden_bytes_of_the_symmetric_form(bits: int) -> None:
    data = golden_symmetric(bits).data
    assert data.numel() == 2 * 2 * (bits * 128 + 16) + 2 * 32
    assert hashlib.sha256(data.numpy().tobytes()).hexdigest() == GOLDEN_SYMMETRIC_SHA256[bits]


def test_a_symmetric_tile_of_one_bit_by_hand() -> None:
    """Plane p holds vectors p, p+2, ..., p+14 in bits 0..7; scales and row scales follow."""
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    codes[5, 4 * 6 + 1] = 1  # vector 6: plane 0, bit 3
    codes[5, 4 * 15 + 2] = 1  # vector 15: plane 1, bit 7
    scale8 = torch.arange(16, dtype=torch.uint8)[:, None] + 200
    row_scale = torch.arange(16) / 4 + 1
    data = pack_symmetric(codes, scale8, row_scale, 1).data.tolist()
    expected = [0] * 128
    expected[4 * 5 + 1], expected[64 + 4 * 5 + 2] = 1 << 3, 1 << 7
    assert data[:128] == expected
    assert data[128:144] == list(range(200, 216))
    assert data[144:] == row_scale.half().view(torch.uint8).tolist()


def test_first_bytes_of_a_tile_by_hand() -> None:
    """Row r of a 4-bit tile holds r in inputs 0..3 (vector 0), 15 - r in 32..35 (vector 8)."""
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    codes[:, 0:4] = torch.arange(16, dtype=torch.uint8)[:, None]
    codes[:, 32:36] = 15 - torch.arange(16, dtype=torch.uint8)[:, None]
    data = pack(codes, torch.ones(16, 1), torch.full((16, 1), 2.0), 4).data
    expected = [r | (15 - r) << 4 for r in range(16) for _ in range(4)]
    assert data[:64].tolist() == expected
    assert not data[64:512].any()
    assert data[512:].view(torch.float16).tolist() == [1.0] * 16 + [2.0] * 16


def slow_pack(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> list[int]:
    """Bit by bit, as the layout's prototype did it: the oracle."""
    rows, cols = codes.shape
    out: list[int] = []
    for block in range(padded_rows(rows) // 16):
        for group in range(cols // 64):
            tile = [0] * (bits * 128)
            for r in range(16):
                for i in range(64):
                    row = block * 16 + r
                    code = int(codes[row, group * 64 + i]) if row < rows else 0
                    put(tile, bits, i // 4, 4 * r + i % 4, code)
            halves = torch.zeros(2, 16, dtype=torch.float16)
            for r in range(min(16, rows - block * 16)):
                s, z = scale[block * 16 + r, group], zero[block * 16 + r, group]
                halves[0, r], halves[1, r] = s, z * s
            out += tile + halves.view(torch.uint8).flatten().tolist()
    return out


def put(tile: list[int], bits: int, vector: int, byte: int, code: int) -> None:
    if bits == 4:
        tile[vector % 8 * 64 + byte] |= code << (4 * (vector // 8))
    elif bits == 2:
        tile[vector % 4 * 64 + byte] |= code << (2 * (vector // 4))
    elif bits == 1:
        tile[vector % 2 * 64 + byte] |= code << (vector // 2)
    else:
        half, place = vector // 8 * 192, vector % 8
        if place < 6:
            tile[half + place % 3 * 64 + byte] |= code << (3 * (place // 3))
            return
        for bit in range(3):
            at = (place - 6) * 3 + bit
            tile[half + at // 2 * 64 + byte] |= (code >> bit & 1) << (6 + at % 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_agrees_with_a_bit_by_bit_packer(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (19, 128), dtype=torch.uint8, generator=generator)
    scale = torch.rand(19, 2, generator=generator)
    zero = torch.rand(19, 2, generator=generator) * 3
    assert pack(codes, scale, zero, bits).data.tolist() == slow_pack(codes, scale, zero, bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_symmetric_tiles_hold_the_codes_of_affine_ones(bits: int) -> None:
    """The bit-by-bit packer's codes, then scales: one code layout for both grids."""
    codes = torch.randint(0, 2**bits, (19, 128), dtype=torch.uint8)
    scale8 = torch.randint(0, 256, (19, 2), dtype=torch.uint8)
    data = pack_symmetric(codes, scale8, torch.rand(19), bits).data.tolist()
    slow = slow_pack(codes, torch.zeros(19, 2), torch.zeros(19, 2), bits)
    for tile in range(4):
        start, other = tile * (bits * 128 + 16), tile * (bits * 128 + 64)
        assert data[start : start + bits * 128] == slow[other : other + bits * 128]
        block, group = divmod(tile, 2)
        rows = scale8[16 * block : 16 * block + 16, group].tolist()
        end = start + bits * 128
        assert data[end : end + 16] == rows + [0] * (16 - len(rows))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 50),
    groups=st.integers(1, 5),
    bits=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 2**31),
)
def test_symmetric_round_trip_and_formula(rows: int, groups: int, bits: int, seed: int) -> None:
    """What was packed comes out, and the weight is the formula of the stored numbers."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups * 64), dtype=torch.uint8, generator=generator)
    scale8 = torch.randint(0, 256, (rows, groups), dtype=torch.uint8, generator=generator)
    row_scale = torch.randn(rows, generator=generator)
    matrix = pack_symmetric(codes, scale8, row_scale, bits)
    assert matrix.data.numel() == matrix_bytes(rows, groups * 64, bits, "symmetric")
    got = unpack_symmetric(matrix)
    stored_scale = row_scale.half().float()
    assert all(map(torch.equal, got, (codes, scale8, stored_scale)))
    middle = (2**bits - 1) / 2
    by_hand = (stored_scale[:, None] * (scale8 / 255)).double().repeat_interleave(64, dim=1)
    by_hand *= codes.double() - middle
    assert torch.allclose(reference.dequantize(matrix).double(), by_hand, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 50),
    groups=st.integers(1, 5),
    bits=st.sampled_from([2, 3, 4]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(rows: int, groups: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups * 64), dtype=torch.uint8, generator=generator)
    scale = torch.randn(rows, groups, generator=generator)
    zero = torch.randn(rows, groups, generator=generator) * 5
    matrix = pack(codes, scale, zero, bits)
    assert matrix.data.numel() == matrix_bytes(rows, groups * 64, bits)
    got_codes, got_scale, got_zero_scaled = unpack(matrix)
    assert torch.equal(got_codes, codes)
    assert torch.equal(got_scale, scale.half().float())
    assert torch.equal(got_zero_scaled, (zero * scale).half().float())


def test_padding_rows_are_zero() -> None:
    codes = torch.full((1, 64), 3, dtype=torch.uint8)
    matrix = pack(codes, torch.ones(1, 1), torch.ones(1, 1), 2)
    whole = QuantizedMatrix(matrix.data, 16, 64, 2)
    got_codes, scale, zero_scaled = unpack(whole)
    assert not got_codes[1:].any()
    assert not scale[1:].any()
    assert not zero_scaled[1:].any()


def test_symmetric_padding_rows_are_zero() -> None:
    codes, full = torch.full((1, 64), 3, dtype=torch.uint8), torch.full((1, 1), 255).byte()
    matrix = pack_symmetric(codes, full, torch.ones(1), 2)
    got_codes, scale8, row_scale = unpack_symmetric(replace(matrix, rows=16))
    assert not got_codes[1:].any()
    assert not scale8[1:].any()
    assert not row_scale[1:].any()


def test_bf16_round_trip_at_any_address() -> None:
    weight = torch.randn(5, 7)
    matrix = pack_bf16(weight)
    assert torch.equal(bf16_weight(matrix), weight.to(torch.bfloat16))
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), matrix.data))[1:]
    assert torch.equal(bf16_weight(QuantizedMatrix(shifted, 5, 7, 16)), weight.to(torch.bfloat16))


CODES, SCALE = torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 1)


@pytest.mark.parametrize(
    ("codes", "scale", "zero", "bits", "message"),
    [
        (CODES, SCALE, SCALE, 5, "bits: got 5"),
        (CODES, SCALE, SCALE, 1, "bits: got 1"),
        (CODES, SCALE, SCALE, 16, "pack_bf16"),
        (CODES.int(), SCALE, SCALE, 2, "uint8"),
        (CODES[0], SCALE, SCALE, 2, "codes"),
        (CODES[:, :48], SCALE, SCALE, 2, "multiple of 64"),
        (CODES[:0], SCALE[:0], SCALE[:0], 2, "at least one row"),
        (CODES, SCALE[:4], SCALE, 2, "scale: expected"),
        (CODES, SCALE, SCALE.int(), 2, "zero: expected"),
        (CODES + 4, SCALE, SCALE, 2, "largest is 4"),
        (CODES, SCALE * 1e6, SCALE, 2, "scale: largest magnitude"),
        (CODES, SCALE, SCALE * 1e6, 2, r"zero \* scale: largest"),
        (CODES, SCALE * float("nan"), SCALE, 2, "nan"),
    ],
)
def test_bad_input_is_refused(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack(codes, scale, zero, bits)


def test_unpacking_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="bits"):
        unpack(pack_bf16(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="bits"):
        bf16_weight(golden_matrix(2))
    with pytest.raises(ValueError, match="weight"):
        pack_bf16(torch.ones(2))
    with pytest.raises(ValueError, match="grid: got 'affine'"):
        unpack_symmetric(golden_matrix(2))


SCALE8, ROW_SCALE = torch.full((16, 1), 9, dtype=torch.uint8), torch.ones(16)


@pytest.mark.parametrize(
    ("codes", "scale8", "row_scale", "bits", "message"),
    [
        (CODES, SCALE8, ROW_SCALE, 5, "bits: got 5"),
        (CODES, SCALE8, ROW_SCALE, 16, "bits: got 16"),
        (CODES.int(), SCALE8, ROW_SCALE, 2, "uint8"),
        (CODES[:, :48], SCALE8, ROW_SCALE, 2, "multiple of 64"),
        (CODES, SCALE8.int(), ROW_SCALE, 2, "scale8: expected uint8"),
        (CODES, SCALE8[:4], ROW_SCALE, 2, "scale8: expected uint8"),
        (CODES, SCALE8, ROW_SCALE[:4], 2, "row_scale: expected float"),
        (CODES, SCALE8, ROW_SCALE.int(), 2, "row_scale: expected float"),
        (CODES + 2, SCALE8, ROW_SCALE, 1, "largest is 2"),
        (CODES, SCALE8, ROW_SCALE * 1e6, 2, "row_scale: largest magnitude"),
        (CODES, SCALE8, ROW_SCALE * float("nan"), 2, "nan"),
    ],
)
def test_bad_symmetric_input_is_refused(
    codes: torch.Tensor, scale8: torch.Tensor, row_scale: torch.Tensor, bits: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack_symmetric(codes, scale8, row_scale, bits)


def test_sizes_of_the_forms() -> None:
    """Bits per weight of a big matrix, and rank blocks on whole cache lines."""
    weights = 4096 * 4096
    assert [8 * matrix_bytes(4096, 4096, b) / weights for b in (2, 3, 4)] == [2.5, 3.5, 4.5]
    per_weight = [8 * matrix_bytes(4096, 4096, b, "symmetric") / weights for b in (1, 2, 3, 4)]
    row_scales = 16 / 4096
    assert per_weight == [bits + 0.125 + row_scales for bits in (1, 2, 3, 4)]
    for bits in (1, 2, 3, 4):
        right = matrix_bytes(16, 192, bits, "symmetric")
        left = matrix_bytes(16, 128, bits, "symmetric")
        start, size = left_offset(192, bits, "symmetric"), block_bytes(128, 192, bits, "symmetric")
        assert start % 64 == size % 64 == 0
        assert right <= start < right + 64
        assert start + left <= size < start + left + 64
    assert block_bytes(128, 192, 3) == matrix_bytes(16, 192, 3) + matrix_bytes(16, 128, 3)


PLANE = pack_symmetric(CODES.new_zeros(64, 64), SCALE8.new_ones(64, 1), torch.ones(64), 1)
NOTHING = LowRank(PLANE.data, (), 64, 64, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(PLANE, grid="affine"), "bits: got 1, a grid 'affine' has one of"),
        (lambda: replace(PLANE, grid="log"), "grid: got 'log'"),
        (lambda: replace(PLANE, bits=16), "bits: got 16, a grid 'symmetric'"),
        (lambda: replace(PLANE, bits=2), "data: expected a flat uint8 tensor of 1216 bytes"),
        (lambda: replace(NOTHING, bits=1), "bits: got 1, a grid 'affine'"),
        (lambda: replace(NOTHING, bits=16), "bits: got 16"),
        (
            lambda: LowRank(PLANE.data[:383], (0,), 64, 64, 1, "symmetric"),
            "block of 384 bytes at 0 reaches past the 383 bytes",
        ),
        (
            lambda: GatedRepair(NOTHING, NOTHING, NOTHING, up_planes=(PLANE, golden_symmetric(1))),
            r"up_planes\[1\]: expected \[64, 64\] of 1 bit \(symmetric\), .* got \[18, 128\]",
        ),
        (
            lambda: GatedRepair(NOTHING, NOTHING, NOTHING, (wider_plane(),)),
            r"gate_planes\[0\]: .* got \[64, 64\] of 2",
        ),
    ],
)
def test_forms_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def wider_plane() -> QuantizedMatrix:
    return pack_symmetric(CODES.new_zeros(64, 64), SCALE8.new_ones(64, 1), torch.ones(64), 2)
