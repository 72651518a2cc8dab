"""Which bytes of a record are of one kind: what `expert_store/codecs/entropy.py` needs to know.

Knows no transport.
"""

from __future__ import annotations

from collections.abc import Iterator

from expert_store.codecs.entropy import Section, matrix_sections, raw_sections
from expert_store.factor_records import factors_bytes
from expert_store.records import aligned, codes_bytes
from expert_store.types import (
    PROJECTIONS,
    CodesForm,
    ExpertShape,
    Manifest,
    RecordRequest,
    RepairForm,
)
from kernels.types import TILE_ROWS


def record_sections(manifest: Manifest, request: RecordRequest) -> tuple[Section, ...]:
    """The sections of the bytes asked for, a prefix included. KeyError for an unknown expert."""
    info, shape = manifest.experts[request.key], manifest.model.expert
    if request.kind == "codes":
        return codes_sections(shape, info.form)
    repair = info.repair
    return factors_sections(
        shape, repair if request.num_blocks is None else repair.prefix(request.num_blocks)
    )


def codes_sections(shape: ExpertShape, form: CodesForm) -> tuple[Section, ...]:
    """The sections of a codes record. A codec's streams are left as they are."""
    sections: list[Section] = []
    for i, name in enumerate(PROJECTIONS):
        if form.part_bytes is None:
            size = form.matrix_group_size(i)
            part = matrix_sections(*shape.projection(name), form.bits[i], form.grids[i], size)
        else:
            part = raw_sections(form.part_bytes[i])
        sections += _padded(part)
    if shape.has_bias:
        for name in PROJECTIONS:
            sections += _padded(raw_sections(4 * shape.projection(name)[0]))
    assert _size(sections) == codes_bytes(shape, form), f"{_size(sections)} bytes of sections"
    return tuple(sections)


def factors_sections(shape: ExpertShape, repair: RepairForm) -> tuple[Section, ...]:
    """The sections of a factors record of this form."""
    sections: list[Section] = []
    for block in repair.blocks:
        rows, cols = shape.projection(block.projection)
        if block.kind == "plane":
            sections += _padded(matrix_sections(rows, cols, 1, "symmetric"))
        else:
            for size in (cols, rows):
                factor = matrix_sections(TILE_ROWS, size, repair.bits, repair.grid)
                sections += _padded(factor)
    assert _size(sections) == factors_bytes(shape, repair), f"{_size(sections)} bytes of sections"
    return tuple(sections)


def _padded(part: tuple[Section, ...]) -> Iterator[Section]:
    """A part and the gap after it."""
    yield from part
    yield from raw_sections(aligned(_size(part)) - _size(part))


def _size(sections: tuple[Section, ...] | list[Section]) -> int:
    return sum(section.num_bytes for section in sections)
