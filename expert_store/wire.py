"""The bytes of a record request between hosts, and the limits both sides keep.

    magic "MTRQ" | u16 wire version | u16 length of the store version | u32 number of requests
    | u32 compression | the store version, ASCII
    | per request: u32 layer, u32 expert, u32 kind, i32 num_blocks

All little-endian; compression 0 is none, 1 is zstd; kind 0 is codes, 1 is factors; num_blocks -1
means the whole record. The answer is a stream of messages of at most CHUNK_BYTES: the records'
bytes in request order, whose lengths the asker knows from its manifest; with zstd, per record a
u64 length and the frame of `expert_store/codecs/entropy.py`. Knows no transport.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from expert_store.codecs.entropy import MAX_FRAME_OVERHEAD, compress, decompress
from expert_store.errors import StoreFormatError
from expert_store.types import ExpertKey, Manifest, RecordKind, RecordRequest
from expert_store.wire_form import record_sections

Compression = Literal["none", "zstd"]
"""How records travel: as they are, or entropy-coded, which costs both hosts CPU time."""

MAGIC = b"MTRQ"
WIRE_VERSION = 2
CHUNK_BYTES = 2 * 2**20
"""One message of an answer. Between 1 and 4 MiB gRPC is at its fastest (FACTS.md 1.3)."""
MAX_FRAME_CACHE_BYTES = 256 * 2**20
"""Of frames that a server keeps."""
MAX_REQUESTS = 4096
"""Records of one call."""

_HEADER = struct.Struct("<4sHHII")
_FRAME_LENGTH = struct.Struct("<Q")
_COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)
_REQUEST = struct.Struct("<IIIi")
_KINDS: tuple[RecordKind, ...] = ("codes", "factors")


@dataclass(frozen=True, slots=True)
class RecordCall:
    """One decoded call: which store the asker has the manifest of, and what it wants."""

    version: str
    requests: tuple[RecordRequest, ...]
    compression: Compression = "none"


def encode_call(
    version: str, requests: Sequence[RecordRequest], compression: Compression = "none"
) -> bytes:
    """The bytes of a call. Raises ValueError for more than MAX_REQUESTS requests."""
    if len(requests) > MAX_REQUESTS:
        raise ValueError(f"requests: got {len(requests)}, at most {MAX_REQUESTS} in one call")
    name, form = version.encode("ascii"), _COMPRESSIONS.index(compression)
    parts = [_HEADER.pack(MAGIC, WIRE_VERSION, len(name), len(requests), form), name]
    for request in requests:
        num_blocks = -1 if request.num_blocks is None else request.num_blocks
        kind = _KINDS.index(request.kind)
        parts.append(_REQUEST.pack(request.key.layer, request.key.expert, kind, num_blocks))
    return b"".join(parts)


def decode_call(message: bytes) -> RecordCall:
    """The call in a message. Raises ValueError, naming the field, for anything malformed."""
    if len(message) < _HEADER.size:
        raise ValueError(f"message: {len(message)} bytes, a header has {_HEADER.size}")
    magic, wire_version, name_bytes, num_requests, form = _HEADER.unpack_from(message)
    if magic != MAGIC:
        raise ValueError(f"magic: got {magic!r}, expected {MAGIC!r}")
    if wire_version != WIRE_VERSION:
        raise ValueError(f"wire version: got {wire_version}, this side speaks {WIRE_VERSION}")
    if num_requests > MAX_REQUESTS:
        raise ValueError(f"requests: got {num_requests}, at most {MAX_REQUESTS} in one call")
    if form >= len(_COMPRESSIONS):
        raise ValueError(f"compression: got {form}, expected one of {_COMPRESSIONS} by number")
    expected = _HEADER.size + name_bytes + num_requests * _REQUEST.size
    if len(message) != expected:
        raise ValueError(f"message: got {len(message)} bytes, its header announces {expected}")
    start = _HEADER.size + name_bytes
    name = message[_HEADER.size : start]
    if not name.isascii():
        raise ValueError("store version: not ASCII")
    requests = tuple(
        _decode_request(*_REQUEST.unpack_from(message, start + i * _REQUEST.size))
        for i in range(num_requests)
    )
    return RecordCall(name.decode("ascii"), requests, _COMPRESSIONS[form])


class Frames:
    """Records of a store in the wire form; the last ones are kept, because every worker asks for
    the same experts and coding them again is what costs the server most. Thread-safe."""

    def __init__(self, manifest: Manifest, *, max_bytes: int = MAX_FRAME_CACHE_BYTES) -> None:
        self._manifest = manifest
        self._max_bytes = max_bytes
        self._kept: OrderedDict[RecordRequest, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    def of(self, request: RecordRequest, data: torch.Tensor) -> bytes:
        """Length and frame of a record, whose bytes are `data`."""
        with self._lock:
            if request in self._kept:
                self._kept.move_to_end(request)
                return self._kept[request]
        frame = compress(data, record_sections(self._manifest, request))
        message = _FRAME_LENGTH.pack(len(frame)) + frame
        with self._lock:
            # Two threads may both have coded it: wasteful, never wrong.
            self._kept_bytes += len(message) - len(self._kept.pop(request, b""))
            self._kept[request] = message
            while self._kept_bytes > self._max_bytes:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return message


def answer(call: RecordCall, records: Sequence[torch.Tensor], frames: Frames) -> Iterator[bytes]:
    """The messages of an answer: the records in the form that the call asks for."""
    for request, data in zip(call.requests, records, strict=True):
        if call.compression == "none":
            yield from chunks(memoryview(data.numpy()))
        else:
            yield from chunks(memoryview(frames.of(request, data)))


def assembly_of(lengths: Sequence[int], compression: Compression) -> Assembly | FrameAssembly:
    """What puts an answer's records, of these lengths, together again."""
    return Assembly(lengths) if compression == "none" else FrameAssembly(lengths)


def chunks(data: memoryview) -> Iterator[bytes]:
    """The data in messages of at most CHUNK_BYTES."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield bytes(data[start : start + CHUNK_BYTES])


class Assembly:
    """Records put together from the chunks of an answer, whose lengths are known beforehand.

    A record that comes whole in one chunk is a view of it; others are copied into their own memory.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.num_bytes = sum(lengths)
        self._lengths = deque(lengths)  # of the records that are not begun
        self._records: list[torch.Tensor] = []
        self._room = memoryview(b"")  # what is left to fill of the last record

    def add(self, chunk: bytes) -> None:
        """The next bytes. Raises StoreFormatError when there are more than expected."""
        rest = memoryview(chunk)
        while rest:
            if not self._room:
                self._begin_record(rest)
            num_bytes = min(len(rest), len(self._room))
            if not self._room.readonly:
                self._room[:num_bytes] = rest[:num_bytes]
            self._room, rest = self._room[num_bytes:], rest[num_bytes:]

    def finish(self) -> list[torch.Tensor]:
        """The records. Raises StoreFormatError when bytes are missing."""
        if missing := len(self._room) + sum(self._lengths):
            raise StoreFormatError(f"{missing} of the records' {self.num_bytes} bytes did not come")
        empty = [torch.empty(0, dtype=torch.uint8) for _ in self._lengths]
        return self._records + empty

    def _begin_record(self, rest: memoryview) -> None:
        while self._lengths and not self._lengths[0]:
            self._records.append(torch.empty(self._lengths.popleft(), dtype=torch.uint8))
        if not self._lengths:
            raise StoreFormatError(f"{len(rest)} bytes more than the records' {self.num_bytes}")
        length = self._lengths.popleft()
        if length <= len(rest):
            self._room = rest[:length]  # immutable: it is the record already
            self._records.append(torch.from_dlpack(np.frombuffer(self._room, np.uint8)))
        else:
            self._records.append(torch.empty(length, dtype=torch.uint8))
            self._room = memoryview(self._records[-1].numpy())


class FrameAssembly:
    """Records put together from the chunks of a compressed answer; each is decoded as it ends."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.num_bytes = sum(lengths)
        self._lengths = deque(lengths)  # of the records that did not come whole yet
        self._records: list[torch.Tensor] = []
        self._held = bytearray()  # what came of the next record
        self._due: int | None = None  # bytes of its frame, once they are known

    def add(self, chunk: bytes) -> None:
        """The next bytes. Raises StoreFormatError for a frame that is damaged or too long."""
        self._held += chunk
        while self._lengths and self._next_is_whole():
            assert self._due is not None
            record = decompress(memoryview(self._held[: self._due]), self._lengths.popleft())
            self._records.append(record)
            del self._held[: self._due]
            self._due = None
        if self._held and not self._lengths:
            raise StoreFormatError(f"{len(self._held)} bytes more than the records' frames")

    def finish(self) -> list[torch.Tensor]:
        """The records. Raises StoreFormatError when bytes are missing."""
        if self._lengths:
            raise StoreFormatError(f"{len(self._lengths)} of the records did not come whole")
        return self._records

    def _next_is_whole(self) -> bool:
        if self._due is None and len(self._held) >= _FRAME_LENGTH.size:
            (self._due,) = _FRAME_LENGTH.unpack_from(self._held)
            del self._held[: _FRAME_LENGTH.size]
            if self._due > self._lengths[0] + MAX_FRAME_OVERHEAD:
                raise StoreFormatError(
                    f"a frame of {self._due} bytes for a record of {self._lengths[0]}"
                )
        return self._due is not None and len(self._held) >= self._due


def _decode_request(layer: int, expert: int, kind: int, num_blocks: int) -> RecordRequest:
    if kind >= len(_KINDS):
        raise ValueError(f"kind: got {kind}, expected 0 (codes) or 1 (factors)")
    if num_blocks < -1:
        raise ValueError(f"num_blocks: got {num_blocks}, expected -1 or a count")
    return RecordRequest(
        ExpertKey(layer, expert), _KINDS[kind], None if num_blocks == -1 else num_blocks
    )
