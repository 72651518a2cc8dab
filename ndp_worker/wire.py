"""The bytes of a near-data call and of its answer, and the limits both sides keep.

A frame is a 40-byte header, little-endian, then the body:
    magic "MTND" | u16 wire version | u16 kind | u64 request id | u32 layer | u32 experts
    | u32 rows | u32 tokens | u32 hidden | u16 dtype | u16 reserved, 0
    call (kind 1):   i32 expert ids [experts], i32 row counts [experts], i32 block counts [experts],
                     i32 token rows [rows], u8 restored [rows], zeros up to a multiple of 4 bytes,
                     activations [tokens, hidden]
    answer (kind 2): i32 degraded [experts], outputs [rows, hidden]; layer and tokens are 0
    error (kinds 3 to 5: the caller's fault, unavailable, corrupt): UTF-8 text of `rows` bytes
dtype 0 is float32, 1 bfloat16, 2 float16. A row is restored (1) or not (0); the block count of an
expert is how many blocks of its compensator its restored rows get, -1 for all of them and for an
expert that has no restored row. Degraded are, in rising order, the places in the call of experts
whose restored rows ran from codes alone. Knows no transport.

Legend: T tokens, P (expert, token) pairs, H hidden.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from expert_store.errors import CorruptRecordError, ExpertUnavailableError, StoreError
from expert_store.types import ExpertKey, ExpertOutputs, ExpertTokens

MAGIC = b"MTND"
WIRE_VERSION = 2
MAX_EXPERTS = 4096
MAX_TOKENS = 65536
MAX_PAIRS = 2**20
MAX_HIDDEN = 65536
MAX_ERROR_BYTES = 4096

CALL, ANSWER, BAD_CALL, UNAVAILABLE, CORRUPT = 1, 2, 3, 4, 5
_ALL_BLOCKS = -1
_HEADER = struct.Struct("<4sHHQIIIIIHH")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ERRORS: dict[int, type[StoreError] | type[ValueError]] = {
    BAD_CALL: ValueError,
    UNAVAILABLE: ExpertUnavailableError,
    CORRUPT: CorruptRecordError,
}


@dataclass(frozen=True, slots=True)
class Call:
    """A decoded call."""

    request_id: int
    hidden_TH: torch.Tensor  # [T, H], a view of the message
    work: tuple[ExpertTokens, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A decoded answer: outputs, or what went wrong."""

    request_id: int
    result: ExpertOutputs | StoreError | ValueError


def used_rows(work: Sequence[ExpertTokens]) -> tuple[list[int], tuple[ExpertTokens, ...]]:
    """The rows of the hidden states that some expert needs, in order, and the same work on only
    those rows: what the others hold does not have to travel.
    """
    rows = sorted({row for item in work for row in item.token_rows})
    place = {row: index for index, row in enumerate(rows)}
    return rows, tuple(
        replace(item, token_rows=tuple(place[row] for row in item.token_rows)) for item in work
    )


def encode_call(request_id: int, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]) -> bytes:
    """The bytes of a call; hidden_TH [T, H] on the CPU, `work` of one layer.

    Raises ValueError when a limit is exceeded.
    """
    num_tokens, hidden = hidden_TH.shape
    counts = [len(item.token_rows) for item in work]
    header = _Header(
        kind=CALL,
        request_id=request_id,
        layer=work[0].key.layer if work else 0,
        num_experts=len(work),
        num_rows=sum(counts),
        num_tokens=num_tokens,
        hidden=hidden,
        dtype=hidden_TH.dtype,
    )
    _check_limits(header)
    experts = [item.key.expert for item in work]
    blocks = [_ALL_BLOCKS if item.num_blocks is None else item.num_blocks for item in work]
    rows = [row for item in work for row in item.token_rows]
    indices = np.array(experts + counts + blocks + rows, dtype="<i4").tobytes()
    # bytes(n) are n zeros: the flags of an expert without a restored row.
    restored = b"".join(bytes(item.restored or len(item.token_rows)) for item in work)
    restored += bytes(_padding(len(rows)))
    return b"".join((_pack(header), indices, restored, _tensor_bytes(hidden_TH)))


def decode_call(message: bytes) -> Call:
    """The call in a message. Raises ValueError, naming the field, for anything malformed.

    Token rows are checked against the number of tokens; experts and their blocks are the
    executor's to check.
    """
    header = _unpack(message)
    if header.kind != CALL:
        raise ValueError(f"kind: got {header.kind}, a server expects calls ({CALL})")
    _check_limits(header)
    num_experts, num_pairs, num_tokens = header.num_experts, header.num_rows, header.num_tokens
    num_indices = 3 * num_experts + num_pairs
    flags_start = _HEADER.size + 4 * num_indices
    start = flags_start + num_pairs + _padding(num_pairs)
    _check_length(message, start + num_tokens * header.hidden * header.dtype.itemsize)
    indices = np.frombuffer(message, "<i4", num_indices, _HEADER.size)
    experts, counts, blocks = indices[: 3 * num_experts].reshape(3, num_experts)
    rows = indices[3 * num_experts :]
    flags = np.frombuffer(message, np.uint8, start - flags_start, flags_start)
    if (experts < 0).any():
        raise ValueError("expert ids: negative")
    if (counts < 0).any() or int(counts.sum(dtype=np.int64)) != num_pairs:
        raise ValueError(f"row counts: do not add up to the {num_pairs} rows of the header")
    if ((rows < 0) | (rows >= num_tokens)).any():
        raise ValueError(f"token rows: outside 0 to {num_tokens - 1}")
    if (flags > 1).any() or flags[num_pairs:].any():
        raise ValueError("restored: a flag other than 0 and 1, or padding other than 0")
    if (blocks < _ALL_BLOCKS).any():
        raise ValueError(f"block counts: below {_ALL_BLOCKS}")
    ends = counts.cumsum()
    work = tuple(
        _expert_tokens(
            ExpertKey(header.layer, int(expert)),
            rows[end - count : end],
            flags[end - count : end],
            int(num_blocks),
        )
        for expert, count, num_blocks, end in zip(experts, counts, blocks, ends, strict=True)
    )
    hidden_TH = _tensor(message, start, header.dtype, num_tokens, header.hidden)
    return Call(header.request_id, hidden_TH, work)


def encode_answer(request_id: int, outputs: ExpertOutputs) -> bytes:
    """The bytes of an answer."""
    num_rows, hidden = outputs.output_PH.shape
    header = _Header(
        kind=ANSWER,
        request_id=request_id,
        num_experts=len(outputs.degraded),
        num_rows=num_rows,
        hidden=hidden,
        dtype=outputs.output_PH.dtype,
    )
    degraded = np.array(outputs.degraded, dtype="<i4").tobytes()
    return _pack(header) + degraded + _tensor_bytes(outputs.output_PH)


def encode_error(request_id: int, error: StoreError | ValueError) -> bytes:
    """The bytes of a failed call's answer; a long message is cut to MAX_ERROR_BYTES."""
    kind = UNAVAILABLE
    if isinstance(error, CorruptRecordError):
        kind = CORRUPT
    elif isinstance(error, ValueError):
        kind = BAD_CALL
    text = str(error).encode()[:MAX_ERROR_BYTES]
    return _pack(_Header(kind, request_id, num_rows=len(text))) + text


def decode_answer(message: bytes) -> Answer:
    """The answer in a message. Raises ValueError for anything malformed."""
    header = _unpack(message)
    if header.kind == ANSWER:
        _check_limits(header)
        num_rows, hidden, dtype = header.num_rows, header.hidden, header.dtype
        start = _HEADER.size + 4 * header.num_experts
        _check_length(message, start + num_rows * hidden * dtype.itemsize)
        degraded = np.frombuffer(message, "<i4", header.num_experts, _HEADER.size)
        if (np.diff(degraded, prepend=-1) < 1).any():
            raise ValueError("degraded: places in a call are 0 or more and rise")
        output_PH = _tensor(message, start, dtype, num_rows, hidden)
        return Answer(header.request_id, ExpertOutputs(output_PH, tuple(degraded.tolist())))
    if header.kind not in _ERRORS:
        raise ValueError(f"kind: got {header.kind}, a client expects an answer or an error")
    _check_length(message, _HEADER.size + header.num_rows)
    text = message[_HEADER.size :].decode(errors="replace")
    return Answer(header.request_id, _ERRORS[header.kind](text))


def request_id_of(message: bytes) -> int:
    """The request id of a frame whose header can be read, else 0, which no call has."""
    if len(message) < _HEADER.size or message[:4] != MAGIC:
        return 0
    return int(_HEADER.unpack_from(message)[3])


@dataclass(frozen=True, slots=True)
class _Header:
    kind: int
    request_id: int
    layer: int = 0
    num_experts: int = 0  # of a call, or those degraded of an answer
    num_rows: int = 0  # pairs of a call, outputs of an answer, text bytes of an error
    num_tokens: int = 0
    hidden: int = 0
    dtype: torch.dtype = torch.float32


def _pack(header: _Header) -> bytes:
    if header.dtype not in _DTYPES:
        raise ValueError(f"dtype: got {header.dtype}, expected one of {_DTYPES}")
    return _HEADER.pack(
        MAGIC,
        WIRE_VERSION,
        header.kind,
        header.request_id,
        header.layer,
        header.num_experts,
        header.num_rows,
        header.num_tokens,
        header.hidden,
        _DTYPES.index(header.dtype),
        0,
    )


def _unpack(message: bytes) -> _Header:
    if len(message) < _HEADER.size:
        raise ValueError(f"message: {len(message)} bytes, a header has {_HEADER.size}")
    (
        magic,
        version,
        kind,
        request_id,
        layer,
        num_experts,
        num_rows,
        num_tokens,
        hidden,
        dtype,
        reserved,
    ) = _HEADER.unpack_from(message)
    if magic != MAGIC:
        raise ValueError(f"magic: got {magic!r}, expected {MAGIC!r}")
    if version != WIRE_VERSION:
        raise ValueError(f"wire version: got {version}, this side speaks {WIRE_VERSION}")
    if dtype >= len(_DTYPES) or reserved:
        raise ValueError(f"dtype and reserved: got {dtype} and {reserved}, expected 0-2 and 0")
    return _Header(
        kind, request_id, layer, num_experts, num_rows, num_tokens, hidden, _DTYPES[dtype]
    )


def _check_limits(header: _Header) -> None:
    for name, value, limit in (
        ("experts", header.num_experts, MAX_EXPERTS),
        ("rows", header.num_rows, MAX_PAIRS),
        ("tokens", header.num_tokens, MAX_TOKENS),
        ("hidden", header.hidden, MAX_HIDDEN),
    ):
        if value > limit:
            raise ValueError(f"{name}: got {value}, at most {limit} in one call; split the batch")


def _check_length(message: bytes, expected: int) -> None:
    if len(message) != expected:
        raise ValueError(f"message: got {len(message)} bytes, its header announces {expected}")


def _expert_tokens(
    key: ExpertKey, rows: np.ndarray, flags: np.ndarray, num_blocks: int
) -> ExpertTokens:
    restored = tuple(flags.astype(bool).tolist()) if flags.any() else ()
    return ExpertTokens(
        key, tuple(rows.tolist()), restored, None if num_blocks == _ALL_BLOCKS else num_blocks
    )


def _padding(num_bytes: int) -> int:
    return -num_bytes % 4


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    data: bytes = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return data


def _tensor(message: bytes, start: int, dtype: torch.dtype, rows: int, cols: int) -> torch.Tensor:
    """[rows, cols] view of a message, which is immutable: not to be written to."""
    if rows * cols == 0:
        return torch.empty(rows, cols, dtype=dtype)
    data = torch.from_dlpack(np.frombuffer(message, np.uint8, offset=start))
    return data.view(dtype).view(rows, cols)
