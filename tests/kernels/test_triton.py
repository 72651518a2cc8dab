"""Goal: the Triton kernels compute what the reference computes.

Method: run them under the interpreter (tests/conftest.py turns it on) on odd shapes,
widths and token counts with poisoned outputs. test_triton_compile.py compiles them for sm_90,
test_triton_grouped.py runs whole steps.

With TRITON_INTERPRET=0 on a machine with a GPU the same tests run compiled, on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_matrices import (
    FORMS,
    TRITON_TOLERANCE,
    at_odd_address,
    random_inputs,
    random_matrix,
    relative_rms,
)
from triton_device import DEVICE, poisoned_outputs  # noqa: F401 - a fixture

from kernels import reference, triton_matmul, triton_prefill
from kernels.types import GROUP_SIZE, Grid, QuantizedMatrix

every_form = pytest.mark.parametrize(("grid", "bits"), FORMS)
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def matrix_of(
    rows: int, cols: int, bits: int, grid: Grid = "affine", group_size: int = GROUP_SIZE
) -> QuantizedMatrix:
    matrix = random_matrix(rows, cols, bits, grid=grid, group_size=group_size)
    return replace(matrix, data=matrix.data.to(DEVICE))


def inputs_of(num_tokens: int, cols: int) -> torch.Tensor:
    return random_inputs(num_tokens, cols).to(DEVICE)


@every_form
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (37, 448)])
@pytest.mark.parametrize("num_tokens", [1, 3, 9])
def test_decode(grid: Grid, bits: int, rows: int, cols: int, num_tokens: int) -> None:
    """One group and seven (not a multiple of the step), rows that end inside a tile."""
    matrix, x = at_odd_address(matrix_of(rows, cols, bits, grid)), inputs_of(num_tokens, cols)
    got = triton_matmul.matmul(matrix, x)
    assert relative_rms(got, reference.matmul(matrix, x)) < TRITON_TOLERANCE


@every_form
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (85, 192)])
@pytest.mark.parametrize("num_tokens", [17, 33, 70])
def test_prefill(grid: Grid, bits: int, rows: int, cols: int, num_tokens: int) -> None:
    """Token and row counts that end inside a block."""
    matrix, x = matrix_of(rows, cols, bits, grid), inputs_of(num_tokens, cols)
    got = triton_matmul.matmul(matrix, x)
    assert relative_rms(got, reference.matmul(matrix, x)) < TRITON_TOLERANCE


@every_form
def test_reconstruct(grid: Grid, bits: int) -> None:
    """The reference's weights, but for float32's last bits; rows that end inside a tile."""
    matrix = matrix_of(37, 320, bits, grid)
    expected = reference.dequantize(matrix)
    got = triton_prefill.reconstruct(matrix, torch.float32)
    assert relative_rms(got, expected) < 1e-6
    rounded = triton_prefill.reconstruct(matrix, torch.float16)
    assert torch.equal(rounded, got.half())


@every_form
@pytest.mark.parametrize(
    ("cols", "group_size"), [(64, 32), (192, 96), (640, 160), (384, 128), (192, 192)]
)
def test_other_group_sizes(grid: Grid, bits: int, cols: int, group_size: int) -> None:
    """Half tiles and several tiles a group; decode, prefill and the whole weight."""
    matrix = at_odd_address(matrix_of(37, cols, bits, grid, group_size))
    for num_tokens in (3, 17):
        x = inputs_of(num_tokens, cols)
        got = triton_matmul.matmul(matrix, x)
        assert relative_rms(got, reference.matmul(matrix, x)) < TRITON_TOLERANCE, num_tokens
    got = triton_prefill.reconstruct(matrix, torch.float32)
    assert relative_rms(got, reference.dequantize(matrix)) < 1e-6


def test_many_tokens_of_16_bits_take_the_reconstructed_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, x = matrix_of(37, 128, 3), inputs_of(20, 128).half().float()
    expected = x @ reference.dequantize(matrix).half().float().T
    monkeypatch.setattr(triton_matmul, "RECONSTRUCT_TOKENS", 20)
    got = triton_matmul.matmul(matrix, x, dtype=torch.float16)
    assert relative_rms(got, expected) < 1e-3  # float16's rounding of the result
    # Float32 inputs keep their precision however many they are.
    exact = triton_matmul.matmul(matrix, x)
    assert relative_rms(exact, reference.matmul(matrix, x)) < TRITON_TOLERANCE


def test_baseline_and_no_tokens() -> None:
    matrix, x = matrix_of(5, 70, 16), inputs_of(2, 70)
    assert torch.equal(triton_matmul.matmul(matrix, x), reference.matmul(matrix, x))
    assert triton_matmul.matmul(matrix_of(5, 64, 2), torch.zeros(0, 64, device=DEVICE)).shape == (
        0,
        5,
    )
