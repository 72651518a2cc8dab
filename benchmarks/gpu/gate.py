"""Step 2: every Triton kernel against the reference, for one form. What follows rests on it.

The truth is `kernels.reference`'s dequantised weight, multiplied in float64 on the device; outputs
are poisoned first. Groups: "decode", "prefill", "mlp" and "step", each with its form.

Legend: T tokens, N rows, K cols, H hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.gpu.matrices import (
    form_name,
    poisoned_outputs,
    random_expert,
    random_inputs,
    random_matrix,
    random_repair,
    relative_rms,
)
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.setting import Setting
from kernels import ops, reference, triton_matmul, triton_prefill
from kernels.types import Grid, MlpCall, QuantizedMatrix

TOLERANCE = 1e-4
"""Of one product: float32 in another order; three TF32 passes in prefill. As in tests/kernels."""
MLP_TOLERANCE = 3e-4
"""Of three products through a nonlinearity, against the reference in float32 on the same device."""
SHAPES = ((1, 64), (37, 448), (85, 192), (2048, 1408), (1408, 2048), (4096, 14336), (14336, 4096))
TOKENS = (1, 2, 3, 5, 8, 16, 33, 128)
MLP_SHAPES = ((2048, 1408), (4096, 14336))
REPAIRS: dict[Grid, tuple[tuple[int, int], ...]] = {
    "affine": ((0, 0), (16, 0), (128, 0)),
    "symmetric": ((0, 0), (0, 1), (16, 2)),
}
"""(rank, planes) of what is added to whole experts."""
STEP_TOKENS = (1, 2, 3, 5, 9, 1)
"""Of the experts of one grouped step."""


def run(setting: Setting, recorder: Recorder, *, bits: int, grid: Grid) -> None:
    """All products at `bits` on `grid`, and steps of experts of that form beside 2 bits."""
    tokens = (3, 33) if setting.tiny else TOKENS
    with torch.inference_mode(), poisoned_outputs():
        for rows, cols in ((37, 128),) if setting.tiny else SHAPES:
            _check_matrix(
                recorder, random_matrix(rows, cols, bits, setting.device, grid=grid), tokens
            )
        _check_experts(setting, recorder, bits, grid)
        _check_step(setting, recorder, bits, grid)


def _check_matrix(recorder: Recorder, matrix: QuantizedMatrix, tokens: Sequence[int]) -> None:
    rows, cols, form = matrix.rows, matrix.cols, form_name(matrix.bits, matrix.grid)
    if rows * cols < 4_000_000:
        _check_unpacking(recorder, matrix)
        _check_reconstructed(recorder, matrix)
    weight_NK = reference.dequantize(matrix).double()
    for num_tokens in tokens:
        kernel = "decode" if num_tokens <= triton_matmul.DECODE_TOKENS else "prefill"
        group = f"{kernel} {form}"
        with recorder.section(group):
            x = random_inputs(num_tokens, cols, str(matrix.data.device), seed=num_tokens)
            expected = x.double() @ weight_NK.T
            error = relative_rms(triton_matmul.matmul(matrix, x), expected)
            recorder.compare(group, f"{rows} x {cols}, {num_tokens} tokens", error, TOLERANCE)
        # The prefill kernel is timed at few tokens too: where it overtakes decode is measured.
        if kernel == "decode":
            with recorder.section(f"prefill {form}"):
                error = relative_rms(triton_matmul.matmul_prefill(matrix, x), expected)
                name = f"{rows} x {cols}, {num_tokens} tokens"
                recorder.compare(f"prefill {form}", name, error, TOLERANCE)


def _check_unpacking(recorder: Recorder, matrix: QuantizedMatrix) -> None:
    """The reference itself gives the same bits on the device and on the host."""
    on_host = replace(matrix, data=matrix.data.cpu())
    same = torch.equal(reference.dequantize(matrix).cpu(), reference.dequantize(on_host))
    name = f"dequantise {matrix.rows} x {matrix.cols} as on the host"
    for kernel in ("decode", "prefill"):
        recorder.check(f"{kernel} {form_name(matrix.bits, matrix.grid)}", name, same)


def _check_reconstructed(recorder: Recorder, matrix: QuantizedMatrix) -> None:
    """What long prompts of 16-bit inputs are multiplied by."""
    group = f"prefill {form_name(matrix.bits, matrix.grid)}"
    with recorder.section(group):
        got = triton_prefill.reconstruct(matrix, torch.float32)
        error = relative_rms(got, reference.dequantize(matrix))
        recorder.compare(group, f"reconstruct {matrix.rows} x {matrix.cols}", error, 1e-6)


def _check_step(setting: Setting, recorder: Recorder, bits: int, grid: Grid) -> None:
    """Several experts at once, every other one of another width, against the reference one by one;
    and each token's bits against those it has alone."""
    device, tiny, group = setting.device, setting.tiny, f"step {form_name(bits, grid)}"
    hidden, ffn = (64, 64) if tiny else (2048, 1408)
    rank, num_planes = REPAIRS[grid][-1]
    repair = random_repair(hidden, ffn, 16 if tiny else rank, device, grid=grid,
                           num_planes=num_planes)  # fmt: skip
    calls = []
    for number, num_tokens in enumerate(STEP_TOKENS[1:3] if tiny else STEP_TOKENS):
        form: tuple[int, Grid] = (bits, grid) if number % 2 == 0 else (2, "affine")
        mlp = random_expert(hidden, ffn, form[0], device, seed=number, grid=form[1])
        x = random_inputs(num_tokens, hidden, device, seed=number)
        calls.append(MlpCall(x, mlp, repair, torch.arange(num_tokens) % 2 == 0))
    with recorder.section(group):
        got = ops.gated_mlp_many(calls, backend="triton", num_threads=1)
        for call, result in zip(calls, got, strict=True):
            num_tokens, restored_T = call.x_TH.shape[0], call.restored_T
            expected = reference.gated_mlp(call.x_TH, call.mlp, repair, restored_T)
            name = f"H {hidden}, F {ffn}, {num_tokens} tokens of {len(calls)} experts'"
            recorder.compare(group, name, relative_rms(result, expected), MLP_TOLERANCE)
            alone = ops.gated_mlp(
                call.x_TH[-1:], call.mlp, repair, restored_T[-1:], backend="triton"
            )
            same = torch.equal(alone[0], result[-1])
            recorder.check(group, f"{name}: the last has the bits it has alone", same)


def _check_experts(setting: Setting, recorder: Recorder, bits: int, grid: Grid) -> None:
    """Whole experts through the public face, some tokens restored."""
    device, tiny, group = setting.device, setting.tiny, f"mlp {form_name(bits, grid)}"
    for hidden, ffn in ((64, 128),) if tiny else MLP_SHAPES:
        mlp = random_expert(hidden, ffn, bits, device, grid=grid)
        for rank, num_planes in REPAIRS[grid][1:2] if tiny else REPAIRS[grid]:
            repair = random_repair(hidden, ffn, rank, device, grid=grid, num_planes=num_planes)
            for num_tokens in (2,) if tiny else (1, 2, 8, 33):
                with recorder.section(group):
                    x = random_inputs(num_tokens, hidden, device)
                    restored_T = torch.arange(num_tokens) % 2 == 0
                    got = ops.gated_mlp(x, mlp, repair, restored_T, backend="triton")
                    expected = reference.gated_mlp(x, mlp, repair, restored_T)
                    name = f"H {hidden}, F {ffn}, rank {rank}, {num_planes} planes"
                    error = relative_rms(got, expected)
                    recorder.compare(group, f"{name}, {num_tokens} tokens", error, MLP_TOLERANCE)
