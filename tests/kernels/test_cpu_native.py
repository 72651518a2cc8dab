"""Goal: the native kernels agree with the reference on every instruction set this machine has, and
a token's result never depends on its batch. Method: odd shapes, both grids, all widths, ranks and
token counts, output memory full of NaN, packed bytes at odd addresses, refused inputs."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from kernel_matrices import (
    FORMS,
    FP32_TOLERANCE,
    INT8_MATMUL_TOLERANCE,
    INT8_MLP_TOLERANCE,
    TOKEN_COUNTS,
    at_odd_address,
    poisoned,
    random_inputs,
    random_low_rank,
    random_matrix,
    random_mlp,
    relative_rms,
    rounded_to_int8,
)

from kernels import cpu_native, cpu_records, reference
from kernels.cpu_native import Isa, Numbers
from kernels.packing import pack, pack_symmetric
from kernels.types import Activation, GatedMLP, Grid, LowRank, MlpCall, QuantizedMatrix

if not cpu_native.is_available():
    pytest.skip("the native kernels were not built here", allow_module_level=True)

ISAS = get_args(Isa)[: get_args(Isa).index(cpu_native.best_isa()) + 1]
# Rows that are no multiple of 16, one group, seven groups, several items of four row blocks.
SHAPES = ((1, 64), (37, 448), (160, 128))

every_isa = pytest.mark.parametrize("isa", ISAS)
every_form = pytest.mark.parametrize(("grid", "bits"), FORMS)


@every_isa
@every_form
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_dequantize_is_the_reference_to_the_bit(
    isa: Isa, grid: Grid, bits: int, rows: int, cols: int
) -> None:
    matrix = at_odd_address(random_matrix(rows, cols, bits, grid=grid))
    out = poisoned(rows, cols)
    got = cpu_native.dequantize(matrix, isa=isa, num_threads=2, out=out)
    assert got is out
    assert torch.equal(got, reference.dequantize(matrix))


@every_isa
@every_form
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_matmul(isa: Isa, grid: Grid, bits: int, rows: int, cols: int) -> None:
    matrix = at_odd_address(random_matrix(rows, cols, bits, grid=grid))
    for num_tokens in TOKEN_COUNTS:
        x = random_inputs(num_tokens, cols, seed=num_tokens)
        out = poisoned(num_tokens, rows)
        cpu_native.matmul(matrix, x, isa=isa, out=out)
        exact = reference.matmul(matrix, rounded_to_int8(x))
        assert relative_rms(out, exact) < FP32_TOLERANCE, num_tokens
        # A single number may be small by cancellation, so that its relative error says nothing.
        if rows > 1:
            expected = reference.matmul(matrix, x)
            assert relative_rms(out, expected) < INT8_MATMUL_TOLERANCE, num_tokens


@every_isa
@every_form
@pytest.mark.parametrize("num_blocks", [0, 1, 2, 8])
def test_low_rank_matmul(isa: Isa, grid: Grid, bits: int, num_blocks: int) -> None:
    """From rank 0 to the largest, min(rows, cols) = 128; blocks out of order at odd addresses."""
    factors = random_low_rank(128, 192, bits, num_blocks, grid=grid)
    for num_tokens in TOKEN_COUNTS:
        x = random_inputs(num_tokens, 192, seed=num_tokens)
        out = poisoned(num_tokens, 128)
        cpu_native.low_rank_matmul(factors, x, isa=isa, num_threads=2, out=out)
        exact = reference.low_rank_matmul(factors, rounded_to_int8(x))
        assert relative_rms(out, exact) < FP32_TOLERANCE, num_tokens
        expected = reference.low_rank_matmul(factors, x)
        assert relative_rms(out, expected) < INT8_MATMUL_TOLERANCE, num_tokens


@every_isa
@every_form
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_matmul_fp32(isa: Isa, grid: Grid, bits: int, rows: int, cols: int) -> None:
    matrix = at_odd_address(random_matrix(rows, cols, bits, grid=grid))
    for num_tokens in TOKEN_COUNTS:
        x = random_inputs(num_tokens, cols, seed=num_tokens)
        out = poisoned(num_tokens, rows)
        cpu_native.matmul_fp32(matrix, x, isa=isa, num_threads=2, out=out)
        # A single number may be small by cancellation: judge it by the inputs' size.
        expected = reference.matmul(matrix, x)
        error = float((out - expected).norm())
        size = float(
            expected.norm() if rows > 1 else x.norm() * reference.dequantize(matrix).norm()
        )
        assert error <= FP32_TOLERANCE * size, num_tokens


@every_isa
@every_form
@pytest.mark.parametrize("num_blocks", [0, 1, 8])
def test_low_rank_matmul_fp32(isa: Isa, grid: Grid, bits: int, num_blocks: int) -> None:
    factors = random_low_rank(128, 192, bits, num_blocks, grid=grid)
    for num_tokens in TOKEN_COUNTS:
        x = random_inputs(num_tokens, 192, seed=num_tokens)
        out = poisoned(num_tokens, 128)
        cpu_native.low_rank_matmul_fp32(factors, x, isa=isa, num_threads=2, out=out)
        expected = reference.low_rank_matmul(factors, x)
        assert relative_rms(out, expected) < FP32_TOLERANCE, num_tokens


@every_isa
@every_form
@pytest.mark.parametrize("biases", [False, True])
def test_gated_mlp(isa: Isa, grid: Grid, bits: int, biases: bool) -> None:
    mlp = random_mlp(128, 192, bits, biases=biases, grid=grid)
    for num_tokens in TOKEN_COUNTS:
        x = random_inputs(num_tokens, 128, seed=num_tokens)
        out = poisoned(num_tokens, 128)
        cpu_native.gated_mlp_many([MlpCall(x, mlp)], isa=isa, outs=[out])
        assert relative_rms(out, reference.gated_mlp(x, mlp)) < INT8_MLP_TOLERANCE, num_tokens


@every_isa
@pytest.mark.parametrize(
    ("numbers", "tolerance"), [("int8", INT8_MLP_TOLERANCE), ("fp32", FP32_TOLERANCE)]
)
@pytest.mark.parametrize("activation", get_args(Activation))
def test_every_activation(
    isa: Isa, activation: Activation, numbers: Numbers, tolerance: float
) -> None:
    """Inputs large enough that sigmoids saturate and the clamped form clamps."""
    mlp = random_mlp(128, 128, 4, activation=activation, biases=True)
    x = random_inputs(9, 128) * 8
    (got,) = cpu_native.gated_mlp_many([MlpCall(x, mlp)], numbers=numbers, isa=isa)
    assert relative_rms(got, reference.gated_mlp(x, mlp)) < tolerance


@every_isa
def test_many_mlps_of_different_shapes_widths_and_token_counts(isa: Isa) -> None:
    """One call with two threads is to the bit what one call each would be."""
    inputs = [
        MlpCall(random_inputs(3, 128), random_mlp(128, 192, 2)),
        MlpCall(random_inputs(0, 64), random_mlp(64, 64, 3)),
        MlpCall(random_inputs(70, 64), random_mlp(64, 448, 4, activation="gelu", biases=True)),
        MlpCall(random_inputs(1, 192), random_mlp(192, 64, 3)),
        MlpCall(random_inputs(0, 64), random_mlp(64, 64, 3)),
    ]
    together = cpu_native.gated_mlp_many(inputs, isa=isa, num_threads=2)
    for got, call in zip(together, inputs, strict=True):
        assert torch.equal(got, cpu_native.gated_mlp_many([call], isa=isa)[0])
    assert cpu_native.gated_mlp_many([], isa=isa) == []


@every_isa
def test_matrices_of_one_mlp_may_differ_in_width_and_grid(isa: Isa) -> None:
    mlp = GatedMLP(
        random_matrix(128, 64, 2, grid="symmetric"),
        random_matrix(128, 64, 3),
        random_matrix(64, 128, 4, grid="symmetric"),
        "silu",
    )
    x = random_inputs(5, 64)
    (got,) = cpu_native.gated_mlp_many([MlpCall(x, mlp)], isa=isa)
    assert relative_rms(got, reference.gated_mlp(x, mlp)) < INT8_MLP_TOLERANCE


@every_isa
def test_the_largest_codes_inputs_and_scales_do_not_overflow(isa: Isa) -> None:
    """Sums of products at their limits: every code and every input the largest of its kind."""
    for grid, bits in FORMS:
        codes = torch.full((16, 128), 2**bits - 1, dtype=torch.uint8)
        if grid == "symmetric":
            full = torch.full((16, 2), 255, dtype=torch.uint8)
            matrix = pack_symmetric(codes, full, torch.full((16,), 60000.0), bits)
        else:
            matrix = pack(codes, torch.full((16, 2), 60000.0), torch.zeros(16, 2), bits)
        for sign in (1.0, -1.0):
            x = torch.full((3, 128), 1e4 * sign)
            got = cpu_native.matmul(matrix, x, isa=isa)
            exact = reference.matmul(matrix, x)
            assert relative_rms(got, exact) < FP32_TOLERANCE, (grid, bits)
            got = cpu_native.matmul_fp32(matrix, x, isa=isa)
            assert relative_rms(got, exact) < FP32_TOLERANCE, (grid, bits)


@every_isa
@every_form
def test_a_token_is_the_same_alone_and_in_any_batch(isa: Isa, grid: Grid, bits: int) -> None:
    matrix = random_matrix(37, 448, bits, grid=grid)
    factors = random_low_rank(64, 448, bits, 3, grid=grid)
    mlp = random_mlp(128, 192, bits, activation="gelu_tanh", biases=True, grid=grid)
    x, x_mlp = random_inputs(70, 448), random_inputs(70, 128)
    matmul = cpu_native.matmul(matrix, x, isa=isa)
    low_rank = cpu_native.low_rank_matmul(factors, x, isa=isa)
    matmul_fp32 = cpu_native.matmul_fp32(matrix, x, isa=isa)
    low_rank_fp32 = cpu_native.low_rank_matmul_fp32(factors, x, isa=isa)
    (gated,) = cpu_native.gated_mlp_many([MlpCall(x_mlp, mlp)], isa=isa, num_threads=2)
    for first, last in ((0, 1), (69, 70), (3, 5), (31, 34), (40, 48), (1, 70)):
        part = slice(first, last)
        assert torch.equal(cpu_native.matmul(matrix, x[part], isa=isa), matmul[part])
        assert torch.equal(cpu_native.low_rank_matmul(factors, x[part], isa=isa), low_rank[part])
        assert torch.equal(cpu_native.matmul_fp32(matrix, x[part], isa=isa), matmul_fp32[part])
        alone = cpu_native.low_rank_matmul_fp32(factors, x[part], isa=isa)
        assert torch.equal(alone, low_rank_fp32[part])
        (alone,) = cpu_native.gated_mlp_many([MlpCall(x_mlp[part], mlp)], isa=isa)
        assert torch.equal(alone, gated[part])


@every_isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_activation_spoils_its_own_token_only_and_visibly(isa: Isa, bad: float) -> None:
    matrix, x = random_matrix(16, 128, 2), random_inputs(3, 128)
    clean = cpu_native.matmul(matrix, x, isa=isa)
    x[1, 77] = bad
    got = cpu_native.matmul(matrix, x, isa=isa)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@every_isa
def test_extreme_magnitudes(isa: Isa) -> None:
    """Zeros give zero, tiny and huge inputs stay finite; a group's scale is its own."""
    matrix = random_matrix(16, 192, 4)
    x = torch.zeros(3, 192)
    x[1] = 1e-42
    x[2, :64], x[2, 64:] = 1e30, 1e-30
    got = cpu_native.matmul(matrix, x, isa=isa)
    assert not got[0].any()
    assert torch.isfinite(got).all()
    assert relative_rms(got[2], reference.matmul(matrix, x)[2]) < INT8_MATMUL_TOLERANCE


def test_inputs_of_other_dtypes_and_strides() -> None:
    matrix, x = random_matrix(16, 128, 3), random_inputs(4, 128)
    expected = cpu_native.matmul(matrix, x)
    assert torch.equal(cpu_native.matmul(matrix, x.T.contiguous().T), expected)
    half = x.to(torch.bfloat16)
    assert torch.equal(cpu_native.matmul(matrix, half), cpu_native.matmul(matrix, half.float()))


def test_more_threads_than_items_or_cores() -> None:
    matrix, x = random_matrix(16, 128, 3), random_inputs(4, 128)
    expected = cpu_native.matmul(matrix, x)
    assert torch.equal(cpu_native.matmul(matrix, x, num_threads=64), expected)


def affinities() -> dict[int, set[int]]:
    """The cores each thread of this process may use."""
    tasks = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    return {task: os.sched_getaffinity(task) for task in tasks}


PINNED = textwrap.dedent("""
    import os, sys
    sys.path[:0] = sys.argv[1:]
    import torch
    from kernel_matrices import random_inputs, random_matrix
    from test_cpu_native import affinities
    from kernels import cpu_native

    matrix, x = random_matrix(1024, 256, 3), random_inputs(4, 256)
    expected = cpu_native.matmul(matrix, x)
    before = affinities()
    allowed = sorted(os.sched_getaffinity(0))
    assert all(cores == set(allowed) for cores in before.values())
    cpu_native.pin_helpers(allowed[-1:])
    while not any(cores == {allowed[-1]} for cores in affinities().values()):
        assert torch.equal(cpu_native.matmul(matrix, x, num_threads=2), expected)
    assert os.sched_getaffinity(0) == set(allowed), "the caller was moved"
    print("right")
""")


def test_helpers_stay_where_they_are_told_and_the_caller_is_not_moved() -> None:
    """In a process of its own, for the pool lives as long as the process."""
    here = Path(__file__).parent
    told = subprocess.run(
        [sys.executable, "-c", PINNED, str(here), str(here.parents[1])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told.stdout.strip() == "right", told.stderr[-2000:]
    with pytest.raises(ValueError, match="cores: got none"):
        cpu_native.pin_helpers(())


def test_callers_in_several_threads() -> None:
    """The pool serves one caller at a time; the others work alone, with the same results."""
    mlp, x = random_mlp(128, 192, 3), random_inputs(5, 128)
    (expected,) = cpu_native.gated_mlp_many([MlpCall(x, mlp)])
    with ThreadPoolExecutor(4) as callers:
        results = list(
            callers.map(
                lambda _: cpu_native.gated_mlp_many([MlpCall(x, mlp)], num_threads=3), range(200)
            )
        )
    assert all(torch.equal(got, expected) for (got,) in results)


def test_a_forked_child_has_no_helpers_and_still_answers() -> None:
    matrix, x = random_matrix(160, 128, 3), random_inputs(4, 128)
    expected = cpu_native.matmul(matrix, x, num_threads=2)  # starts a helper in this process
    child = os.fork()
    if child == 0:
        got = cpu_native.matmul(matrix, x, num_threads=2)
        os._exit(0 if torch.equal(got, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


MATRIX, X = random_matrix(16, 64, 2), random_inputs(2, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu_native.matmul(MATRIX, random_inputs(2, 128)), "x: expected"),
        (lambda: cpu_native.matmul(MATRIX, X[0]), "x: expected"),
        (lambda: cpu_native.matmul(MATRIX, X, out=torch.empty(2, 15)), "out: expected"),
        (lambda: cpu_native.matmul(MATRIX, X, out=torch.empty(2, 16).half()), "out: expected"),
        (lambda: cpu_native.matmul(MATRIX, X, out=torch.empty(16, 2).T), "out: expected"),
        (lambda: cpu_native.matmul(MATRIX, X, num_threads=0), "num_threads: got 0"),
        (lambda: cpu_native.matmul(MATRIX, X, isa="neon"), "isa: got 'neon'"),  # type: ignore
        (lambda: cpu_native.matmul(random_matrix(16, 64, 16), X), "bits 16 has no native"),
        (lambda: cpu_native.dequantize(random_matrix(16, 64, 16)), "bits 16 has no native"),
        (lambda: cpu_native.matmul(strided(MATRIX), X), "contiguous bytes"),
        (lambda: cpu_native.gated_mlp_many([MlpCall(X, mlp_with_bias(65))]), "gate_bias: expected"),
    ],
)
def test_what_does_not_fit_never_reaches_a_pointer(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def strided(matrix: QuantizedMatrix) -> QuantizedMatrix:
    spread = torch.zeros(matrix.data.numel(), 2, dtype=torch.uint8)
    spread[:, 0] = matrix.data
    return replace(matrix, data=spread[:, 0])


def mlp_with_bias(size: int) -> GatedMLP:
    mlp = random_mlp(64, 64, 2)
    return GatedMLP(mlp.gate, mlp.up, mlp.down, "silu", *(torch.zeros(size),) * 3)


def test_offsets_outside_the_data_are_refused_by_the_type() -> None:
    factors = random_low_rank(64, 64, 2, 1)
    with pytest.raises(ValueError, match="reaches past"):
        LowRank(factors.data, (8,), 64, 64, 2)


def test_what_is_made_of_a_weight_lives_as_long_as_the_weight() -> None:
    """Weights that come and go, often at the address of one that died, are never mixed up."""
    before = len(cpu_records._MLPS)
    x = random_inputs(2, 64)
    for seed in range(30):
        mlp = random_mlp(64, 128, 2 + seed % 3, biases=seed % 2 == 0)
        for _ in range(2):
            (got,) = cpu_native.gated_mlp_many([MlpCall(x, mlp)], numbers="fp32")
            assert relative_rms(got, reference.gated_mlp(x, mlp)) < FP32_TOLERANCE
        assert len(cpu_records._MLPS) <= before + 2
    del mlp
    gc.collect()
    assert len(cpu_records._MLPS) <= before
