"""Goal: the Triton decoder of the block code gives the same bits as torch, stays inside of its data
whatever that holds, and is code that a GPU's compiler accepts. Method: run it under the interpreter
(tests/conftest.py turns it on) on odd shapes with poisoned outputs; compile it for sm_90.

With TRITON_INTERPRET=0 on a machine with a GPU the same tests run compiled, on the GPU."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_codes import code_of
from kernel_matrices import at_odd_address
from triton_device import COMPILED, DEVICE, poisoned_outputs  # noqa: F401 - a fixture

from kernels import ops, triton_block_code
from kernels.block_code import block_sections, decode_block_code

every_form = pytest.mark.parametrize("differenced", [False, True])
every_mode = pytest.mark.parametrize("grouped", [False, True])
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@every_form
@every_mode
@pytest.mark.parametrize(
    ("rows", "cols", "relative"), [(1, 64, 0.5), (19, 192, 0.1), (9, 64, 1e-5)]
)
def test_the_same_bits(
    rows: int,
    cols: int,
    relative: float,
    grouped: bool,
    differenced: bool,
) -> None:
    coded = code_of(rows, cols, relative, grouped=grouped, differenced=differenced)
    moved = replace(coded, data=at_odd_address(coded).data.to(DEVICE))
    assert torch.equal(triton_block_code.decode_block_code(moved).cpu(), decode_block_code(coded))


@pytest.mark.parametrize("table", ["chunk_starts", "plane_counts"])
def test_damaged_data_is_read_within_its_bounds(table: str) -> None:
    """The device cannot check. A table of ones leads outside; what lies there changes nothing."""
    coded = code_of(9, 64, 0.3)
    start = getattr(block_sections(9, 64, 0), table)
    results = []
    for outside in (0, 0xFF):
        around = torch.full((coded.data.numel() + 8192,), outside, dtype=torch.uint8)
        data = around[4096 : 4096 + coded.data.numel()]
        data.copy_(coded.data)
        data[start : start + 16] = 0xFF
        damaged = replace(coded, data=around.to(DEVICE)[4096 : 4096 + coded.data.numel()])
        results.append(triton_block_code.decode_block_code(damaged).cpu())
    assert torch.equal(*results)
    assert torch.isfinite(results[0]).all()
    assert not torch.equal(results[0], decode_block_code(coded))


COMPILE = textwrap.dedent("""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.block_code import ROWS_PER_CHUNK
    from kernels.triton_block_code import BLOCKS_PER_STEP, _decode_kernel as kernel

    names = kernel.arg_names
    always = {"ROWS": ROWS_PER_CHUNK, "STEP": BLOCKS_PER_STEP, "PAIR": 2}
    for fixed in (always, always | {"rows": 1}):
        for multiple in (False, True):
            pointers = {"data": "*u8", "weight": "*fp32"}
            signature = {
                name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names
            }
            places = {(names.index(name),): value for name, value in fixed.items()}
            multiples = {
                (index,): [["tt.divisibility", 16]]
                for index, name in enumerate(names)
                if multiple and name not in fixed
            }
            source = ASTSource(kernel, signature, places, multiples)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert ".target sm_90" in compiled.asm["ptx"]
            assert "div" not in compiled.asm["ptx"].replace("div.s", "")  # of floats: not exact
    print("compiled")
""")


@pytest.mark.skipif(COMPILED, reason="a GPU runs it compiled")
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """Triton carries its compiler: this needs no GPU, and the interpreter accepts more than it."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=Path(ops.__file__).parent.parent,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.stdout.strip() == "compiled", result.stderr[-3000:]
