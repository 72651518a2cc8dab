"""Goal: the Triton kernels compute what the reference computes and are code that a GPU's compiler
accepts. Method: run them under the interpreter (tests/conftest.py turns it on) on odd shapes,
widths, ranks and token counts with poisoned outputs; compile every variant for sm_90.

With TRITON_INTERPRET=0 on a machine with a GPU the same tests run compiled, on the GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_matrices import (
    FORMS,
    TRITON_TOLERANCE,
    at_odd_address,
    random_inputs,
    random_low_rank,
    random_matrix,
    relative_rms,
)

from kernels import reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed on this platform", allow_module_level=True)

from kernels import triton_decode, triton_matmul
from kernels.types import Grid, LowRank, QuantizedMatrix

COMPILED = os.environ["TRITON_INTERPRET"] == "0"
DEVICE = "cuda" if COMPILED else "cpu"
if COMPILED and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET=0 needs a GPU, there is none", allow_module_level=True)

every_form = pytest.mark.parametrize(("grid", "bits"), FORMS)


@pytest.fixture(autouse=True)
def _poison_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an element no program writes is seen."""

    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        fresh = original(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def matrix_of(rows: int, cols: int, bits: int, grid: Grid = "affine") -> QuantizedMatrix:
    matrix = random_matrix(rows, cols, bits, grid=grid)
    return replace(matrix, data=matrix.data.to(DEVICE))


def factors_of(rows: int, cols: int, bits: int, num_blocks: int, grid: Grid) -> LowRank:
    factors = random_low_rank(rows, cols, bits, num_blocks, grid=grid)
    return replace(factors, data=factors.data.to(DEVICE))


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
@pytest.mark.parametrize(("num_blocks", "num_tokens"), [(0, 2), (1, 1), (4, 5), (2, 33)])
def test_low_rank(grid: Grid, bits: int, num_blocks: int, num_tokens: int) -> None:
    """Rank 0 to the largest of a [64, 128] matrix; blocks out of order at odd addresses."""
    factors = factors_of(64, 128, bits, num_blocks, grid)
    x = inputs_of(num_tokens, 128)
    got = triton_matmul.low_rank_matmul(factors, x)
    assert relative_rms(got, reference.low_rank_matmul(factors, x)) < TRITON_TOLERANCE


def test_baseline_and_no_tokens() -> None:
    matrix, x = matrix_of(5, 70, 16), inputs_of(2, 70)
    assert torch.equal(triton_matmul.matmul(matrix, x), reference.matmul(matrix, x))
    assert triton_matmul.matmul(matrix_of(5, 64, 2), torch.zeros(0, 64, device=DEVICE)).shape == (
        0,
        5,
    )


COMPILE = textwrap.dedent("""
    import sys

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import triton_decode, triton_prefill
    from kernels.types import tile_bytes

    INTEGERS = ("num_tokens", "num_blocks", "rows", "row_blocks", "cols", "left_start")
    POINTERS = {"data": "*u8", "offsets": "*i64", "x": "*fp32", "y": "*fp32", "z": "*fp32"}
    ONES = ("num_tokens", "num_blocks", "row_blocks")

    def compile_kernel(kernel, **constants):
        # A launch makes an argument that is 1 a constant, and tells the compiler of pointers and
        # sizes that are multiples of 16 (wider loads): each is other code. Plain is neither.
        no_offsets = constants.get("HAS_OFFSETS") is False
        pointers = POINTERS | ({"offsets": "*u8"} if no_offsets else {})  # unused: it gets data
        for form in sys.argv[3].split(","):
            ones = ONES if form == "ones" else ()
            fixed = constants | {name: 1 for name in ones if name in kernel.arg_names}
            signature = {
                name: "constexpr" if name in fixed else pointers.get(name, "i32")
                for name in kernel.arg_names
            }
            assert all(name in POINTERS or name in INTEGERS or name in fixed for name in signature)
            places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
            multiples = {
                (index,): [["tt.divisibility", 16]]
                for index, name in enumerate(kernel.arg_names)
                if form != "plain" and name not in fixed and name != "num_tokens"
            }
            source = ASTSource(kernel, signature, places, multiples)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert ".target sm_90" in compiled.asm["ptx"]

    grid, bits = sys.argv[1], int(sys.argv[2])
    sizes = {
        "BITS": bits, "SYMMETRIC": grid == "symmetric", "TILE_BYTES": tile_bytes(bits, grid)
    }
    for tokens in map(int, sys.argv[4].split(",")):
        for has_offsets in (False, True):
            compile_kernel(
                triton_decode._rows_kernel, **sizes, TOKENS=tokens,
                GROUPS=triton_decode.GROUPS_PER_STEP, HAS_OFFSETS=has_offsets,
            )
        compile_kernel(triton_decode._left_kernel, **sizes, TOKENS=tokens)
    compile_kernel(
        triton_prefill._prefill_kernel, **sizes,
        BLOCK_TOKENS=triton_prefill.BLOCK_TOKENS, BLOCK_ROWS=triton_prefill.BLOCK_ROWS,
    )
    print("compiled")
""")

EVERY_TOKENS = ",".join(str(1 << power) for power in range(triton_decode.MAX_TOKENS.bit_length()))
"""Tokens of one program of the decode kernels: the powers of 2 up to the most."""
EVERY_FORM = "plain,ones,multiples"


@pytest.mark.skipif(COMPILED, reason="a GPU runs them compiled")
@pytest.mark.parametrize(
    ("grid", "bits", "forms", "tokens"),
    [
        ("affine", 3, "ones", "1"),
        ("affine", 3, "multiples", "8"),
        ("symmetric", 1, "multiples", "1"),
        # The grids differ in their scales alone, so fewer token counts do for the second.
        *[
            pytest.param(
                *f,
                EVERY_FORM,
                EVERY_TOKENS if f[0] == "affine" else "1,8",
                marks=pytest.mark.slow,
            )
            for f in FORMS
        ],
    ],
)
def test_every_kernel_compiles_for_a_gpu(
    grid: Grid, bits: int, forms: str, tokens: str, tmp_path: Path
) -> None:
    """Triton carries its compiler: this needs no GPU, and the interpreter accepts more than it."""
    root = Path(reference.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, grid, str(bits), forms, tokens],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.stdout.strip() == "compiled", result.stderr[-3000:]
