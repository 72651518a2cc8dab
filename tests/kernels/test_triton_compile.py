"""Goal: every Triton kernel of packed matrices is code that a GPU's compiler
accepts.

Method: compile each for sm_90 with the types and constants of its launch, in a process without the
interpreter; Triton carries its compiler, so that this needs no GPU. The interpreter accepts more.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest
from kernel_matrices import FORMS

from kernels.types import Activation, Grid

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed on this platform", allow_module_level=True)

from kernels import triton_decode

if os.environ["TRITON_INTERPRET"] == "0":
    pytest.skip("a GPU runs them compiled", allow_module_level=True)

ROOT = Path(triton_decode.__file__).parent.parent
COMPILE = textwrap.dedent("""
    import json
    import sys

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import triton_decode, triton_digits, triton_gate, triton_prefill
    from kernels.triton_decode import Form

    BYTES = {"data": "*u8", "digits": "*i8", "weight": "*bf16"}
    INT64 = ("jobs", "y_rows", "pairs", "lefts", "x_addresses")
    FLOATS = ("x", "y", "z", "sizes", "sums", "gate_up")
    TYPES = BYTES | dict.fromkeys(INT64, "*i64") | dict.fromkeys(FLOATS, "*fp32")
    INTEGERS = ("num_jobs", "num_pairs", "num_tokens", "num_groups", "rows", "row_blocks", "cols",
                "y_stride", "z_stride", "ffn", "hidden")
    ONES = ("num_jobs", "num_pairs", "num_tokens", "row_blocks", "z_stride")

    def compile_kernel(kernel, form, *, like="fp32", num_warps=4, **constants):
        # A launch makes an argument that is 1 a constant, and tells the compiler of pointers and
        # sizes that are multiples of 16 (wider loads): each is other code. Plain is neither.
        types = TYPES | {"like": f"*{like}"}
        ones = ONES if form == "ones" else ()
        fixed = constants | {name: 1 for name in ones if name in kernel.arg_names}
        signature = {
            name: "constexpr" if name in fixed else types.get(name, "i32")
            for name in kernel.arg_names
        }
        assert all(name in types or name in INTEGERS or name in fixed for name in signature)
        places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
        multiples = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if form != "plain" and name not in fixed and (name in types or name not in ONES)
        }
        source = ASTSource(kernel, signature, places, multiples)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}
        )
        assert ".target sm_90" in compiled.asm["ptx"]
        return compiled.asm["ptx"]

    def rows(form, tokens, add=False):
        return compile_kernel(
            triton_decode._rows_kernel, form, num_warps=triton_decode.NUM_WARPS, **constants,
            TOKENS=tokens, STEP=triton_decode.TILES_PER_STEP, ADD=add, PACKED=True,
            STAGES=triton_decode.STAGES,
        )

    what, grid, bits, group_size, forms, extra = json.loads(sys.argv[1])
    constants = Form(bits, grid, group_size).constants
    factors = {name: constants[name] for name in ("BITS", "SYMMETRIC")}
    for form in forms:
        if what == "rows":
            for tokens in extra:
                ptx = rows(form, tokens, add=grid == "symmetric")
                # What the design rests on, where pointers are known to be aligned.
                if form != "plain":
                    assert "cp.async.cg.shared.global" in ptx, "no 16-byte copies"
                    assert "m16n8k32" in ptx and ".s8.s8" in ptx, "no integer tensor core"
        elif what == "many":
            compile_kernel(
                triton_prefill._prefill_kernel, form, **constants,
                BLOCK_TOKENS=triton_prefill.BLOCK_TOKENS, BLOCK_ROWS=triton_prefill.BLOCK_ROWS,
            )
            compile_kernel(
                triton_prefill._reconstruct_kernel, form, **constants,
                BLOCK_COLS=64 * triton_prefill.TILES_PER_PROGRAM,
            )
        else:
            for dtype in ("fp32", "bf16", "fp16"):
                compile_kernel(
                    triton_digits._digits_kernel, form, like=dtype,
                    GROUPS=triton_digits.GROUPS_PER_PROGRAM,
                )
            for activation in extra:
                compile_kernel(
                    triton_gate._gate_kernel, form, **factors, RANKED=True,
                    ACTIVATION=activation,
                )
            for ranked in (False, True):
                compile_kernel(triton_gate._down_kernel, form, **factors, RANKED=ranked)
    print("compiled")
""")
EVERY_ALIGNMENT = ("plain", "ones", "multiples")
EVERY_TOKENS = tuple(1 << power for power in range(1, triton_decode.MAX_TOKENS.bit_length()))
"""Tokens of one job: the powers of 2 from MIN_TOKENS to MAX_TOKENS."""
Case = tuple[str, Grid, int, int, tuple[str, ...], tuple[object, ...]]
"""What, grid, bits, group size, alignments, token counts or activations."""
QUICK: tuple[Case, ...] = (
    ("rows", "affine", 3, 64, ("ones",), (2,)),
    ("rows", "affine", 2, 64, ("multiples",), (triton_decode.MAX_TOKENS,)),
    ("rows", "symmetric", 1, 64, ("multiples",), (2,)),
    ("rows", "affine", 2, 128, ("multiples",), (2,)),
    ("rows", "symmetric", 3, 96, ("multiples",), (2,)),
    ("many", "affine", 3, 64, ("multiples",), ()),
    ("many", "affine", 4, 32, ("multiples",), ()),
    ("others", "affine", 3, 64, ("ones",), ("silu",)),
)


@pytest.mark.parametrize(
    "case",
    [
        *QUICK,
        *[
            pytest.param((what, *form, size, EVERY_ALIGNMENT, extra), marks=pytest.mark.slow)
            for form in FORMS
            for size in (64, 32, 192)
            for what, extra in (
                ("rows", EVERY_TOKENS),
                ("many", ()),
                ("others", get_args(Activation)),
            )
            if what != "others" or size == 64  # factors have groups of 64 alone
        ],
    ],
    ids=lambda case: "-".join(map(str, case[:4])),
)
def test_every_kernel_compiles_for_a_gpu(case: Case, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(case)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.stdout.strip() == "compiled", result.stderr[-3000:]
