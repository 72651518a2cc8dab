"""The native decoder of the block code through ctypes: the bits of torch, many times faster.

Loaded by `kernels/ops.py` only. Owns the mirror of `native/block_code.h`.

Legend: N rows, K cols.
"""

from __future__ import annotations

import ctypes

import torch

from kernels.block_code import BlockCodedMatrix, block_flags, block_sections
from kernels.cpu_native import Isa, isa_index, loaded, output

_OK, _MALFORMED = 0, 2
_INT32, _INT64 = ctypes.c_int32, ctypes.c_int64


class _BlockCode(ctypes.Structure):
    """MoetierBlockCode, field by field."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, _INT64) for name in ("num_bytes", "rows", "cols")),
        *((name, _INT64) for name in ("chunk_starts", "plane_counts", "factors", "payload")),
        *((name, _INT32) for name in ("is_differenced", "is_grouped")),
    )


def decode_block_code(
    matrix: BlockCodedMatrix,
    *,
    num_threads: int = 1,
    isa: Isa | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The [N, K] weight, the same bits as `kernels.block_code.decode_block_code`.

    Raises ValueError for data whose parts contradict one another.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads: got {num_threads}, expected at least 1")
    data = matrix.data.contiguous()
    weight_NK = output(out, matrix.rows, matrix.cols)
    sections = block_sections(matrix.rows, matrix.cols, block_flags(matrix))
    record = _BlockCode(
        data=data.data_ptr(),
        num_bytes=data.numel(),
        rows=matrix.rows,
        cols=matrix.cols,
        chunk_starts=sections.chunk_starts,
        plane_counts=sections.plane_counts,
        factors=sections.factors,
        payload=sections.payload,
        is_differenced=sections.is_differenced,
        is_grouped=sections.is_grouped,
    )
    status = loaded().moetier_decode_block_code(
        ctypes.addressof(record), weight_NK.data_ptr(), num_threads, isa_index(isa)
    )
    if status == _MALFORMED:
        raise ValueError(
            f"block code of [{matrix.rows}, {matrix.cols}]: its chunk starts, plane counts and "
            f"steps contradict its {data.numel()} bytes"
        )
    assert status == _OK, f"the native decoder answered {status}"
    return weight_NK
