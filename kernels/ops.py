"""The public face of this room: the same operations on any backend, picked by name or by device.

The one module that knows which backends exist; the native library and Triton are loaded here, on
first use. Inputs are checked here, once.

Legend: T tokens, H hidden, F ffn, N rows, K cols, R rank.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Literal, get_args

import torch

from kernels import reference
from kernels.block_code import BlockCodedMatrix
from kernels.gated import compose_gated_mlp
from kernels.types import GatedMLP, GatedRepair, LowRank, Matrix, MlpCall, QuantizedMatrix

logger = logging.getLogger(__name__)

Backend = Literal["reference", "cpu_fp32", "cpu_int8", "triton"]
"""reference: plain torch, the truth. cpu_fp32: float32 products, native and tile by tile for few
tokens, else native dequantise and BLAS; about 1e-6 of the reference. cpu_int8: native kernels on
int8 activations; 1-2e-2 of the reference per matrix or MLP. triton: GPU kernels. Without a C++
compiler both cpu backends run on torch alone, slower."""

NativeIsa = Literal["avx512vnni", "avx2", "scalar"]
TILEWISE_TOKENS = 64
"""Up to here cpu_fp32's own product beats dequantise and BLAS on every shape tried: 2 to 30 times
at 1 to 8 tokens, level at 64 on a 512 x 256 matrix (AMD Zen 4, one thread, 2026-11-22)."""


def default_backend(device: torch.device | str) -> Backend:
    """ "triton" on a CUDA device, else "cpu_fp32"."""
    return "triton" if torch.device(device).type == "cuda" else "cpu_fp32"


def native_isa() -> NativeIsa | None:
    """The instruction set the native kernels use here; None when they were not built."""
    native = _native()
    return native.best_isa() if native else None


def pin_threads() -> bool:
    """Keep the native kernels' helper threads on the cores this process may use, one each.

    False, and nothing done, without the native library or on a system that has no such call.
    """
    native = _native()
    if native is None or not hasattr(os, "sched_getaffinity"):
        return False
    native.pin_helpers(sorted(os.sched_getaffinity(0)))
    return True


def dequantize(matrix: Matrix) -> torch.Tensor:
    """The [N, K] float32 weight on the matrix's device; the same bits whichever code makes it."""
    native = _native()
    if isinstance(matrix, BlockCodedMatrix):
        return _decode(matrix)
    if native and matrix.data.device.type == "cpu" and _has_native(matrix):
        return native.dequantize(matrix, num_threads=torch.get_num_threads())
    return reference.dequantize(matrix)


def dequantize_low_rank(factors: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """left [N, R] and right [R, K], float32, on the factors' device."""
    return reference.dequantize_low_rank(factors, dequantize)


def gated_mlp(
    x_TH: torch.Tensor,
    mlp: GatedMLP,
    factors: GatedRepair | None = None,
    restored_T: torch.Tensor | None = None,
    *,
    backend: Backend,
) -> torch.Tensor:
    """down(act(gate x) * (up x)) for all tokens, [T, H] float32; T may be 0.

    x_TH is a float [T, H] on the mlp's device. The codes serve every token; `factors` are added
    only in rows where restored_T (bool [T], any device; None means all) is true. The cpu backends
    use at most torch.get_num_threads() threads.

    Raises ValueError when shapes, dtypes or the backend's name do not fit.
    """
    _check_gated_mlp(x_TH, mlp, factors, restored_T, backend)
    if x_TH.shape[0] == 0:
        return x_TH.new_zeros(x_TH.shape, dtype=torch.float32)
    if backend == "reference":
        return reference.gated_mlp(x_TH, mlp, factors, restored_T)
    if backend == "triton":
        return _triton().gated_mlp_many([MlpCall(x_TH, mlp, factors, restored_T)])[0]
    call = MlpCall(x_TH, mlp, factors, restored_T)
    native = _native_for(backend)
    if native and _is_fused(call, backend):
        return _fused(native, [call], backend, torch.get_num_threads())[0]
    return compose_gated_mlp(
        x_TH, mlp, factors, restored_T,
        matmul=_matmul_fp32, low_rank_matmul=_low_rank_matmul_fp32,
    )  # fmt: skip


def gated_mlp_many(
    calls: Sequence[MlpCall],
    *,
    backend: Backend = "cpu_int8",
    num_threads: int,
) -> list[torch.Tensor]:
    """Several MLPs, each on its own tokens: [T_i, H] float32 per call, in order.

    On a CPU those with packed matrices are one native call on at most num_threads threads (the GIL
    is released), repairs included, with cpu_fp32 those of up to TILEWISE_TOKENS tokens; a token's
    result is the same to the bit alone and in any such batch. triton runs those of few tokens each
    together in a handful of launches, on the device alone. Anything else runs one MLP after
    another. Raises ValueError as `gated_mlp` does and for num_threads below 1.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads: got {num_threads}, expected at least 1")
    for call in calls:
        _check_gated_mlp(call.x_TH, call.mlp, call.repair, call.restored_T, backend)
    if backend == "triton":
        return _triton().gated_mlp_many(calls)
    native = _native_for(backend)
    is_fused = [native is not None and _is_fused(call, backend) for call in calls]
    fused = [call for call, flag in zip(calls, is_fused, strict=True) if flag]
    fast = iter(_fused(native, fused, backend, num_threads) if native else ())
    return [
        next(fast)
        if flag
        else gated_mlp(call.x_TH, call.mlp, call.repair, call.restored_T, backend=backend)
        for call, flag in zip(calls, is_fused, strict=True)
    ]


def weighted_sum(
    outputs_PH: torch.Tensor, rows_P: torch.Tensor, weights_P: torch.Tensor, num_rows: int
) -> torch.Tensor | None:
    """[num_rows, H] float32 on the CPU: each pair's output times its weight, added to its row in
    the order of the pairs; None where there is no native library to do it in one call.

    Raises ValueError for a row outside num_rows and for what is not contiguous on the CPU.
    """
    _check_pairs(outputs_PH, rows_P, weights_P, num_rows)
    native = _native()
    return None if native is None else native.weighted_sum(outputs_PH, rows_P, weights_P, num_rows)


def _native_for(backend: Backend) -> ModuleType | None:
    """The module that runs a CPU backend's whole MLPs, if there is one."""
    if backend == "cpu_int8":
        return _native_or_warn()
    return _native() if backend == "cpu_fp32" else None


def _is_fused(call: MlpCall, backend: Backend) -> bool:
    """Whether one native call makes this MLP; in float32 many tokens are BLAS' part."""
    few = backend == "cpu_int8" or call.x_TH.shape[0] <= TILEWISE_TOKENS
    return few and _is_packed(call.mlp)


def _fused(
    native: ModuleType, calls: Sequence[MlpCall], backend: Backend, num_threads: int
) -> list[torch.Tensor]:
    numbers = "fp32" if backend == "cpu_fp32" else "int8"
    outputs: list[torch.Tensor] = native.gated_mlp_many(
        calls, numbers=numbers, num_threads=num_threads
    )
    return outputs


def _decode(matrix: BlockCodedMatrix) -> torch.Tensor:
    """By the device's own decoder: Triton on a GPU, native code or torch on a CPU."""
    if matrix.data.device.type == "cuda":
        return importlib.import_module("kernels.triton_block_code").decode_block_code(matrix)
    if matrix.data.device.type == "cpu" and _native():
        native = importlib.import_module("kernels.cpu_block_code")
        return native.decode_block_code(matrix, num_threads=torch.get_num_threads())
    return reference.dequantize(matrix)


def _matmul_fp32(matrix: Matrix, x_TK: torch.Tensor) -> torch.Tensor:
    """Tile by tile for few tokens; many pay for writing the whole matrix out as float32."""
    native = _native() if x_TK.shape[0] <= TILEWISE_TOKENS and _has_native(matrix) else None
    if native:
        return native.matmul_fp32(matrix, x_TK, num_threads=torch.get_num_threads())
    return x_TK @ dequantize(matrix).T


def _low_rank_matmul_fp32(factors: LowRank, x_TK: torch.Tensor) -> torch.Tensor:
    native = _native() if x_TK.shape[0] <= TILEWISE_TOKENS else None
    if native:
        return native.low_rank_matmul_fp32(factors, x_TK, num_threads=torch.get_num_threads())
    left_NR, right_RK = dequantize_low_rank(factors)
    return (x_TK @ right_RK.T) @ left_NR.T


def _is_packed(mlp: GatedMLP) -> bool:
    """Whether all three matrices have a native form."""
    return all(_has_native(matrix) for matrix in (mlp.gate, mlp.up, mlp.down))


def _has_native(matrix: Matrix) -> bool:
    return isinstance(matrix, QuantizedMatrix) and matrix.bits != 16


@functools.cache
def _native() -> ModuleType | None:
    """The native library's module, or None when it was not built (no compiler at install time)."""
    module = importlib.import_module("kernels.cpu_native")
    return module if module.is_available() else None


@functools.cache
def _native_or_warn() -> ModuleType | None:
    native = _native()
    if native is None:
        logger.warning(
            "the native CPU kernels were not built: cpu_int8 runs on torch in float32, about 100 "
            "times slower at one token. Install a C++ compiler (g++) and reinstall moetier."
        )
    return native


@functools.cache
def _triton() -> ModuleType:
    return importlib.import_module("kernels.triton_grouped")


def _check_pairs(
    outputs_PH: torch.Tensor, rows_P: torch.Tensor, weights_P: torch.Tensor, num_rows: int
) -> None:
    num_pairs = outputs_PH.shape[0]
    wanted = (
        ("outputs", outputs_PH, torch.float32, (num_pairs, outputs_PH.shape[-1])),
        ("rows", rows_P, torch.int64, (num_pairs,)),
        ("weights", weights_P, torch.float32, (num_pairs,)),
    )
    for name, got, dtype, shape in wanted:
        is_plain = got.device.type == "cpu" and got.is_contiguous()
        if got.dtype != dtype or tuple(got.shape) != shape or not is_plain:
            raise ValueError(
                f"{name}: expected contiguous {dtype} {list(shape)} on the cpu, got {got.dtype} "
                f"{tuple(got.shape)} on {got.device}"
            )
    rows = rows_P.numpy()
    if num_pairs and not 0 <= rows.min() <= rows.max() < num_rows:
        raise ValueError(f"rows: got {rows.min()} to {rows.max()}, expected 0 to {num_rows - 1}")


def _check_gated_mlp(
    x_TH: torch.Tensor,
    mlp: GatedMLP,
    factors: GatedRepair | None,
    restored_T: torch.Tensor | None,
    backend: Backend,
) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend: got {backend!r}, expected one of {get_args(Backend)}")
    if x_TH.dim() != 2 or x_TH.shape[1] != mlp.gate.cols or not x_TH.is_floating_point():
        raise ValueError(
            f"x: expected float [T, {mlp.gate.cols}], got {x_TH.dtype} {tuple(x_TH.shape)}"
        )
    if x_TH.device != mlp.gate.data.device:
        raise ValueError(f"x is on {x_TH.device}, the mlp on {mlp.gate.data.device}: move one")
    if backend in ("cpu_fp32", "cpu_int8") and x_TH.device.type != "cpu":
        raise ValueError(f"backend {backend!r} needs tensors on the cpu, got {x_TH.device}")
    if factors is not None:
        for name in ("gate", "up", "down"):
            added, matrix = getattr(factors, name), getattr(mlp, name)
            if (added.rows, added.cols) != (matrix.rows, matrix.cols):
                raise ValueError(
                    f"factors.{name}: [{added.rows}, {added.cols}] does not fit the matrix "
                    f"[{matrix.rows}, {matrix.cols}]"
                )
    if restored_T is not None and (
        restored_T.dtype != torch.bool or tuple(restored_T.shape) != (x_TH.shape[0],)
    ):
        raise ValueError(
            f"restored: expected bool [{x_TH.shape[0]}], got {restored_T.dtype} "
            f"{tuple(restored_T.shape)}"
        )
