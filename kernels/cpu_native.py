"""The native CPU kernels through ctypes: inputs and outputs of the right form, one call, a status.

What they are told is in `kernels/cpu_records.py`. Loaded by `kernels/ops.py` only. ctypes releases
the GIL while a kernel runs. Every function returns float32 on the CPU.

Legend: N rows, K cols, T tokens, H hidden.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal, get_args

import torch

from kernels.cpu_records import (
    GatedMlpRecord,
    LowRankRecord,
    MatrixRecord,
    gated_mlp_record,
    low_rank_record,
    matrix_record,
)
from kernels.types import LowRank, MlpCall, QuantizedMatrix

ABI_VERSION = 7
Isa = Literal["scalar", "avx2", "avx512vnni"]
"""Instruction sets in the order of MoetierIsa; the later, the faster."""
Numbers = Literal["int8", "fp32"]
"""What meets the codes: inputs rounded to int8 per token and group of 64, or as they are."""

_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled library with its signatures; None when it was not built."""
    names = (f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    path = next((p for p in map(Path(__file__).with_name, names) if p.exists()), None)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    found = library.moetier_abi_version()
    if found != ABI_VERSION:
        raise ImportError(
            f"{path} is a build of another version (ABI {found}, expected {ABI_VERSION}): "
            "reinstall moetier (pip install --force-reinstall --no-deps .)"
        )
    library.moetier_dequantize.argtypes = (_POINTER, _POINTER, _INT32, _INT32)
    product = (_POINTER, _POINTER, _INT64, _POINTER, _INT32, _INT32)
    for name in ("matmul", "low_rank_matmul", "matmul_fp32", "low_rank_matmul_fp32"):
        getattr(library, f"moetier_{name}").argtypes = product
    library.moetier_pin_helpers.argtypes = (_POINTER, _INT64)
    for name in ("gated_mlp_many", "gated_mlp_many_fp32"):
        getattr(library, f"moetier_{name}").argtypes = (_POINTER, _INT64, _INT32, _INT32)
    sizes = (_INT64, _INT64, _INT64)
    library.moetier_weighted_sum.argtypes = (_POINTER, _POINTER, _POINTER, *sizes, _POINTER)
    library.moetier_decode_block_code.argtypes = (_POINTER, _POINTER, _INT32, _INT32)
    return library


def is_available() -> bool:
    """Whether the compiled library is there. Raises ImportError when it is of another version."""
    return _library() is not None


@functools.cache
def best_isa() -> Isa:
    """The fastest instruction set this processor has."""
    names: tuple[Isa, ...] = get_args(Isa)
    return names[int(loaded().moetier_best_isa())]


def pin_helpers(cores: Sequence[int]) -> None:
    """Helper threads of this process stay on `cores`, round robin from the second.

    The first is left to the caller, which is not moved. Only Linux heeds it. Raises ValueError for
    no cores.
    """
    if not cores:
        raise ValueError("cores: got none, expected at least one")
    numbers = (_INT32 * len(cores))(*cores)
    _check(loaded().moetier_pin_helpers(ctypes.addressof(numbers), len(cores)))


def dequantize(
    matrix: QuantizedMatrix,
    *,
    num_threads: int = 1,
    isa: Isa | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The [N, K] weight, the same bits as the reference's."""
    weight_NK = output(out, matrix.rows, matrix.cols)
    record = matrix_record("matrix", matrix)
    status = loaded().moetier_dequantize(
        ctypes.addressof(record), weight_NK.data_ptr(), _threads(num_threads), isa_index(isa)
    )
    _check(status)
    return weight_NK


def matmul(
    matrix: QuantizedMatrix,
    x_TK: torch.Tensor,
    *,
    num_threads: int = 1,
    isa: Isa | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T as [T, N], x rounded to int8 per token and group of 64."""
    record = matrix_record("matrix", matrix)
    return _product("matmul", record, x_TK, num_threads, isa, out)


def matmul_fp32(
    matrix: QuantizedMatrix,
    x_TK: torch.Tensor,
    *,
    num_threads: int = 1,
    isa: Isa | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T as [T, N], nothing rounded; a token's result does not depend on its batch."""
    record = matrix_record("matrix", matrix)
    return _product("matmul_fp32", record, x_TK, num_threads, isa, out)


def low_rank_matmul(
    factors: LowRank,
    x_TK: torch.Tensor,
    *,
    num_threads: int = 1,
    isa: Isa | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """left @ (right @ x) per token as [T, N]; x rounded to int8, the middle kept in float32."""
    keep: list[object] = []
    record = low_rank_record(factors, keep)
    return _product("low_rank_matmul", record, x_TK, num_threads, isa, out)


def low_rank_matmul_fp32(
    factors: LowRank,
    x_TK: torch.Tensor,
    *,
    num_threads: int = 1,
    isa: Isa | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """left @ (right @ x) per token as [T, N], nothing rounded."""
    keep: list[object] = []
    record = low_rank_record(factors, keep)
    return _product("low_rank_matmul_fp32", record, x_TK, num_threads, isa, out)


def _product(
    name: str,
    record: MatrixRecord | LowRankRecord,
    x_TK: torch.Tensor,
    num_threads: int,
    isa: Isa | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    x = _input(x_TK, record.cols)
    y_TN = output(out, x.shape[0], record.rows)
    status = getattr(loaded(), f"moetier_{name}")(
        ctypes.addressof(record), x.data_ptr(), x.shape[0], y_TN.data_ptr(),
        _threads(num_threads), isa_index(isa),
    )  # fmt: skip
    _check(status)
    return y_TN


def gated_mlp_many(
    calls: Sequence[MlpCall],
    *,
    numbers: Numbers = "int8",
    num_threads: int = 1,
    isa: Isa | None = None,
    outs: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """[T_i, H] for each call with its repair, all in one native call that shares threads."""
    alive = [_input(call.x_TH, call.mlp.gate.cols) for call in calls]
    ys = [output(outs[i] if outs is not None else None, *x.shape) for i, x in enumerate(alive)]
    keep: list[object] = []
    records = (GatedMlpRecord * len(alive))(
        *(gated_mlp_record(call, x, y, keep) for call, x, y in zip(calls, alive, ys, strict=True))
    )
    library = loaded()
    run = (
        library.moetier_gated_mlp_many_fp32
        if numbers == "fp32"
        else (library.moetier_gated_mlp_many)
    )
    _check(run(ctypes.addressof(records), len(alive), _threads(num_threads), isa_index(isa)))
    return ys


def weighted_sum(
    outputs_PH: torch.Tensor, rows_P: torch.Tensor, weights_P: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """[num_rows, H]: each pair's output times its weight, added to its row in the pairs' order.

    Outputs and weights float32, rows int64, all contiguous on the CPU; rows are below num_rows.
    """
    num_pairs, hidden = outputs_PH.shape
    y_SH = torch.empty(num_rows, hidden)
    status = loaded().moetier_weighted_sum(
        outputs_PH.data_ptr(), rows_P.data_ptr(), weights_P.data_ptr(),
        num_pairs, hidden, num_rows, y_SH.data_ptr(),
    )  # fmt: skip
    _check(status)
    return y_SH


def loaded() -> ctypes.CDLL:
    """The library, which must be there."""
    library = _library()
    assert library is not None, "kernels.ops asks is_available() before it calls a native kernel"
    return library


def _check(status: int) -> None:
    if status:
        raise MemoryError("a native kernel could not allocate its scratch memory")


def _input(x: torch.Tensor, cols: int) -> torch.Tensor:
    """x as contiguous float32 (itself when it is so already)."""
    if x.dim() != 2 or x.shape[1] != cols or x.device.type != "cpu":
        raise ValueError(f"x: expected [T, {cols}] on the cpu, got {tuple(x.shape)} on {x.device}")
    return x.detach().float().contiguous()


def output(out: torch.Tensor | None, rows: int, cols: int) -> torch.Tensor:
    """`out` after a check, or fresh memory: float32 [rows, cols]."""
    if out is None:
        return torch.empty(rows, cols)
    if (
        out.dtype != torch.float32
        or tuple(out.shape) != (rows, cols)
        or out.device.type != "cpu"
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"out: expected contiguous float32 [{rows}, {cols}] on the cpu, got {out.dtype} "
            f"{tuple(out.shape)} on {out.device}"
        )
    return out


def _threads(num_threads: int) -> int:
    if num_threads < 1:
        raise ValueError(f"num_threads: got {num_threads}, expected at least 1")
    return num_threads


def isa_index(isa: Isa | None) -> int:
    """MoetierIsa of a name, the best for None. ValueError for one this processor has not."""
    best = best_isa()
    names = get_args(Isa)
    if isa is None:
        return names.index(best)
    if isa not in names or names.index(isa) > names.index(best):
        raise ValueError(f"isa: got {isa!r}, this processor has {names[: names.index(best) + 1]}")
    return names.index(isa)
