"""One expert's factors record <-> bytes: rank blocks and planes in order, any prefix valid.

The layout is specified in `expert_store/format.py`. Knows no file and no manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from expert_store.records import aligned, check_record, joined
from expert_store.types import (
    PROJECTIONS,
    Compensator,
    ExpertKey,
    ExpertShape,
    Projection,
    RepairBlockSpec,
    RepairForm,
)
from kernels.types import GatedRepair, LowRank, QuantizedMatrix, block_bytes, matrix_bytes

PLANE_BITS = 1


@dataclass(frozen=True, slots=True)
class FactorBlock:
    """One rank block: 16 more ranks for one projection, both factors packed alike."""

    projection: Projection
    right: QuantizedMatrix  # [16, cols]
    left_t: QuantizedMatrix  # [16, rows]

    @property
    def spec(self) -> RepairBlockSpec:
        return RepairBlockSpec(self.projection, "rank")

    @property
    def num_bytes(self) -> int:
        """In a record, padding included."""
        return aligned(self.right.data.numel()) + aligned(self.left_t.data.numel())


@dataclass(frozen=True, slots=True)
class PlaneBlock:
    """One refinement plane: one more bit for every weight of one projection."""

    projection: Projection
    plane: QuantizedMatrix  # [rows, cols], 1 bit, symmetric

    @property
    def spec(self) -> RepairBlockSpec:
        return RepairBlockSpec(self.projection, "plane")

    @property
    def num_bytes(self) -> int:
        """In a record, padding included."""
        return aligned(self.plane.data.numel())


def factors_bytes(shape: ExpertShape, repair: RepairForm) -> int:
    """Bytes of a factors record of this form; of a prefix with the form's prefix."""
    return sum(_block_sizes(shape, repair))


def blocks_within(shape: ExpertShape, repair: RepairForm, max_bytes: float) -> int:
    """How many of the first blocks of a factors record have `max_bytes` or less together."""
    used = 0
    for count, size in enumerate(_block_sizes(shape, repair)):
        used += size
        if used > max_bytes:
            return count
    return len(repair.blocks)


def encode_factors(blocks: Sequence[FactorBlock | PlaneBlock]) -> torch.Tensor:
    """The factors record of blocks in the order given: a flat uint8 tensor.

    Raises ValueError when rank blocks differ in bits or grid, or a plane is not a symmetric bit.
    """
    widths = set()
    parts: list[torch.Tensor] = []
    for block in blocks:
        if isinstance(block, PlaneBlock):
            if (block.plane.bits, block.plane.grid) != (PLANE_BITS, "symmetric"):
                raise ValueError(
                    f"plane of {block.projection}: got {block.plane.bits} bits on grid "
                    f"{block.plane.grid}, expected 1 bit, symmetric"
                )
            parts.append(block.plane.data)
        else:
            widths |= {(factor.bits, factor.grid) for factor in (block.right, block.left_t)}
            parts += [block.right.data, block.left_t.data]
    if len(widths) > 1:
        raise ValueError(
            f"rank blocks: got {sorted(widths)}, expected one width and grid in a record"
        )
    return joined(parts)


def parse_factors(
    key: ExpertKey, data: torch.Tensor, shape: ExpertShape, repair: RepairForm
) -> Compensator:
    """View a factors record, or the prefix of it that has this form; nothing is copied.

    Raises StoreFormatError when the length is wrong.
    """
    sizes = list(_block_sizes(shape, repair))
    check_record(key, "factors", data, sum(sizes))
    offsets: dict[Projection, list[int]] = {name: [] for name in PROJECTIONS}
    planes: dict[Projection, list[QuantizedMatrix]] = {name: [] for name in PROJECTIONS}
    at = 0
    for block, size in zip(repair.blocks, sizes, strict=True):
        name = block.projection
        if block.kind == "rank":
            offsets[name].append(at)
        else:
            rows, cols = shape.projection(name)
            part = data[at : at + matrix_bytes(rows, cols, PLANE_BITS, "symmetric")]
            plane = QuantizedMatrix(part, rows, cols, PLANE_BITS, grid="symmetric")
            planes[name].append(plane)
        at += size
    gate, up, down = (
        LowRank(data, tuple(offsets[name]), *shape.projection(name), repair.bits, repair.grid)
        for name in PROJECTIONS
    )
    factors = GatedRepair(
        gate,
        up,
        down,
        gate_planes=tuple(planes["gate"]),
        up_planes=tuple(planes["up"]),
        down_planes=tuple(planes["down"]),
    )
    return Compensator(key, factors, at, repair)


def _block_sizes(shape: ExpertShape, repair: RepairForm) -> Iterable[int]:
    """Bytes of each block of a factors record, in order; each starts where the last one ends."""
    known: dict[RepairBlockSpec, int] = {}
    for block in repair.blocks:
        if block not in known:
            rows, cols = shape.projection(block.projection)
            known[block] = (
                block_bytes(rows, cols, repair.bits, repair.grid)
                if block.kind == "rank"
                else aligned(matrix_bytes(rows, cols, PLANE_BITS, "symmetric"))
            )
        yield known[block]
