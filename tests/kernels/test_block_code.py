"""Goal: the block code never breaks its error bound, the native decoder gives the same bits as
torch, and damaged bytes are refused. Method: property tests over nasty weights; native code on each
instruction set against torch; bytes cut, flipped and contradicted; a golden code. Triton's decoder
is in test_triton_block_code.py."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from block_codes import bound_of, code_of, nasty
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_matrices import at_odd_address, random_inputs, relative_rms

from kernels import ops, steps, types
from kernels.block_code import (
    HEADER,
    PLANES,
    BlockCodedMatrix,
    block_sections,
    check_block_code,
    decode_block_code,
)
from kernels.block_encode import encode_block_code
from kernels.types import GatedMLP, MlpCall

needs_native = pytest.mark.skipif(ops.native_isa() is None, reason="no compiler at install time")
every_form = pytest.mark.parametrize("differenced", [False, True])
every_mode = pytest.mark.parametrize("grouped", [False, True])


def share_of_bound(weight: torch.Tensor, decoded: torch.Tensor, bound: torch.Tensor) -> float:
    error = (decoded.double() - weight.double()).abs().view(*bound.shape, -1).amax(-1)
    return float((error / bound).max())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 3),
    relative=st.sampled_from([1e-4, 0.01, 0.1, 0.5, 1.0, 3.0]),
    exponent=st.integers(-140, 120),
    power=st.sampled_from([1.0, 3.0, 9.0]),
    grouped=st.booleans(),
    differenced=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_bound_is_never_broken(
    rows: int,
    groups: int,
    relative: float,
    exponent: int,
    power: float,
    grouped: bool,
    differenced: bool,
    seed: int,
) -> None:
    """Scales down to denormal numbers: there the bound has a floor, as in `ErrorBound`."""
    weight = nasty(rows, 64 * groups, seed, power)
    weight = (weight / weight.abs().max().clamp(min=1e-30)).double() * 2.0**exponent
    weight = weight.float()
    bound = bound_of(weight, relative, grouped)
    coded = encode_block_code(weight, bound, differenced=differenced)
    assert share_of_bound(weight, decode_block_code(coded), bound) <= 1
    check_block_code(coded)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_any_floats_are_within_the_bound_or_refused(values: list[float]) -> None:
    weight = torch.tensor(values * 64)[: 64 * max(1, len(values) // 64)].view(1, -1)
    bound = torch.full((1, 1), 1e-3, dtype=torch.float64)
    if float(weight.abs().max()) > 1e-3 * 2**20:
        with pytest.raises(ValueError, match="too tight"):
            encode_block_code(weight, bound)
    else:
        coded = encode_block_code(weight, bound)
        assert share_of_bound(weight, decode_block_code(coded), bound) <= 1


def test_steps_are_rounded_down_and_only_a_little() -> None:
    """A group's step loses a sixteenth at most and the last row's range, too wide, costs more."""
    generator = torch.Generator().manual_seed(0)
    limit = torch.rand(200, 6, generator=generator, dtype=torch.float64) * 15 - 7
    limit = limit.exp2()
    row, factor = steps.round_steps(limit)
    share = steps.steps(row, factor).double() / limit
    assert float(share.max()) <= 1
    assert float(share.min()) > 16 / 17 * (1 - 1e-3)
    row, factor = steps.round_steps(limit[:, :1])
    assert factor is None
    assert float((row.double() / limit[:, 0]).min()) > 1 - 2 / steps.ROW_LEVELS
    wide = torch.tensor([[1e-6, 1.0, 1e6]], dtype=torch.float64)
    row, factor = steps.round_steps(wide)
    got = steps.steps(row, factor).double()
    assert bool((got <= wide).all())
    assert float(got[0, 2] / got[0, 0]) == 63488
    assert steps.GROUP_SIZE == types.GROUP_SIZE
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite limits"):
            steps.round_steps(torch.tensor([[wrong]], dtype=torch.float64))


def test_zeros_cost_no_payload() -> None:
    """A whole matrix, and a block in a matrix of others."""
    zeros = encode_block_code(torch.zeros(16, 128), torch.full((16, 1), 1e-3, dtype=torch.float64))
    assert zeros.data.numel() == block_sections(16, 128, 0).payload
    assert bool((decode_block_code(zeros) == 0).all())
    weight = torch.ones(8, 64)
    full = encode_block_code(weight, torch.full((8, 1), 0.5, dtype=torch.float64))
    weight[3, 32:] = 0
    less = encode_block_code(weight, torch.full((8, 1), 0.5, dtype=torch.float64))
    assert full.data.numel() - less.data.numel() == 8  # one plane, and 32 signs


def test_golden_bytes() -> None:
    """One row: 0, 1, -1, 2 steps of 1, then zeros: two planes, three signs, one block of zeros."""
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([0.0, 1.0, -1.0, 2.0])
    coded = encode_block_code(weight, torch.full((1, 1), 0.51, dtype=torch.float64))
    data = coded.data.numpy().tobytes()
    head = b"MTBC" + bytes([1, 0, 0, 0]) + (1).to_bytes(4, "little") + (64).to_bytes(4, "little")
    assert data[:16] == head
    assert data[16:32] == (3).to_bytes(8, "little") + bytes(8)
    assert 1.0 < torch.frombuffer(bytearray(data[32:36]), dtype=torch.float32).item() <= 1.02
    assert data[36:44] == bytes(4) + (2).to_bytes(4, "little")  # planes at word 0, signs at 2
    assert data[44:48] == bytes([2, 0, 0, 0])  # plane counts: 2 and 0
    assert data[48:] == bytes([0b0110, 0, 0, 0, 0b1000, 0, 0, 0, 0b010, 0, 0, 0])


@needs_native
@every_form
@every_mode
@pytest.mark.parametrize(
    ("rows", "cols", "relative"), [(1, 64, 0.5), (37, 192, 0.1), (9, 64, 1e-5)]
)
def test_native_gives_the_same_bits(
    rows: int, cols: int, relative: float, grouped: bool, differenced: bool
) -> None:
    from kernels import cpu_block_code, cpu_native

    coded = code_of(rows, cols, relative, grouped=grouped, differenced=differenced)
    expected = decode_block_code(coded)
    names = ("scalar", "avx2", "avx512vnni")
    for isa in names[: names.index(cpu_native.best_isa()) + 1]:
        out = torch.full((rows, cols), float("nan"))
        moved = replace(coded, data=at_odd_address(coded).data)
        got = cpu_block_code.decode_block_code(moved, num_threads=3, isa=isa, out=out)
        assert torch.equal(got, expected), isa
    assert torch.equal(ops.dequantize(coded), expected)
    with pytest.raises(ValueError, match="num_threads"):
        cpu_block_code.decode_block_code(coded, num_threads=0)


def test_damaged_headers_and_lengths_are_refused() -> None:
    coded = code_of(9, 64, 0.3)
    good = coded.data
    with pytest.raises(ValueError, match="a header alone has 32"):
        BlockCodedMatrix(good[:31], 9, 64)
    for cut in (32, 60, good.numel() - 1):
        with pytest.raises(ValueError, match="announces"):
            BlockCodedMatrix(good[:cut], 9, 64)
    with pytest.raises(ValueError, match=r"header says \[9, 64\]"):
        BlockCodedMatrix(good, 64, 64)
    for place in (0, 4, 5, 6, 24):
        data = good.clone()
        data[place] = 9
        with pytest.raises(ValueError, match="expected a header"):
            BlockCodedMatrix(data, 9, 64)
    huge = good.clone()
    huge[: HEADER.size] = torch.frombuffer(
        bytearray(HEADER.pack(b"MTBC", 1, 0, 0, 9, 64, 2**60, 0)), dtype=torch.uint8
    )
    with pytest.raises(ValueError, match="announces"):
        BlockCodedMatrix(huge, 9, 64)
    for shape in ((0, 64), (9, 63), (1 << 30, 64)):
        with pytest.raises(ValueError, match="shape"):
            BlockCodedMatrix(good, *shape)
    with pytest.raises(ValueError, match="flat uint8"):
        BlockCodedMatrix(good.view(1, -1), 9, 64)


@every_mode
def test_contradicting_tables_are_refused_by_every_decoder(grouped: bool) -> None:
    """Tables of ones, of zeros, a step that is no number."""
    coded = code_of(20, 128, 0.3, grouped=grouped)
    sections = block_sections(20, 128, 2 if grouped else 0)
    places = [(sections.chunk_starts, sections.plane_counts), (sections.plane_counts, None)]
    for start, end in places:
        end = end or sections.plane_counts + 40
        for octet in (0, 0xFF):
            data = coded.data.clone()
            data[start:end] = octet
            _refused(replace(coded, data=data))
    for step in (0.0, -1.0, float("nan"), float("inf")):
        data = coded.data.clone()
        data[32:36] = torch.tensor([step]).view(torch.uint8)
        _refused(replace(coded, data=data))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), differenced=st.booleans())
def test_flipped_bytes_never_crash(data: st.DataObject, differenced: bool) -> None:
    """Either decoder refuses, or gives a matrix of the right shape: both do the same."""
    coded = code_of(10, 64, 0.3, grouped=True, differenced=differenced)
    flipped = coded.data.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, flipped.numel() - 1))
        flipped[place] = data.draw(st.integers(0, 255))
    try:
        damaged = replace(coded, data=flipped)
        expected = decode_block_code(damaged)
    except ValueError:
        return
    assert expected.shape == (10, 64)
    assert torch.equal(ops.dequantize(damaged), expected)


def _refused(damaged: BlockCodedMatrix) -> None:
    with pytest.raises(ValueError, match="contradict|step"):
        decode_block_code(damaged)
    with pytest.raises(ValueError, match="contradict|step"):
        ops.dequantize(damaged)


def test_wrong_weights_and_bounds_are_refused() -> None:
    bound = torch.full((2, 1), 0.1, dtype=torch.float64)
    for value in (float("nan"), float("inf")):
        weight = torch.ones(2, 64)
        weight[1, 3] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            encode_block_code(weight, bound)
    with pytest.raises(ValueError, match="multiple of 64"):
        encode_block_code(torch.ones(2, 32), bound)
    with pytest.raises(ValueError, match="float"):
        encode_block_code(torch.ones(2, 64, dtype=torch.int32), bound)
    with pytest.raises(ValueError, match=r"expected \[2, 1\]"):
        encode_block_code(torch.ones(2, 128), bound.repeat(1, 3))
    with pytest.raises(ValueError, match="too tight"):
        encode_block_code(torch.full((2, 64), 1e6), bound)


def test_long_blocks_use_the_wide_plane_counts() -> None:
    """Values of 14 to 21 bits: the plane counts 18 and 24."""
    weight = torch.zeros(3, 64)
    weight[0, 5], weight[1, 5], weight[2, 40] = 2.0**14, 2.0**16, -(2.0**19)
    coded = encode_block_code(weight, torch.full((3, 1), 0.51, dtype=torch.float64))
    start = block_sections(3, 64, 0).plane_counts
    assert [PLANES[b] for b in (14, 15)] == [18, 24]
    assert coded.data[start : start + 3].tolist() == [14, 14, 0xF0]
    assert float((decode_block_code(coded) - weight).abs().max()) <= 0.51
    assert torch.equal(ops.dequantize(coded), decode_block_code(coded))


@pytest.mark.parametrize("backend", ["reference", "cpu_fp32", "cpu_int8", "triton"])
def test_every_backend_runs_a_coded_mlp(backend: ops.Backend) -> None:
    """Alone, together with a low-bit MLP, and without tokens."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed on this platform")
    matrices = []
    for rows, cols in ((128, 64), (128, 64), (64, 128)):
        weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) / cols**0.5
        matrices.append(encode_block_code(weight, bound_of(weight, 0.1, False)))
    mlp = GatedMLP(*matrices, "silu")
    x = random_inputs(3, 64)
    gate, up, down = (decode_block_code(matrix) for matrix in matrices)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert relative_rms(ops.gated_mlp(x, mlp, backend=backend), expected) < 1e-5
    (many,) = ops.gated_mlp_many([MlpCall(x, mlp)], backend=backend, num_threads=2)
    assert relative_rms(many, expected) < 1e-5
    assert ops.gated_mlp(x[:0], mlp, backend=backend).shape == (0, 64)
