"""Codec sz3: a weight within an error bound <-> bytes of the SZ3 library (`pysz`, BSD-3-Clause).

Rows or groups are divided by their step, so that SZ3's own bound is half a step everywhere; what is
served is bfloat16. The layout of a part, little-endian:

    header, 36 bytes  "MTS3", u8 version 1, u8 flags (1: a step per group, 2: flips), u16 0,
                      u32 rows, u32 cols, u64 bytes of the table, u64 bytes of the stream,
                      u32 crc32 of table and stream
    table             one zlib stream: the row steps, float32, as four planes of [rows] bytes, the
                      lowest first; u8 [rows, cols / 64] group factors (`kernels/steps.py`); then,
                      with flag 2, the flips to the end: a byte b under 255 skips b weights and
                      flips the next one, 255 skips 255 weights
    stream            SZ3's own, of float32 [rows, cols]

A flip says that the decoded float32 is to be rounded to the farther of its two bfloat16 neighbours:
the nearer one would break the bound.

Legend: N rows, K cols, G groups of 64 cols.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from expert_store.codecs.bound import ErrorBound, assert_within, check_weight, largest_error
from expert_store.errors import StoreError, StoreFormatError
from kernels.block_code import row_pieces
from kernels.packing import bf16_weight
from kernels.steps import GROUP_SIZE, steps, steps_within
from kernels.types import QuantizedMatrix

try:
    import pysz
except ImportError:  # no wheel for this platform: everything but this codec works without
    pysz = None

Predictor = Literal["none", "interpolation", "lorenzo"]
"""What SZ3 guesses a value from. Weights are white noise: none is smallest and fastest."""

Octets = npt.NDArray[np.uint8]

MAGIC = b"MTS3"
VERSION = 1
GROUPED, FLIPPED = 1, 2  # bits of the flags
HEADER = struct.Struct("<4sBBHIIQQI")
MAX_SIZE = 1 << 20
"""Rows, and cols, of a matrix: the store's limit of hidden and ffn."""
_ALGORITHMS = {"none": "NOPRED", "interpolation": "INTERP_LORENZO", "lorenzo": "LORENZO_REG"}


def encode(
    weight_NK: torch.Tensor, bound: ErrorBound, *, predictor: Predictor = "none"
) -> torch.Tensor:
    """The part (flat uint8) of a float [N, K] weight; every bfloat16 served is within the bound.

    The bound is checked on what the part decodes to. Raises ValueError for a weight that is not
    finite and for a bound that bfloat16 cannot hold (possible only where the weight itself is no
    bfloat16).
    """
    if predictor not in get_args(Predictor):
        raise ValueError(f"predictor: got {predictor!r}, expected one of {get_args(Predictor)}")
    check_weight(weight_NK)
    weight_NK = weight_NK.detach().cpu().float().contiguous()
    bound_NG = bound.of(weight_NK)
    _check_shape(*weight_NK.shape)
    row_step_N, factor_NG = steps_within(weight_NK, bound_NG)
    step_NG = steps(row_step_N, factor_NG)
    stream = _compress(_by_step(weight_NK, step_NG, torch.div), predictor)
    decoded_NK = _by_step(_decompress(stream, *weight_NK.shape), step_NG, torch.mul)
    flips_NK = _flips(weight_NK, decoded_NK, bound, bound_NG)
    data = _assemble(row_step_N, factor_NG, flips_NK, stream)
    served = decode(data, *weight_NK.shape)
    assert_within(weight_NK, bf16_weight(served), bound, "sz3")
    return data


def decode(data: torch.Tensor, rows: int, cols: int) -> QuantizedMatrix:
    """The bfloat16 matrix of a part; `data` lies on the CPU.

    Raises StoreFormatError for a part that is truncated, damaged or of another shape; nothing
    larger than the matrix is allocated before that is known.
    """
    _check_shape(rows, cols)
    flags, table, stream = _parse(data.contiguous().numpy(), rows, cols)
    planes = np.ascontiguousarray(table[: 4 * rows].reshape(4, rows).T)
    row_step_N = torch.from_numpy(planes.view("<f4")[:, 0].astype(np.float32))
    at, factor_NG = 4 * rows, None
    if flags & GROUPED:
        end = at + rows * (cols // GROUP_SIZE)
        factor_NG, at = torch.from_numpy(table[at:end].copy()).view(rows, -1), end
    decoded_NK = _decompress(stream, rows, cols)
    decoded_NK = _by_step(decoded_NK, steps(row_step_N, factor_NG), torch.mul)
    served_NK = decoded_NK.to(torch.bfloat16)
    if flags & FLIPPED:
        place, flat = _places(table[at:], rows, cols), served_NK.view(-1)
        flat[place] = _other_neighbour(decoded_NK.view(-1)[place])
    return QuantizedMatrix(served_NK.view(torch.uint8).view(-1), rows, cols, 16)


def _check_shape(rows: int, cols: int) -> None:
    if not (0 < rows <= MAX_SIZE and 0 < cols <= MAX_SIZE):
        raise ValueError(f"shape: got [{rows}, {cols}], expected 1 to {MAX_SIZE} rows and cols")


def _by_step(values_NK: torch.Tensor, step_NG: torch.Tensor, how: object) -> torch.Tensor:
    """values / step or values * step, whichever `how` does."""
    assert callable(how)
    grouped = values_NK.view(step_NG.shape[0], step_NG.shape[1], -1)
    result: torch.Tensor = how(grouped, step_NG[:, :, None])
    return result.view(values_NK.shape)


def _library() -> Any:
    if pysz is None:
        raise StoreError(
            "codec sz3 needs the package pysz, which is not installed here (it has wheels for "
            "x86-64 and macOS): pip install pysz==1.1.0 builds it where there is a C++ compiler, "
            "or use codec cuszp"
        )
    return pysz


def _compress(values_NK: torch.Tensor, predictor: Predictor) -> bytes:
    library = _library()
    config = library.szConfig()
    config.errorBoundMode = library.szErrorBoundMode.ABS
    config.absErrorBound = 0.5
    config.cmprAlgo = getattr(library.szAlgorithm, _ALGORITHMS[predictor])
    compressed, _ = library.sz.compress(values_NK.numpy(), config)
    return bytes(compressed.data)


def _decompress(stream: bytes | Octets, rows: int, cols: int) -> torch.Tensor:
    """SZ3's values float32 [N, K]. The stream is one of ours: its checksum was right."""
    octets = np.frombuffer(stream, np.uint8)
    try:
        values, _ = _library().sz.decompress(octets, np.float32, (rows, cols))
    except (ValueError, RuntimeError) as error:
        raise StoreFormatError(f"sz3 part: SZ3 cannot read the stream: {error}") from error
    return torch.from_numpy(values)


def _flips(
    weight_NK: torch.Tensor, decoded_NK: torch.Tensor, bound: ErrorBound, bound_NG: torch.Tensor
) -> torch.Tensor:
    """Where the nearer bfloat16 breaks the bound, bool [N, K]."""
    flips_NK = torch.empty(weight_NK.shape, dtype=torch.bool)
    for piece in row_pieces(*weight_NK.shape):
        weight, decoded, limit_NG = weight_NK[piece].double(), decoded_NK[piece], bound_NG[piece]
        limit = limit_NG.repeat_interleave(weight.shape[1] // limit_NG.shape[1], dim=1)
        flips = (decoded.to(torch.bfloat16).double() - weight).abs() > limit
        other = _other_neighbour(decoded[flips]).double()
        if bool(((other - weight[flips]).abs() > limit[flips]).any()):
            least = bound.value * largest_error(weight_NK, weight_NK.to(torch.bfloat16), bound_NG)
            raise ValueError(
                f"bound: {bound} is finer than bfloat16, which is served, on weights that are no "
                f"bfloat16 themselves; give at least {bound.mode}:{least:.3g}"
            )
        flips_NK[piece] = flips
    return flips_NK


def _other_neighbour(decoded: torch.Tensor) -> torch.Tensor:
    """The bfloat16 next to a float32 on the side where the nearest one is not."""
    nearest = decoded.to(torch.bfloat16)
    size, exact = nearest.float().abs(), decoded.abs()
    away = (size < exact).to(torch.int16) - (size > exact).to(torch.int16)
    return (nearest.view(torch.int16) + away).view(torch.bfloat16)


def _gaps(flips_NK: torch.Tensor) -> bytes:
    """Where the flips are, in the layout's bytes."""
    place = np.flatnonzero(flips_NK.numpy())
    skips, rest = np.divmod(np.diff(place, prepend=-1) - 1, 255)
    octets = np.full(skips.sum() + place.size, 255, np.uint8)
    octets[np.cumsum(skips + 1) - 1] = rest
    return octets.tobytes()


def _places(gaps: Octets, rows: int, cols: int) -> torch.Tensor:
    """Inverse of `_gaps`: flat indices."""
    ends = np.cumsum(gaps.astype(np.int64) + (gaps < 255))
    if ends.size and ends[-1] > rows * cols:
        raise StoreFormatError(f"sz3 part of [{rows}, {cols}]: a flip outside of the matrix")
    return torch.from_numpy(ends[gaps < 255] - 1)


def _assemble(
    row_step_N: torch.Tensor, factor_NG: torch.Tensor | None, flips_NK: torch.Tensor, stream: bytes
) -> torch.Tensor:
    planes = row_step_N.numpy().astype("<f4").view(np.uint8).reshape(-1, 4).T
    tables, flags = [planes.tobytes()], 0
    if factor_NG is not None:
        tables.append(factor_NG.numpy().tobytes())
        flags |= GROUPED
    if bool(flips_NK.any()):
        tables.append(_gaps(flips_NK))
        flags |= FLIPPED
    table = zlib.compress(b"".join(tables))
    rows, cols = flips_NK.shape
    crc = zlib.crc32(stream, zlib.crc32(table))
    head = HEADER.pack(MAGIC, VERSION, flags, 0, rows, cols, len(table), len(stream), crc)
    return torch.from_numpy(np.frombuffer(bytearray(head + table + stream), np.uint8))


def _parse(octets: Octets, rows: int, cols: int) -> tuple[int, Octets, Octets]:
    """Flags, unpacked table and stream of a part whose lengths and checksum are right."""
    if octets.size < HEADER.size:
        raise StoreFormatError(f"sz3 part: {octets.size} bytes, a header has {HEADER.size}")
    magic, version, flags, zero, told_rows, told_cols, table_bytes, stream_bytes, crc = (
        HEADER.unpack(octets[: HEADER.size].tobytes())
    )
    if magic != MAGIC or version != VERSION or flags > GROUPED + FLIPPED or zero:
        raise StoreFormatError(f"sz3 part: expected a header {MAGIC!r} {VERSION}, got {magic!r}")
    if (told_rows, told_cols) != (rows, cols):
        raise StoreFormatError(
            f"sz3 part: expected a [{rows}, {cols}] matrix, its header says "
            f"[{told_rows}, {told_cols}]"
        )
    if octets.size != HEADER.size + table_bytes + stream_bytes:
        raise StoreFormatError(
            f"sz3 part of [{rows}, {cols}]: {octets.size} bytes, its header announces "
            f"{HEADER.size + table_bytes + stream_bytes}: truncated or damaged"
        )
    body = octets[HEADER.size :]
    if zlib.crc32(body.data) != crc:
        raise StoreFormatError(f"sz3 part of [{rows}, {cols}]: damaged, its checksum is not right")
    table_size = 4 * rows + (rows * (cols // GROUP_SIZE) if flags & GROUPED else 0)
    largest = table_size + (rows * cols if flags & FLIPPED else 0)
    unpacker = zlib.decompressobj()
    try:
        table = unpacker.decompress(body[:table_bytes].tobytes(), largest + 1)
    except zlib.error as error:
        raise StoreFormatError(f"sz3 part of [{rows}, {cols}]: its table: {error}") from error
    if not unpacker.eof or not table_size <= len(table) <= largest:
        raise StoreFormatError(f"sz3 part of [{rows}, {cols}]: its table has another length")
    return flags, np.frombuffer(table, np.uint8), body[table_bytes:]
