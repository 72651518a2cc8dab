"""What the native kernels are told: ctypes mirrors of `native/moetier_kernels.h`, checked.

Where and how each tensor lies in memory is checked here; that a call's shapes fit each other, by
`kernels/ops.py` before. Owns no memory: who makes a record keeps what it points to alive until the
call is over. Used by `kernels/cpu_native.py`.

Legend: T tokens, H hidden.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, get_args

import torch

from kernels.types import (
    Activation,
    GatedMLP,
    GatedRepair,
    Grid,
    LowRank,
    Matrix,
    MlpCall,
    QuantizedMatrix,
)

Owner = TypeVar("Owner")
Record = TypeVar("Record")
_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class MatrixRecord(ctypes.Structure):
    """MoetierMatrix, field by field."""

    _fields_ = (
        ("data", _POINTER),
        *((name, _INT64) for name in ("rows", "cols")),
        *((name, _INT32) for name in ("bits", "grid")),
        ("group_size", _INT64),
    )


class LowRankRecord(ctypes.Structure):
    """MoetierLowRank, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("data", "block_offsets")),
        *((name, _INT64) for name in ("num_blocks", "rows", "cols")),
        *((name, _INT32) for name in ("bits", "grid")),
    )


class RepairRecord(ctypes.Structure):
    """MoetierRepair, field by field."""

    _fields_ = (("low_rank", LowRankRecord), ("planes", _POINTER), ("num_planes", _INT64))


class GatedMlpRecord(ctypes.Structure):
    """MoetierGatedMlp, field by field."""

    _fields_ = (
        *((name, MatrixRecord) for name in ("gate", "up", "down")),
        *((name, _POINTER) for name in ("repair", "restored")),
        *((name, _POINTER) for name in ("gate_bias", "up_bias", "down_bias")),
        *((name, _POINTER) for name in ("x", "y")),
        *((name, _INT64) for name in ("tokens", "activation")),
    )


_GRID = {name: i for i, name in enumerate(get_args(Grid))}
_ACTIVATION = {name: i for i, name in enumerate(get_args(Activation))}


def gated_mlp_record(
    call: MlpCall, x_TH: torch.Tensor, y_TH: torch.Tensor, keep: list[Any]
) -> GatedMlpRecord:
    """One call on inputs and outputs of the right form; what it points to besides goes to `keep`.

    Raises ValueError for what has no native form.
    """
    record = GatedMlpRecord.from_buffer_copy(_MLPS.get(call.mlp))
    record.x, record.y, record.tokens = x_TH.data_ptr(), y_TH.data_ptr(), x_TH.shape[0]
    if call.repair is not None and not call.repair.is_empty:
        repairs = _REPAIRS.get(call.repair)
        keep.append(repairs)
        record.repair = ctypes.addressof(repairs.records)
        if call.restored_T is not None:
            restored = call.restored_T.to("cpu", torch.uint8).contiguous()
            keep.append(restored)
            record.restored = restored.data_ptr()
    return record


class _Made(Generic[Owner, Record]):
    """What was made for each weight, as long as the weight lives: a step asks for it anew for every
    expert, and making it takes longer than a small product. Weights never change or move."""

    def __init__(self, make: Callable[[Owner], Record]) -> None:
        self._make = make
        self._made: dict[int, tuple[weakref.ref[Owner], Record]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def get(self, owner: Owner) -> Record:
        found = self._made.get(id(owner))
        # Another object at the address of one that died is never taken for it.
        if found is not None and found[0]() is owner:
            return found[1]
        made, name = self._make(owner), id(owner)
        self._made[name] = weakref.ref(owner, partial(self._forget, name)), made
        return made

    def _forget(self, name: int, died: weakref.ref[Owner]) -> None:
        found = self._made.get(name)
        if found is not None and found[0] is died:
            del self._made[name]


def _mlp_record(mlp: GatedMLP) -> GatedMlpRecord:
    """All but the tokens."""
    hidden, ffn = mlp.gate.cols, mlp.gate.rows
    return GatedMlpRecord(
        gate=matrix_record("gate", mlp.gate),
        up=matrix_record("up", mlp.up),
        down=matrix_record("down", mlp.down),
        gate_bias=_bias_pointer("gate_bias", mlp.gate_bias, ffn),
        up_bias=_bias_pointer("up_bias", mlp.up_bias, ffn),
        down_bias=_bias_pointer("down_bias", mlp.down_bias, hidden),
        activation=_ACTIVATION[mlp.activation],
    )


@dataclass(frozen=True, slots=True)
class _Repairs:
    """The records of gate, up and down, in this order, and what they point to."""

    records: ctypes.Array[RepairRecord]
    keep: list[Any]


def _repair_records(repair: GatedRepair) -> _Repairs:
    made = _Repairs((RepairRecord * 3)(), [])
    parts = (
        (repair.gate, repair.gate_planes),
        (repair.up, repair.up_planes),
        (repair.down, repair.down_planes),
    )
    for record, (low_rank, matrices) in zip(made.records, parts, strict=True):
        planes = (MatrixRecord * len(matrices))(*(matrix_record("plane", m) for m in matrices))
        made.keep.append(planes)
        record.low_rank = low_rank_record(low_rank, made.keep)
        record.planes, record.num_planes = ctypes.addressof(planes), len(matrices)
    return made


_MLPS, _REPAIRS = _Made(_mlp_record), _Made(_repair_records)


def low_rank_record(factors: LowRank, keep: list[Any]) -> LowRankRecord:
    """The factors; their block offsets go to `keep`."""
    num_blocks = len(factors.block_offsets)
    offsets = (_INT64 * num_blocks)(*factors.block_offsets)
    keep.append(offsets)
    return LowRankRecord(
        data=_bytes_pointer("factors", factors.data),
        block_offsets=ctypes.addressof(offsets),
        num_blocks=num_blocks,
        rows=factors.rows,
        cols=factors.cols,
        bits=factors.bits,
        grid=_GRID[factors.grid],
    )


def matrix_record(name: str, matrix: Matrix) -> MatrixRecord:
    """The caller keeps the matrix alive. Bits and grid were checked by its type."""
    if not isinstance(matrix, QuantizedMatrix):
        raise ValueError(f"{name}: a {type(matrix).__name__} has no native product; decode it")
    if matrix.bits == 16:
        raise ValueError(f"{name}: bits 16 has no native form")
    return MatrixRecord(
        data=_bytes_pointer(name, matrix.data),
        rows=matrix.rows,
        cols=matrix.cols,
        bits=matrix.bits,
        grid=_GRID[matrix.grid],
        group_size=matrix.group_size,
    )


def _bytes_pointer(name: str, data: torch.Tensor) -> int:
    """Length and dtype were checked by the data's owner (kernels/types.py)."""
    if data.device.type != "cpu" or not data.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous bytes on the cpu, got {data.device} with stride "
            f"{data.stride()}"
        )
    return int(data.data_ptr())


def _bias_pointer(name: str, bias: torch.Tensor | None, size: int) -> int | None:
    if bias is None:
        return None
    if (
        bias.dtype != torch.float32
        or tuple(bias.shape) != (size,)
        or bias.device.type != "cpu"
        or not bias.is_contiguous()
    ):
        raise ValueError(
            f"{name}: expected contiguous float32 [{size}] on the cpu, got {bias.dtype} "
            f"{tuple(bias.shape)} on {bias.device}"
        )
    return int(bias.data_ptr())
