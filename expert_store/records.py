"""One expert's record <-> bytes: where the parts of a codes and of a factors record lie.

The layout is specified in `expert_store/format.py`. Knows no file and no manifest.

Legend: H hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_store.errors import StoreFormatError
from expert_store.types import (
    PROJECTIONS,
    Compensator,
    ExpertCodes,
    ExpertKey,
    ExpertShape,
    Projection,
)
from kernels.types import (
    GatedMLP,
    GatedRepair,
    LowRank,
    QuantizedMatrix,
    block_bytes,
    matrix_bytes,
)

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector load of the kernels."""


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to the next multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class FactorBlock:
    """One rank block: 16 more ranks for one projection, both factors packed."""

    projection: Projection
    right: QuantizedMatrix  # [16, cols]
    left_t: QuantizedMatrix  # [16, rows]


def codes_bytes(shape: ExpertShape, bits: int) -> int:
    """Bytes of a codes record."""
    return _codes_layout(shape, bits)[-1]


def factors_bytes(shape: ExpertShape, blocks: Sequence[Projection], factor_bits: int) -> int:
    """Bytes of a factors record with these rank blocks, or of its prefix with these rank blocks."""
    return sum(block_bytes(*shape.projection(name), factor_bits) for name in blocks)


def encode_codes(mlp: GatedMLP) -> torch.Tensor:
    """The codes record of a low-bit (or bf16) gated MLP: a flat uint8 tensor.

    Raises ValueError when the three matrices differ in bits or only some biases are there.
    """
    matrices = (mlp.gate, mlp.up, mlp.down)
    gate, up, down = (m.bits if isinstance(m, QuantizedMatrix) else None for m in matrices)
    if gate is None or (up, down) != (gate, gate):
        raise ValueError(
            f"bits: expected one width in a record, got gate {gate}, up {up}, down {down}"
        )
    bits = gate
    biases = (mlp.gate_bias, mlp.up_bias, mlp.down_bias)
    present = [bias for bias in biases if bias is not None]
    if len(present) not in (0, 3):
        raise ValueError("biases: expected gate, up and down together or none")
    shape = ExpertShape(
        hidden=mlp.gate.cols,
        ffn=mlp.gate.rows,
        activation=mlp.activation,
        has_bias=bool(present),
    )
    *starts, total = _codes_layout(shape, bits)
    record = torch.zeros(total, dtype=torch.uint8)
    parts = [matrix.data for matrix in (mlp.gate, mlp.up, mlp.down)]
    parts += [bias.float().contiguous().view(torch.uint8) for bias in present]
    for start, part in zip(starts, parts, strict=True):
        record[start : start + part.numel()] = part
    return record


def parse_codes(key: ExpertKey, data: torch.Tensor, shape: ExpertShape, bits: int) -> ExpertCodes:
    """View a codes record; nothing is copied. Raises StoreFormatError when the length is wrong."""
    *starts, total = _codes_layout(shape, bits)
    _check_record(key, "codes", data, total)
    matrices = []
    for name, start in zip(PROJECTIONS, starts, strict=False):
        rows, cols = shape.projection(name)
        size = matrix_bytes(rows, cols, bits)
        matrices.append(QuantizedMatrix(data[start : start + size], rows, cols, bits))
    biases: list[torch.Tensor | None] = [None, None, None]
    if shape.has_bias:
        for i, name in enumerate(PROJECTIONS):
            start, rows = starts[3 + i], shape.projection(name)[0]
            part = data[start : start + 4 * rows]
            # A float32 view needs an aligned start; records from the wire may lie anywhere.
            part = part if part.storage_offset() % 4 == 0 else part.clone()
            biases[i] = part.view(torch.float32)
    mlp = GatedMLP(
        gate=matrices[0],
        up=matrices[1],
        down=matrices[2],
        activation=shape.activation,
        gate_bias=biases[0],
        up_bias=biases[1],
        down_bias=biases[2],
    )
    return ExpertCodes(key, mlp, total)


def encode_factors(blocks: Sequence[FactorBlock]) -> torch.Tensor:
    """The factors record of rank blocks in the order given: a flat uint8 tensor."""
    parts = [part.data for block in blocks for part in (block.right, block.left_t)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def parse_factors(
    key: ExpertKey,
    data: torch.Tensor,
    shape: ExpertShape,
    blocks: Sequence[Projection],
    factor_bits: int,
) -> Compensator:
    """View a factors record, or the prefix of it that has these blocks; nothing is copied.

    Raises StoreFormatError when the length is wrong.
    """
    _check_record(key, "factors", data, factors_bytes(shape, blocks, factor_bits))
    offsets: dict[Projection, list[int]] = {name: [] for name in PROJECTIONS}
    at = 0
    for name in blocks:
        offsets[name].append(at)
        at += block_bytes(*shape.projection(name), factor_bits)
    low_ranks = {
        name: LowRank(data, tuple(offsets[name]), *shape.projection(name), factor_bits)
        for name in PROJECTIONS
    }
    return Compensator(key, GatedRepair(low_ranks["gate"], low_ranks["up"], low_ranks["down"]), at)


def _codes_layout(shape: ExpertShape, bits: int) -> list[int]:
    """Start of every part of a codes record, then the record's length."""
    sizes = [matrix_bytes(*shape.projection(name), bits) for name in PROJECTIONS]
    if shape.has_bias:
        sizes += [4 * shape.projection(name)[0] for name in PROJECTIONS]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + aligned(size))
    return starts


def _check_record(key: ExpertKey, kind: str, data: torch.Tensor, expected: int) -> None:
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"data: expected a flat uint8 tensor, got {data.dtype} {data.dim()}-d")
    if data.numel() != expected:
        raise StoreFormatError(
            f"{kind} record of {key}: expected {expected} bytes, got {data.numel()}; "
            "the record is truncated or belongs to another store: run `moetier verify`"
        )
