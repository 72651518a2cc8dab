"""Goal: groups of 32, 96, 128, 192 and more inputs are as right as groups of 64 in every CPU form.

Method: golden bytes and a packer by hand for the layout; every instruction set against the
reference on odd shapes, poisoned memory and odd addresses; whole MLPs whose matrices are in
different groups, with repairs in groups of 64. Triton's are in test_triton.py."""

from __future__ import annotations

import hashlib
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_matrices import (
    FORMS,
    FP32_TOLERANCE,
    INT8_MATMUL_TOLERANCE,
    INT8_MLP_TOLERANCE,
    TOKEN_COUNTS,
    at_odd_address,
    poisoned,
    random_factors,
    random_inputs,
    random_matrix,
    random_mlp,
    relative_rms,
    rounded_to_int8,
)

from kernels import cpu_native, ops, reference
from kernels.cpu_native import Isa
from kernels.ops import Backend
from kernels.packing import pack, pack_symmetric, unpack, unpack_symmetric
from kernels.types import (
    GatedMLP,
    Grid,
    MlpCall,
    QuantizedMatrix,
    group_bytes,
    matrix_bytes,
)

# Half tiles once and several times, whole tiles several times, one group a row.
SHAPES = (
    (37, 64, 32),
    (16, 192, 96),
    (21, 320, 160),
    (37, 512, 128),
    (16, 576, 192),
    (5, 256, 256),
)
GOLDEN_SHA256 = {
    (2, 32): "e6a7501e60520464feab949e0b84074ba589f36e95cf328db806ccae54cd0204",
    (3, 32): "98dc7a82cae9d62ee3dd6d8784abb7c3a43df8397ebc510bc55e1019922f3bc5",
    (4, 96): "38b90d0c5bb81899dad1b2fc99b1a2f64d3d467cf5cf7d8324b230d50065ce99",
    (2, 128): "f3eefcf739cadf06548f11d36bfdb6a76dd7da2e31bccb96b59aba6a4eb9e789",
    (3, 192): "bbf9a3fe9d2a4d8fbf6dfbdcb74b7488b7ad2448a0a61ac0784e6830684612c4",
}

every_shape = pytest.mark.parametrize(("rows", "cols", "group_size"), SHAPES)
every_form = pytest.mark.parametrize(("grid", "bits"), FORMS)
needs_native = pytest.mark.skipif(
    not cpu_native.is_available(), reason="the native kernels were not built here"
)
ISAS = get_args(Isa)
if cpu_native.is_available():
    ISAS = ISAS[: ISAS.index(cpu_native.best_isa()) + 1]
every_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.mark.parametrize(("bits", "group_size"), GOLDEN_SHA256)
def test_golden_bytes(bits: int, group_size: int) -> None:
    cols = 6 * group_size if group_size % 64 else 2 * group_size
    place = torch.arange(18 * cols).view(18, cols)
    codes = ((place * 7 + place // 5) % 2**bits).to(torch.uint8)
    groups = torch.arange(18 * (cols // group_size)).view(18, -1).float()
    data = pack(codes, 0.5 + groups / 64, groups / 4, bits, group_size=group_size).data
    assert data.numel() == 2 * (cols // group_size) * group_bytes(bits, "affine", group_size)
    found = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    assert found == GOLDEN_SHA256[bits, group_size]


def test_a_half_tile_by_hand() -> None:
    """Groups of 32 at 4 bits: vectors 0 to 3 in the low bits of four planes, 4 to 7 in the high."""
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    codes[:, 0:4] = torch.arange(16, dtype=torch.uint8)[:, None]  # vector 0 of the first group
    codes[:, 16:20] = 15 - torch.arange(16, dtype=torch.uint8)[:, None]  # its vector 4
    codes[:, 36:40] = 9  # vector 1 of the second group
    scale = torch.tensor([[1.0, 2.0]]).repeat(16, 1)
    data = pack(codes, scale, torch.full((16, 2), 3.0), 4, group_size=32).data
    first, second = data[:320], data[320:]
    assert first[:64].tolist() == [r | (15 - r) << 4 for r in range(16) for _ in range(4)]
    assert not first[64:256].any()
    assert first[256:].view(torch.float16).tolist() == [1.0] * 16 + [3.0] * 16
    assert second[64:128].tolist() == [9] * 64
    assert second[256:].view(torch.float16).tolist() == [2.0] * 16 + [6.0] * 16


@every_form
def test_a_large_group_is_tiles_with_their_scales_once(grid: Grid, bits: int) -> None:
    """The codes of a group of 128 are those of two groups of 64 without the scales between."""
    large = random_matrix(37, 256, bits, grid=grid, group_size=128)
    if grid == "symmetric":
        codes, scale8, row_scale = unpack_symmetric(large)
        small = pack_symmetric(codes, scale8.repeat_interleave(2, dim=1), row_scale, bits)
    else:
        codes, scale, zero_scaled = unpack(large)
        twice = [values.repeat_interleave(2, dim=1) for values in (scale, zero_scaled / scale)]
        small = pack(codes, *twice, bits)
    tiles = small.data[: 12 * group_bytes(bits, grid)].view(6, 2, -1)
    groups = large.data[: 6 * group_bytes(bits, grid, 128)].view(6, -1)
    code_bytes = 128 * bits
    assert torch.equal(groups[:, : 2 * code_bytes], tiles[:, :, :code_bytes].flatten(1))
    assert torch.equal(groups[:, 2 * code_bytes :], tiles[:, 0, code_bytes:])
    assert large.data.numel() < small.data.numel()
    assert torch.equal(reference.dequantize(large), reference.dequantize(small))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    size=st.integers(1, 9).map(lambda steps: 32 * steps),
    bits=st.sampled_from([2, 3, 4]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(rows: int, groups: int, size: int, bits: int, seed: int) -> None:
    """What was packed comes out, and the weight is the formula of the stored numbers."""
    groups *= 2  # cols are a multiple of 64
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups * size), dtype=torch.uint8, generator=generator)
    scale = torch.rand(rows, groups, generator=generator) + 0.5
    zero = torch.randn(rows, groups, generator=generator)
    matrix = pack(codes, scale, zero, bits, group_size=size)
    assert matrix.data.numel() == matrix_bytes(rows, groups * size, bits, "affine", size)
    got_codes, got_scale, got_zero_scaled = unpack(matrix)
    assert torch.equal(got_codes, codes)
    assert torch.equal(got_scale, scale.half().float())
    assert torch.equal(got_zero_scaled, (zero * scale).half().float())
    by_hand = codes * got_scale.repeat_interleave(size, 1)
    by_hand -= got_zero_scaled.repeat_interleave(size, 1)
    assert torch.equal(reference.dequantize(matrix), by_hand)
    scale8 = torch.randint(0, 256, (rows, groups), dtype=torch.uint8, generator=generator)
    row_scale = torch.randn(rows, generator=generator)
    got = unpack_symmetric(pack_symmetric(codes, scale8, row_scale, bits, group_size=size))
    assert all(map(torch.equal, got, (codes, scale8, row_scale.half().float())))


@needs_native
@every_isa
@every_form
@every_shape
def test_native_products(
    isa: Isa, grid: Grid, bits: int, rows: int, cols: int, group_size: int
) -> None:
    matrix = at_odd_address(random_matrix(rows, cols, bits, grid=grid, group_size=group_size))
    weight = cpu_native.dequantize(matrix, isa=isa, out=poisoned(rows, cols))
    assert torch.equal(weight, reference.dequantize(matrix))
    for num_tokens in TOKEN_COUNTS:
        x, out = random_inputs(num_tokens, cols, seed=num_tokens), poisoned(num_tokens, rows)
        cpu_native.matmul(matrix, x, isa=isa, out=out)
        exact = reference.matmul(matrix, rounded_to_int8(x))
        assert relative_rms(out, exact) < FP32_TOLERANCE, num_tokens
        expected = reference.matmul(matrix, x)
        assert relative_rms(out, expected) < INT8_MATMUL_TOLERANCE, num_tokens
        cpu_native.matmul_fp32(matrix, x, isa=isa, out=out.fill_(float("nan")))
        assert relative_rms(out, expected) < FP32_TOLERANCE, num_tokens


@needs_native
@every_isa
@every_form
@pytest.mark.parametrize("group_size", [32, 128])
def test_a_token_is_the_same_alone_and_in_any_batch(
    isa: Isa, grid: Grid, bits: int, group_size: int
) -> None:
    matrix = random_matrix(37, 384, bits, grid=grid, group_size=group_size)
    x = random_inputs(70, 384)
    matmul = cpu_native.matmul(matrix, x, isa=isa)
    matmul_fp32 = cpu_native.matmul_fp32(matrix, x, isa=isa)
    for first, last in ((0, 1), (69, 70), (3, 5), (31, 34), (40, 48), (1, 70)):
        part = slice(first, last)
        assert torch.equal(cpu_native.matmul(matrix, x[part], isa=isa), matmul[part])
        assert torch.equal(cpu_native.matmul_fp32(matrix, x[part], isa=isa), matmul_fp32[part])


@needs_native
@every_isa
@pytest.mark.parametrize("group_size", [32, 192])
def test_the_largest_codes_inputs_and_scales_do_not_overflow(isa: Isa, group_size: int) -> None:
    """Sums of products at their limits: every code and every input the largest of its kind."""
    groups = 192 // group_size
    for grid, bits in FORMS:
        codes = torch.full((16, 192), 2**bits - 1, dtype=torch.uint8)
        if grid == "symmetric":
            full = torch.full((16, groups), 255, dtype=torch.uint8)
            row_scale = torch.full((16,), 60000.0)
            matrix = pack_symmetric(codes, full, row_scale, bits, group_size=group_size)
        else:
            scale = torch.full((16, groups), 60000.0)
            matrix = pack(codes, scale, torch.zeros(16, groups), bits, group_size=group_size)
        for sign in (1.0, -1.0):
            x = torch.full((3, 192), 1e4 * sign)
            exact = reference.matmul(matrix, x)
            for product in (cpu_native.matmul, cpu_native.matmul_fp32):
                assert relative_rms(product(matrix, x, isa=isa), exact) < FP32_TOLERANCE


def mixed_mlp(grid: Grid) -> GatedMLP:
    """Matrices in groups of 96, 64 and 128."""
    return GatedMLP(
        random_matrix(256, 192, 2, 1, grid, 96),
        random_matrix(256, 192, 3, 2, grid),
        random_matrix(192, 256, 4, 3, grid, 128),
        "silu",
    )


@pytest.mark.parametrize("grid", get_args(Grid))
@pytest.mark.parametrize(
    ("backend", "tolerance"), [("cpu_fp32", 1e-5), ("cpu_int8", INT8_MLP_TOLERANCE)]
)
@pytest.mark.parametrize("num_tokens", [1, 6, 70])
def test_an_mlp_in_mixed_groups_with_its_repair(
    backend: Backend, tolerance: float, grid: Grid, num_tokens: int
) -> None:
    mlp, x = mixed_mlp(grid), random_inputs(num_tokens, 192)
    repair = random_factors(192, 256, 3, 2, grid, num_planes=1)
    restored = torch.arange(num_tokens) % 2 == 0
    expected = reference.gated_mlp(x, mlp, repair, restored)
    call = MlpCall(x, mlp, repair, restored)
    (got,) = ops.gated_mlp_many([call], backend=backend, num_threads=2)
    assert relative_rms(got, expected) < tolerance


@needs_native
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_smaller_groups_cost_what_their_scales_weigh(group_size: int) -> None:
    """A group of 32 at 2 bits has 3 bits a weight, of 64 2.5, of 128 2.25, on an affine grid."""
    mlp = random_mlp(256, 512, 2, group_size=group_size)
    assert 8 * mlp.gate.data.numel() / (256 * 512) == 2 + 32 / group_size


@pytest.mark.parametrize(
    ("group_size", "cols", "message"),
    [
        (48, 192, "group_size: got 48, expected a multiple of 32 up to 4096"),
        (0, 192, "group_size: got 0"),
        (-32, 192, "group_size: got -32"),
        (8192, 8192, "group_size: got 8192"),
        (128, 192, "cols: got 192, groups of 128 need a multiple of 128"),
        (32, 96, "cols: got 96, groups of 32 need a multiple of 64"),
        (96, 96, "cols: got 96, groups of 96 need a multiple of 192"),
    ],
)
def test_groups_that_the_layout_does_not_have_are_refused(
    group_size: int, cols: int, message: str
) -> None:
    data = torch.zeros(matrix_bytes(16, 192, 2), dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        QuantizedMatrix(data, 16, cols, 2, group_size)
    codes = torch.zeros(16, cols, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        pack(codes, torch.ones(16, 1), torch.ones(16, 1), 2, group_size=group_size)


def test_bfloat16_has_no_groups() -> None:
    with pytest.raises(ValueError, match="group_size: got 128, but bfloat16 has no groups"):
        QuantizedMatrix(torch.zeros(4 * 128 * 2, dtype=torch.uint8), 4, 128, 16, 128)
