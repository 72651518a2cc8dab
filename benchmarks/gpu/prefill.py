"""Step 3b: the prefill kernel's TFLOP/s against torch's bf16 product of the same shape.

Both take turns in the same rounds, on random data, over a pool of weights.

Legend: T tokens, N rows, K cols.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

import torch

from benchmarks.gpu.clock import in_turns
from benchmarks.gpu.matrices import copies, form_name, random_inputs, random_matrix
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.setting import Setting
from kernels import ops, triton_matmul
from kernels.types import Grid

SHAPES = ((14336, 4096), (2048, 1408))
TOKENS = (32, 128, 512, 2048)
FORMS: tuple[tuple[int, Grid], ...] = (
    *((bits, "affine") for bits in (2, 3, 4)),
    (2, "symmetric"),
)
ROUNDS = 10
POOL_BYTES = 128 << 20
Item = TypeVar("Item")


def run(setting: Setting, recorder: Recorder) -> None:
    device, tiny = setting.device, setting.tiny
    with torch.inference_mode():
        for rows, cols in ((64, 128),) if tiny else SHAPES:
            dense_bytes = 2 * rows * cols
            weight = torch.randn(rows, cols, device=device).bfloat16()
            pool = [weight.clone() for _ in range(2 if tiny else max(2, POOL_BYTES // dense_bytes))]
            packed = {
                form_name(bits, grid): copies(
                    random_matrix(rows, cols, bits, device, grid=grid), 1 if tiny else POOL_BYTES
                )
                for bits, grid in (FORMS[:1] if tiny else FORMS)
            }
            for num_tokens in (33,) if tiny else TOKENS:
                x = random_inputs(num_tokens, cols, device)
                x_bf16 = x.bfloat16()
                work: dict[str, Callable[[], object]] = {
                    "torch bf16": _each(pool, lambda w, x=x_bf16: x @ w.T)
                }
                for form, matrices in packed.items():
                    work[f"prefill kernel {form}"] = _each(
                        matrices, lambda m, x=x: triton_matmul.matmul(m, x)
                    )
                # What a long prompt could do instead: unpack once, then a bf16 product.
                work["unpack 2 bits, then bf16"] = _each(
                    packed["2 bits"], lambda m, x=x_bf16: x @ ops.dequantize(m).bfloat16().T
                )
                times = in_turns(work, device=device, rounds=setting.rounds(ROUNDS))
                _rows(recorder, times, rows, cols, num_tokens)


def _each(items: list[Item], work: Callable[[Item], object]) -> Callable[[], object]:
    """`work` on the next of the items at every call."""
    turn = itertools.cycle(items)
    return lambda: work(next(turn))


def _rows(
    recorder: Recorder, times: dict[str, list[float]], rows: int, cols: int, num_tokens: int
) -> None:
    tera = 2 * num_tokens * rows * cols / 1e12
    dense = 0.0
    for what, seconds in times.items():
        form = what.removeprefix("prefill kernel ") if what.startswith("prefill") else "2 bits"
        rate = recorder.row(
            what,
            seconds,
            shape=f"{rows} x {cols}",
            tokens=num_tokens,
            gates=(f"prefill {form}",),
            rate_of_s=tera,
            rate_unit="TFLOP/s",
            share_of=("torch bf16", dense),
        )
        dense = dense or rate
