"""Goal: the Triton kernels compute what the reference computes and are code that a GPU's compiler
accepts. Method: run them under the interpreter (tests/conftest.py turns it on) on odd shapes,
widths, ranks and token counts with poisoned outputs; compile every variant for sm_90."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from kernel_matrices import (
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

from kernels import triton_matmul

every_width = pytest.mark.parametrize("bits", [2, 3, 4])


@pytest.fixture(autouse=True)
def _poison_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an element no program writes is seen."""

    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        fresh = original(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@every_width
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (37, 448)])
@pytest.mark.parametrize("num_tokens", [1, 3, 9])
def test_decode(bits: int, rows: int, cols: int, num_tokens: int) -> None:
    """One group and seven (not a multiple of the step), rows that end inside a tile."""
    matrix, x = at_odd_address(random_matrix(rows, cols, bits)), random_inputs(num_tokens, cols)
    got = triton_matmul.matmul(matrix, x)
    assert relative_rms(got, reference.matmul(matrix, x)) < TRITON_TOLERANCE


@every_width
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (85, 192)])
@pytest.mark.parametrize("num_tokens", [17, 33, 70])
def test_prefill(bits: int, rows: int, cols: int, num_tokens: int) -> None:
    """Token and row counts that end inside a block."""
    matrix, x = random_matrix(rows, cols, bits), random_inputs(num_tokens, cols)
    got = triton_matmul.matmul(matrix, x)
    assert relative_rms(got, reference.matmul(matrix, x)) < TRITON_TOLERANCE


@every_width
@pytest.mark.parametrize(("num_blocks", "num_tokens"), [(0, 2), (1, 1), (4, 5), (2, 33)])
def test_low_rank(bits: int, num_blocks: int, num_tokens: int) -> None:
    """Rank 0 to the largest of a [64, 128] matrix; blocks out of order at odd addresses."""
    factors = random_low_rank(64, 128, bits, num_blocks)
    x = random_inputs(num_tokens, 128)
    got = triton_matmul.low_rank_matmul(factors, x)
    assert relative_rms(got, reference.low_rank_matmul(factors, x)) < TRITON_TOLERANCE


def test_baseline_and_no_tokens() -> None:
    matrix, x = random_matrix(5, 70, 16), random_inputs(2, 70)
    assert torch.equal(triton_matmul.matmul(matrix, x), reference.matmul(matrix, x))
    assert triton_matmul.matmul(random_matrix(5, 64, 2), torch.zeros(0, 64)).shape == (0, 5)


COMPILE = textwrap.dedent("""
    import sys

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import triton_decode, triton_prefill
    from kernels.types import tile_bytes

    INTEGERS = ("num_tokens", "num_blocks", "rows", "row_blocks", "cols", "right_bytes")
    POINTERS = {"data": "*u8", "offsets": "*i64", "x": "*fp32", "y": "*fp32", "z": "*fp32"}

    def compile_kernel(kernel, **constants):
        # A launch turns an argument that is 1 into a constant, so that form is compiled as well.
        for ones in ((), ("num_tokens", "num_blocks", "row_blocks")):
            fixed = constants | {name: 1 for name in ones if name in kernel.arg_names}
            signature = {
                name: "constexpr" if name in fixed else POINTERS.get(name, "i32")
                for name in kernel.arg_names
            }
            assert all(name in POINTERS or name in INTEGERS or name in fixed for name in signature)
            places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
            source = ASTSource(kernel, signature, places)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert ".target sm_90" in compiled.asm["ptx"]

    bits = int(sys.argv[1])
    sizes = {"BITS": bits, "TILE_BYTES": tile_bytes(bits)}
    for tokens, has_offsets in ((1, False), (8, True)):
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


@pytest.mark.parametrize(
    "bits", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_every_kernel_compiles_for_a_gpu(bits: int, tmp_path: Path) -> None:
    """Triton carries its compiler: this needs no GPU, and the interpreter accepts more than it."""
    root = Path(reference.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(bits)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.stdout.strip() == "compiled", result.stderr[-3000:]
