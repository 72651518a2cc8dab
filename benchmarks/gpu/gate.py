"""Step 2: every Triton kernel against the reference, for one width. What follows rests on it.

The truth is `kernels.reference`'s dequantised weight, multiplied in float64 on the device; outputs
are poisoned first. Groups: "decode", "prefill", "low rank" and "mlp", each with its width.

Legend: T tokens, N rows, K cols, R rank, H hidden, F ffn.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.matrices import (
    FACTOR_BITS,
    poisoned_outputs,
    random_expert,
    random_factors,
    random_inputs,
    random_low_rank,
    random_matrix,
    relative_rms,
)
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.setting import Setting
from kernels import ops, reference
from kernels.types import LowRank, QuantizedMatrix

TOLERANCE = 1e-4
"""Of one product: float32 in another order; three TF32 passes in prefill. As in tests/kernels."""
MLP_TOLERANCE = 3e-4
"""Of three products through a nonlinearity, against the reference in float32 on the same device."""
SHAPES = ((1, 64), (37, 448), (85, 192), (2048, 1408), (1408, 2048), (4096, 14336), (14336, 4096))
LOW_RANK_SHAPES = ((64, 128), (2048, 1408), (1408, 2048), (4096, 14336), (14336, 4096))
TOKENS = (1, 2, 3, 5, 8, 16, 17, 33, 128)
RANKS = (0, 16, 128)
MLP_SHAPES = ((2048, 1408), (4096, 14336))


def run(setting: Setting, recorder: Recorder, *, bits: int) -> None:
    """All products at `bits`; factors at the same width."""
    # Loaded as ops loads it: the one place in benchmarks that reaches below the room's face.
    from kernels import triton_matmul

    device, tiny = setting.device, setting.tiny
    shapes = ((37, 128),) if tiny else SHAPES
    tokens = (3, 33) if tiny else TOKENS
    with torch.inference_mode(), poisoned_outputs():
        for rows, cols in shapes:
            matrix = random_matrix(rows, cols, bits, device)
            if rows * cols < 4_000_000:
                _check_unpacking(recorder, matrix)
            weight_NK = reference.dequantize(matrix).double()
            for num_tokens in tokens:
                kernel = "decode" if num_tokens <= triton_matmul.DECODE_TOKENS else "prefill"
                x = random_inputs(num_tokens, cols, device, seed=num_tokens)
                error = relative_rms(triton_matmul.matmul(matrix, x), x.double() @ weight_NK.T)
                name = f"{rows} x {cols}, {num_tokens} tokens"
                recorder.compare(f"{kernel} {bits} bits", name, error, TOLERANCE)
        for rows, cols in ((64, 128),) if tiny else LOW_RANK_SHAPES:
            for rank in (32,) if tiny else RANKS:
                factors = random_low_rank(rows, cols, rank, device, bits=bits)
                left_NR, right_RK = _dense(factors)
                for num_tokens in tokens:
                    x = random_inputs(num_tokens, cols, device, seed=num_tokens)
                    expected = (x.double() @ right_RK.T) @ left_NR.T
                    error = relative_rms(triton_matmul.low_rank_matmul(factors, x), expected)
                    name = f"{rows} x {cols}, rank {rank}, {num_tokens} tokens"
                    recorder.compare(f"low rank {bits} bits", name, error, TOLERANCE)
        _check_experts(setting, recorder, bits)


def _dense(factors: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    left_NR, right_RK = reference.dequantize_low_rank(factors)
    return left_NR.double(), right_RK.double()


def _check_unpacking(recorder: Recorder, matrix: QuantizedMatrix) -> None:
    """The reference itself gives the same bits on the device and on the host."""
    on_host = QuantizedMatrix(matrix.data.cpu(), matrix.rows, matrix.cols, matrix.bits)
    same = torch.equal(reference.dequantize(matrix).cpu(), reference.dequantize(on_host))
    name = f"dequantise {matrix.rows} x {matrix.cols} as on the host"
    for kernel in ("decode", "prefill"):
        recorder.check(f"{kernel} {matrix.bits} bits", name, same)


def _check_experts(setting: Setting, recorder: Recorder, bits: int) -> None:
    """Whole experts through the public face, some tokens restored."""
    device, tiny = setting.device, setting.tiny
    for hidden, ffn in ((64, 128),) if tiny else MLP_SHAPES:
        mlp = random_expert(hidden, ffn, bits, device)
        for rank in (16,) if tiny else RANKS:
            factors = random_factors(hidden, ffn, rank, device)
            for num_tokens in (2,) if tiny else (1, 2, 8, 33):
                x = random_inputs(num_tokens, hidden, device)
                restored_T = torch.arange(num_tokens) % 2 == 0
                got = ops.gated_mlp(x, mlp, factors, restored_T, backend="triton")
                expected = reference.gated_mlp(x, mlp, factors, restored_T)
                name = (
                    f"H {hidden}, F {ffn}, rank {rank} of {FACTOR_BITS} bits, {num_tokens} tokens"
                )
                error = relative_rms(got, expected)
                recorder.compare(f"mlp {bits} bits", name, error, MLP_TOLERANCE)
