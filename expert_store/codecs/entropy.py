"""The wire form of a record: the same bytes, entropy-coded by zstd, for the way between hosts.

Codes are white noise with few levels, so what zstd finds is their histogram alone. It finds it when
bytes of one kind stand together: codes, then the low and the high bytes of scales and of zeros.
A frame describes its own rearrangement, little-endian:

    "MTZW", u8 version 1, u8 0, u16 sections, u64 bytes of the record
    per section          u32 rows, u8 fields; per field: u8 kind, u16 bytes of a row
    per stream           u32 bytes here: as many as unpacked when it is stored as it is
    the streams          a zstd frame each, or the bytes themselves

The sections cover the record in order. A stream holds all fields of one kind, size and place in
their rows. Kinds: 0 bytes; 1 float16, split into two streams; 2 three-bit code planes, six codes'
bits to a byte made four times six bits. Knows no transport.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from expert_store.errors import StoreFormatError
from kernels.types import (
    GROUP_SIZE,
    TILE_ROWS,
    Grid,
    QuantizedMatrix,
    matrix_bytes,
    padded_rows,
    tiles_bytes,
)

FieldKind = Literal["bytes", "halves", "three_bit"]
Octets = npt.NDArray[np.uint8]

MAGIC = b"MTZW"
VERSION = 1
LEVEL = 1
"""Of zstd: codes have no repeats to search for, higher levels find nothing and are slower."""
MAX_SECTIONS = 1 << 14
MAX_FRAME_OVERHEAD = 1 << 20
"""Bytes that a frame may have more than its record: nothing larger is read."""
_HEADER = struct.Struct("<4sBBHQ")
_SECTION = struct.Struct("<IB")
_FIELD = struct.Struct("<BH")
_LENGTH = struct.Struct("<I")
_LOW_SIX, _LOW_TWO = np.uint64(0x3F3F3F3F3F3F3F3F), np.uint64(0x0303030303030303)
_ZERO, _TWO, _FOUR, _SIX = (np.uint64(shift) for shift in (0, 2, 4, 6))
_KINDS: tuple[FieldKind, ...] = get_args(FieldKind)


@dataclass(frozen=True, slots=True)
class Field:
    """Neighbouring bytes of one kind in every row of a section."""

    kind: FieldKind
    num_bytes: int

    def __post_init__(self) -> None:
        unit = {"bytes": 1, "halves": 2, "three_bit": 192}[self.kind]
        if not 0 < self.num_bytes < 1 << 16 or self.num_bytes % unit:
            raise ValueError(f"{self.kind} field: got {self.num_bytes} bytes, in units of {unit}")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a record that is an array of equal rows."""

    num_rows: int
    fields: tuple[Field, ...]

    @property
    def num_bytes(self) -> int:
        return self.num_rows * sum(field.num_bytes for field in self.fields)


def matrix_sections(
    rows: int, cols: int, bits: int, grid: Grid = "affine", group_size: int = GROUP_SIZE
) -> tuple[Section, ...]:
    """The sections of a packed matrix, in the layout of `kernels/types.py`."""
    if bits == 16:
        return (Section(rows * cols, (Field("halves", 2),)),)
    codes = Field("three_bit" if bits == 3 else "bytes", bits * 2 * group_size)
    num_groups = padded_rows(rows) // TILE_ROWS * (cols // group_size)
    if grid == "symmetric":
        scales = Section(num_groups, (codes, Field("bytes", TILE_ROWS)))
        form = (rows, cols, bits, grid, group_size)
        rest = matrix_bytes(*form) - tiles_bytes(*form)
        return (scales, Section(rest // 2, (Field("halves", 2),)))
    halves = Field("halves", 2 * TILE_ROWS)
    return (Section(num_groups, (codes, halves, halves)),)


def raw_sections(num_bytes: int) -> tuple[Section, ...]:
    """Sections of bytes whose structure is not known, or that are compressed already."""
    return (Section(num_bytes, (Field("bytes", 1),)),) if num_bytes else ()


def compress(record: torch.Tensor, sections: Sequence[Section], *, level: int = LEVEL) -> bytes:
    """The frame of a record, a flat uint8 tensor on the CPU that the sections cover exactly.

    Raises ValueError when they do not.
    """
    octets = record.contiguous().numpy()
    merged = _merged(sections)
    if octets.size != sum(section.num_bytes for section in merged):
        raise ValueError(
            f"record: {octets.size} bytes, its sections have "
            f"{sum(section.num_bytes for section in merged)}"
        )
    if len(merged) > MAX_SECTIONS:
        raise ValueError(f"record: {len(merged)} sections, at most {MAX_SECTIONS}")
    head = [_HEADER.pack(MAGIC, VERSION, 0, len(merged), octets.size)]
    for section in merged:
        head.append(_SECTION.pack(section.num_rows, len(section.fields)))
        head += [_FIELD.pack(_KINDS.index(f.kind), f.num_bytes) for f in section.fields]
    coder = zstandard.ZstdCompressor(level=level, write_checksum=True)
    streams = []
    for parts in _streams(merged):
        taken = [_taken(octets, part) for part in parts]
        stream = taken[0] if len(taken) == 1 else np.concatenate(taken)
        packed = coder.compress(stream.data)
        streams.append(packed if len(packed) < stream.size else stream.tobytes())
    lengths = [_LENGTH.pack(len(stream)) for stream in streams]
    return b"".join((*head, *lengths, *streams))


def decompress(frame: bytes | memoryview, num_bytes: int) -> torch.Tensor:
    """The record of a frame: `num_bytes` in a flat uint8 tensor.

    Raises StoreFormatError for a frame that is damaged or of another record. Nothing larger than
    the record is allocated, whatever the frame says.
    """
    view = memoryview(frame)
    try:
        sections, at = _read_sections(view, num_bytes)
        streams = _streams(sections)
        lengths = struct.unpack_from(f"<{len(streams)}I", view, at)
        at += _LENGTH.size * len(streams)
        if len(view) != at + sum(lengths):
            raise StoreFormatError(
                f"wire form: {len(view)} bytes, it announces {at + sum(lengths)}"
            )
        record, decoder = np.empty(num_bytes, np.uint8), zstandard.ZstdDecompressor()
        for parts, length in zip(streams, lengths, strict=True):
            size = sum(part.num_bytes for part in parts)
            values = _unpacked(decoder, view[at : at + length], size)
            at += length
            for part in parts:
                _put(record, part, values[: part.num_bytes])
                values = values[part.num_bytes :]
    except (struct.error, zstandard.ZstdError, ValueError) as error:
        raise StoreFormatError(f"wire form: damaged: {error}") from error
    return torch.from_numpy(record)


def wire_bytes(record: torch.Tensor, sections: Sequence[Section]) -> int:
    """Bytes of a record between hosts: what `compress` makes of it. The price of moving it."""
    return len(compress(record, sections))


def matrix_wire_bytes(matrix: QuantizedMatrix) -> int:
    """Bytes of one packed matrix between hosts, the frame's own head included."""
    form = (matrix.bits, matrix.grid, matrix.group_size)
    sections = matrix_sections(matrix.rows, matrix.cols, *form)
    return wire_bytes(matrix.data.cpu(), sections)


@dataclass(frozen=True, slots=True)
class _Part:
    """One field of one section, or one of the two byte planes of its halves."""

    start: int  # of the section in the record
    num_rows: int
    row_bytes: int
    column: int  # of the field in a row
    field: Field
    plane: int

    @property
    def num_bytes(self) -> int:
        """In its stream."""
        share = {"bytes": (1, 1), "halves": (1, 2), "three_bit": (4, 3)}[self.field.kind]
        return self.num_rows * self.field.num_bytes * share[0] // share[1]

    def of(self, record: Octets) -> Octets:
        """The field's bytes in the record: a view [num_rows, bytes]."""
        rows = record[self.start : self.start + self.num_rows * self.row_bytes]
        rows = rows.reshape(self.num_rows, self.row_bytes)
        return rows[:, self.column : self.column + self.field.num_bytes]


def _streams(sections: Sequence[Section]) -> list[list[_Part]]:
    """The parts of every stream, in the order of the record."""
    streams: dict[tuple[FieldKind, int, int, int], list[_Part]] = {}
    start = 0
    for section in sections:
        row_bytes = sum(field.num_bytes for field in section.fields)
        column = 0
        for i, field in enumerate(section.fields):
            for plane in range(2 if field.kind == "halves" else 1):
                part = _Part(start, section.num_rows, row_bytes, column, field, plane)
                streams.setdefault((field.kind, field.num_bytes, i, plane), []).append(part)
            column += field.num_bytes
        start += section.num_bytes
    return list(streams.values())


def _merged(sections: Sequence[Section]) -> list[Section]:
    """Neighbours of one form as one section."""
    merged: list[Section] = []
    for section in sections:
        if merged and merged[-1].fields == section.fields:
            section = Section(merged.pop().num_rows + section.num_rows, section.fields)
        merged.append(section)
    return merged


def _taken(record: Octets, part: _Part) -> Octets:
    values = part.of(record)
    if part.field.kind == "halves":
        values = values[:, part.plane :: 2]
    elif part.field.kind == "three_bit":
        return _sixes(np.ascontiguousarray(values)).reshape(-1)
    return np.ascontiguousarray(values).reshape(-1)


def _put(record: Octets, part: _Part, values: Octets) -> None:
    room = part.of(record)
    if part.field.kind == "halves":
        room[:, part.plane :: 2] = values.reshape(part.num_rows, -1)
    elif part.field.kind == "three_bit":
        room[:] = _threes(values).reshape(part.num_rows, -1)
    else:
        room[:] = values.reshape(part.num_rows, -1)


def _sixes(planes: Octets) -> Octets:
    """Bytes of three-bit planes, in threes of 64, to bytes of six bits, in fours of 64.

    Each of three bytes holds two codes in its low six bits and a third of two more on top. Eight
    bytes are moved at once.
    """
    threes = planes.view("<u8").reshape(-1, 3, 8)
    fours = np.empty((len(threes), 4, 8), "<u8")
    np.bitwise_and(threes, _LOW_SIX, out=fours[:, :3])
    top = threes >> _SIX & _LOW_TWO
    fours[:, 3] = top[:, 0] | top[:, 1] << _TWO | top[:, 2] << _FOUR
    return fours.view(np.uint8)


def _threes(sixes: Octets) -> Octets:
    """Inverse of `_sixes`."""
    fours = np.ascontiguousarray(sixes).view("<u8").reshape(-1, 4, 8)
    threes = fours[:, :3] & _LOW_SIX
    for place, shift in enumerate((_ZERO, _TWO, _FOUR)):
        threes[:, place] |= (fours[:, 3] >> shift & _LOW_TWO) << _SIX
    return threes.view(np.uint8)


def _read_sections(view: memoryview, num_bytes: int) -> tuple[list[Section], int]:
    """The sections that a frame announces, and where its lengths start."""
    magic, version, zero, num_sections, told = _HEADER.unpack_from(view)
    if magic != MAGIC or version != VERSION or zero:
        raise StoreFormatError(f"wire form: expected a frame {MAGIC!r} {VERSION}, got {magic!r}")
    if told != num_bytes or num_sections > MAX_SECTIONS:
        raise StoreFormatError(
            f"wire form: expected a record of {num_bytes} bytes, got one of {told} in "
            f"{num_sections} sections"
        )
    at, sections = _HEADER.size, []
    for _ in range(num_sections):
        num_rows, num_fields = _SECTION.unpack_from(view, at)
        at += _SECTION.size
        fields = []
        for _ in range(num_fields):
            kind, size = _FIELD.unpack_from(view, at)
            at += _FIELD.size
            if kind >= len(_KINDS):
                raise StoreFormatError(f"wire form: a field of kind {kind}, known are {_KINDS}")
            fields.append(Field(_KINDS[kind], size))
        sections.append(Section(num_rows, tuple(fields)))
    if sum(section.num_bytes for section in sections) != num_bytes:
        raise StoreFormatError(f"wire form: its sections do not cover {num_bytes} bytes")
    return sections, at


def _unpacked(decoder: zstandard.ZstdDecompressor, packed: memoryview, num_bytes: int) -> Octets:
    if len(packed) == num_bytes:
        return np.frombuffer(packed, np.uint8)
    if zstandard.frame_content_size(packed) != num_bytes:
        raise StoreFormatError(f"wire form: a stream is not of {num_bytes} bytes")
    return np.frombuffer(decoder.decompress(packed), np.uint8)
