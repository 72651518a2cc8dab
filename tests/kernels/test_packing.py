"""Goal: the bytes of a tile are what the layout says, for good. Method: golden bytes of one small
matrix, a bit-by-bit packer as an oracle, a round-trip property, and refused inputs."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.packing import bf16_weight, pack, pack_bf16, unpack
from kernels.types import QuantizedMatrix, matrix_bytes, padded_rows, tile_bytes

GOLDEN_SHA256 = {
    2: "13dafa376dfadd6751eecb526732ad582dee67c6aa417666f8216e7fc46c7123",
    3: "259eb85590382a5c5a1574b166cc27017f5efc6b4cdf6e7bb629537a6c7d37d8",
    4: "3ea7798735cc5459056516098a82f1fa5c0127ea140be9615ef62ed8438b9659",
}


def golden_matrix(bits: int) -> QuantizedMatrix:
    rows, cols = 18, 128
    place = torch.arange(rows * cols).view(rows, cols)
    codes = (place * 7 + place // 5) % 2**bits
    groups = torch.arange(rows * 2).view(rows, 2).float()
    return pack(codes.to(torch.uint8), 0.5 + groups / 8, groups / 4, bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_golden_bytes(bits: int) -> None:
    data = golden_matrix(bits).data
    assert data.numel() == 2 * 2 * tile_bytes(bits)
    assert hashlib.sha256(data.numpy().tobytes()).hexdigest() == GOLDEN_SHA256[bits]


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
