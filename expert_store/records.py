"""One expert's codes record <-> bytes: where its parts lie, of tiles and of codec streams.

The layout is specified in `expert_store/format.py`. Knows no file and no manifest.

Legend: H hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expert_store.codecs import cuszp, sz3
from expert_store.errors import StoreFormatError
from expert_store.types import (
    PROJECTIONS,
    CodesForm,
    ExpertCodes,
    ExpertKey,
    ExpertShape,
    RecordKind,
)
from kernels.types import GROUP_SIZE, GatedMLP, Matrix, QuantizedMatrix, matrix_bytes

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector load of the kernels."""


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to the next multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def codes_bytes(shape: ExpertShape, form: CodesForm) -> int:
    """Bytes of a codes record."""
    return _codes_layout(shape, form)[-1]


def form_of(mlp: GatedMLP) -> CodesForm:
    """How `encode_codes` writes this MLP: bits and grid of each matrix, or the lengths of block
    codes.

    Raises ValueError when only some of the matrices are block codes.
    """
    matrices = (mlp.gate, mlp.up, mlp.down)
    tiles = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    if not tiles:
        return CodesForm.streams("cuszp", [matrix.data.numel() for matrix in matrices])
    if len(tiles) < len(matrices):
        raise ValueError("codes: expected three block codes in a record or none")
    gate, up, down = tiles
    sizes = sorted({matrix.group_size for matrix in tiles if matrix.bits != 16} or {GROUP_SIZE})
    if len(sizes) > 1:
        raise ValueError(f"codes: expected one group size in a record, got {sizes}")
    bits, grids = (gate.bits, up.bits, down.bits), (gate.grid, up.grid, down.grid)
    return CodesForm("tiles", bits, grids, group_size=sizes[0])


def device_form(form: CodesForm) -> CodesForm:
    """The form in which codes reach a device: of sz3, which only hosts decode, bfloat16."""
    return CodesForm.uniform(16) if form.codec == "sz3" else form


def decode_on_host(
    key: ExpertKey, data: torch.Tensor, shape: ExpertShape, form: CodesForm
) -> torch.Tensor:
    """A fetched codes record as it goes to a device, in `device_form`: the same, or sz3 decoded.

    Raises StoreFormatError for a record that is not of this form.
    """
    if form.codec != "sz3":
        return data
    return encode_codes(parse_codes(key, data, shape, form).mlp)


def encode_codes(mlp: GatedMLP) -> torch.Tensor:
    """The codes record of a low-bit (or bf16) gated MLP: a flat uint8 tensor; see `form_of`.

    Raises ValueError when only some biases are there.
    """
    return encode_parts(
        [matrix.data for matrix in (mlp.gate, mlp.up, mlp.down)],
        [mlp.gate_bias, mlp.up_bias, mlp.down_bias],
    )


def encode_parts(
    parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """The codes record of three byte parts, flat uint8, and the biases, in the order gate, up,
    down.

    Raises ValueError when only some biases are there.
    """
    present = [bias for bias in biases if bias is not None]
    if len(present) not in (0, 3):
        raise ValueError("biases: expected gate, up and down together or none")
    return joined([*parts, *(bias.float().contiguous().view(torch.uint8) for bias in present)])


def parse_codes(
    key: ExpertKey, data: torch.Tensor, shape: ExpertShape, form: CodesForm
) -> ExpertCodes:
    """View a codes record; nothing is copied. Only sz3 is decoded, and must lie on the CPU.

    `num_bytes` is what the codes take in memory: of sz3, the bfloat16 that it becomes. Raises
    StoreFormatError when the length is wrong or a codec cannot read its part.
    """
    *starts, total = _codes_layout(shape, form)
    check_record(key, "codes", data, total)
    matrices = [_matrix(key, data, shape, form, i, starts[i]) for i in range(len(PROJECTIONS))]
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
    return ExpertCodes(key, mlp, codes_bytes(shape, device_form(form)))


def _matrix(
    key: ExpertKey, data: torch.Tensor, shape: ExpertShape, form: CodesForm, index: int, start: int
) -> Matrix:
    """The `index`-th projection, whose part starts at `start`."""
    name = PROJECTIONS[index]
    rows, cols = shape.projection(name)
    if form.part_bytes is None:
        bits, grid, size = form.bits[index], form.grids[index], form.matrix_group_size(index)
        part = data[start : start + matrix_bytes(rows, cols, bits, grid, size)]
        return QuantizedMatrix(part, rows, cols, bits, size, grid)
    part = data[start : start + form.part_bytes[index]]
    decode = sz3.decode if form.codec == "sz3" else cuszp.decode
    try:
        return decode(part, rows, cols)
    except StoreFormatError as error:
        raise StoreFormatError(
            f"codes record of {key}, {name}: {error}; run `moetier verify`"
        ) from error


def _codes_layout(shape: ExpertShape, form: CodesForm) -> list[int]:
    """Start of every part of a codes record, then the record's length."""
    if form.part_bytes is not None:
        sizes = list(form.part_bytes)
    else:
        sizes = [
            matrix_bytes(
                *shape.projection(name), form.bits[i], form.grids[i], form.matrix_group_size(i)
            )
            for i, name in enumerate(PROJECTIONS)
        ]
    if shape.has_bias:
        sizes += [4 * shape.projection(name)[0] for name in PROJECTIONS]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + aligned(size))
    return starts


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts, each from the next multiple of the alignment on; the gaps are zero."""
    record = torch.zeros(sum(aligned(part.numel()) for part in parts), dtype=torch.uint8)
    at = 0
    for part in parts:
        record[at : at + part.numel()] = part
        at += aligned(part.numel())
    return record


def check_record(key: ExpertKey, kind: RecordKind, data: torch.Tensor, expected: int) -> None:
    """StoreFormatError unless the record has the bytes that its form says."""
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"data: expected a flat uint8 tensor, got {data.dtype} {data.dim()}-d")
    if data.numel() != expected:
        raise StoreFormatError(
            f"{kind} record of {key}: expected {expected} bytes, got {data.numel()}; "
            "the record is truncated or belongs to another store: run `moetier verify`"
        )
