"""Goal: a record that travelled entropy-coded is the same record, a damaged frame is refused, and
the bytes counted are those of the wire. Method: every kind of record and prefix through the wire
form and over a real gRPC server; frames cut, flipped and lying; entropy as the floor of size."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store import wire
from expert_store.codecs import cuszp
from expert_store.codecs.bound import ErrorBound
from expert_store.codecs.entropy import (
    Field,
    Section,
    compress,
    decompress,
    matrix_sections,
    matrix_wire_bytes,
    raw_sections,
    wire_bytes,
)
from expert_store.errors import ExpertUnavailableError, StoreFormatError
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource, RecordServer
from expert_store.segment import Segment
from expert_store.types import CodesForm, ExpertKey, ExpertShape, RecordRequest
from expert_store.wire_form import codes_sections, record_sections
from kernels.packing import pack, pack_bf16
from kernels.types import QuantizedMatrix, matrix_bytes
from tests.hand_store import build_store

FORMS = [("affine", b) for b in (2, 3, 4, 16)] + [("symmetric", b) for b in (1, 2, 3, 4)]
STORES = {
    "affine": {"bits": (2, 3, 4)},
    "symmetric": {"bits": (1, 2, 3), "grids": "symmetric", "factor_grid": "symmetric"},
    "mixed": {"bits": (4, 2, 3), "grids": ("symmetric", "affine", "symmetric")},
    "planes": {"blocks": "gGuDdUg", "has_bias": True},
    "baseline": {"bits": 16, "blocks": ""},
}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def rtn(rows: int, cols: int, bits: int) -> QuantizedMatrix:
    """A Gaussian weight on the min-max grid of its groups: codes far from uniform."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    if bits == 16:
        return pack_bf16(weight)
    groups = weight.view(rows, -1, 64)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / (2**bits - 1)
    codes = ((groups - low[..., None]) / scale[..., None]).round().to(torch.uint8)
    return pack(codes.view(rows, cols), scale, -low / scale, bits)


def requests_of(segment: Segment) -> list[RecordRequest]:
    """Every record, and every prefix of one."""
    found = []
    for key, info in segment.manifest.experts.items():
        found.append(RecordRequest(key, "codes"))
        if info.factors is not None:
            found.append(RecordRequest(key, "factors"))
    if info.factors is not None:
        found += [RecordRequest(key, "factors", n) for n in range(len(info.repair.blocks) + 1)]
    return found


def connect(
    stack: ExitStack, store: Path, compression: wire.Compression, **kwargs: float
) -> GrpcSource:
    segment = stack.enter_context(closing(Segment(store)))
    server = stack.enter_context(closing(RecordServer(segment)))
    version = segment.manifest.version
    listing = Listing(
        name="a", addresses=server.addresses, role="records", version=version, node_id="n",
        keys=None,
    )  # fmt: skip
    source = GrpcSource(segment.manifest, lambda: [listing], compression=compression, **kwargs)
    return stack.enter_context(closing(source))


@pytest.mark.parametrize("kind", STORES)
def test_every_record_and_prefix_survives(kind: str, tmp_path: Path) -> None:
    build_store(tmp_path / "s", layers=(0,), experts=1, **STORES[kind])
    segment = Segment(tmp_path / "s")
    for request in requests_of(segment):
        (data,) = segment.fetch([request])
        sections = record_sections(segment.manifest, request)
        frame = compress(data, sections)
        assert torch.equal(decompress(frame, data.numel()), data)
        assert wire_bytes(data, sections) == len(frame)
    segment.close()


@pytest.mark.parametrize("kind", ["affine", "planes"])
def test_over_grpc_records_are_the_same_and_the_wires_bytes_are_counted(
    kind: str, stack: ExitStack, tmp_path: Path
) -> None:
    """All at once, and one by one through the small call."""
    store = tmp_path / "s"
    build_store(store, **STORES[kind])
    coded, plain = connect(stack, store, "zstd"), connect(stack, store, "none")
    segment = Segment(store)
    requests = requests_of(segment)
    expected = segment.fetch(requests)
    for found, truth in zip(coded.fetch(requests), expected, strict=True):
        assert torch.equal(found, truth)
    frames = sum(
        8 + wire_bytes(data, record_sections(segment.manifest, request))
        for request, data in zip(requests, expected, strict=True)
    )
    assert coded.bytes_moved[1] == frames
    assert coded.record_bytes == sum(data.numel() for data in expected)
    for request, truth in zip(requests, expected, strict=True):
        assert torch.equal(coded.fetch([request])[0], truth)
    assert coded.bytes_moved[1] == 2 * frames
    plain.fetch(requests)
    assert plain.bytes_moved[1] == plain.record_bytes == sum(data.numel() for data in expected)


def test_frames_are_kept_within_their_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for about two of six: the last asked for stay, the others are coded again."""
    build_store(tmp_path / "s", blocks="")
    segment = Segment(tmp_path / "s")
    requests = requests_of(segment)
    coded: list[int] = []
    original = wire.compress
    monkeypatch.setattr(wire, "compress", lambda *a: coded.append(1) or original(*a))
    size = len(wire.Frames(segment.manifest).of(requests[0], *segment.fetch(requests[:1])))
    frames = wire.Frames(segment.manifest, max_bytes=int(2.5 * size))

    def times_coded(index: int) -> int:
        coded.clear()
        (data,) = segment.fetch([requests[index]])
        frame = frames.of(requests[index], data)
        assert torch.equal(decompress(frame[8:], data.numel()), data)
        assert frames.kept_bytes <= 2.5 * size
        return len(coded)

    assert [times_coded(i) for i in (0, 1, 0, 2, 0, 1)] == [1, 1, 0, 1, 0, 1]
    nothing = wire.Frames(segment.manifest, max_bytes=0)
    assert len(nothing.of(requests[0], *segment.fetch(requests[:1]))) == size
    assert nothing.kept_bytes == 0


def test_a_record_longer_than_a_message(stack: ExitStack, tmp_path: Path) -> None:
    store = tmp_path / "store"
    build_store(store, layers=(0,), experts=1, hidden=2048, ffn=2048, bits=3, blocks="")
    source = connect(stack, store, "zstd")
    request = RecordRequest(ExpertKey(0, 0), "codes")
    (data,) = source.fetch([request])
    assert data.numel() > 2 * wire.CHUNK_BYTES
    assert torch.equal(data, Segment(store).fetch([request])[0])


def test_a_damaged_frame_is_a_lost_copy(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be decoded is never handed on: with no other copy the record is unavailable."""
    store = tmp_path / "s"
    build_store(store)
    source = connect(stack, store, "zstd", deadline_s=0.5)
    original = wire.compress
    monkeypatch.setattr(wire, "compress", lambda *a: original(*a)[:-4] + b"\0\1\2\3")
    with pytest.raises(ExpertUnavailableError, match="wire form"):
        source.fetch([RecordRequest(ExpertKey(0, 0), "codes")])


@pytest.mark.parametrize(("grid", "bits"), FORMS)
@pytest.mark.parametrize("shape", [(16, 64), (37, 192)])
def test_matrices_of_every_form(grid: str, bits: int, shape: tuple[int, int]) -> None:
    size = matrix_bytes(*shape, bits, grid)
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    sections = matrix_sections(*shape, bits, grid)
    assert sum(section.num_bytes for section in sections) == size
    assert torch.equal(decompress(compress(data, sections), size), data)
    assert len(compress(data, sections)) <= size + 256  # noise is stored as it is


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_size_is_near_the_codes_entropy(bits: int) -> None:
    """Within 2 % of the histogram's entropy for the codes, and scales in fewer bits than stored."""
    matrix = rtn(256, 512, bits)
    from kernels.packing import unpack

    counts = np.bincount(unpack(matrix)[0].numpy().reshape(-1), minlength=2**bits)
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * np.log2(share)).sum())
    per_weight = 8 * matrix_wire_bytes(matrix) / (256 * 512)
    assert entropy < per_weight < 1.02 * entropy + 0.5
    assert per_weight < bits + 0.5 - 0.3


def test_cuszp_and_bias_parts_are_carried() -> None:
    """Codec streams are bytes of no known structure."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*s, generator=generator) for s in ((64, 128), (64, 128), (128, 64))]
    parts = [cuszp.encode(weight, ErrorBound(0.3, "row")) for weight in weights]
    form = CodesForm.streams("cuszp", [part.numel() for part in parts])
    shape = ExpertShape(hidden=128, ffn=64, activation="silu", has_bias=True)
    sections = codes_sections(shape, form)
    data = torch.randint(0, 256, (sum(s.num_bytes for s in sections),), dtype=torch.uint8)
    assert torch.equal(decompress(compress(data, sections), data.numel()), data)


def test_sections_must_cover_the_record() -> None:
    data = torch.zeros(100, dtype=torch.uint8)
    with pytest.raises(ValueError, match="100 bytes, its sections have 99"):
        compress(data, raw_sections(99))
    for kind, size in (("halves", 3), ("three_bit", 64), ("bytes", 0), ("bytes", 1 << 16)):
        with pytest.raises(ValueError, match=f"{kind} field: got {size}"):
            Field(kind, size)
    many = [Section(1, (Field("bytes", 1 + i % 2),)) for i in range(20000)]
    with pytest.raises(ValueError, match="at most 16384"):
        compress(torch.zeros(30000, dtype=torch.uint8), many)
    assert decompress(compress(data[:0], ()), 0).numel() == 0


@settings(max_examples=200, deadline=None)
@given(data=st.data(), bits=st.sampled_from([2, 3, 16]))
def test_damaged_frames_are_refused_or_of_the_right_length(data: st.DataObject, bits: int) -> None:
    """Bytes exchanged, the end cut off or added to; never a crash, never more memory than asked."""
    matrix = rtn(16, 64, bits)
    frame = bytearray(compress(matrix.data, matrix_sections(16, 64, bits)))
    for _ in range(data.draw(st.integers(0, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    frame = frame[: data.draw(st.integers(0, len(frame)))] + data.draw(st.binary(max_size=4))
    try:
        record = decompress(bytes(frame), matrix.data.numel())
    except StoreFormatError:
        return
    assert record.numel() == matrix.data.numel()


def test_lying_frames_are_refused_by_name() -> None:
    matrix = rtn(64, 128, 2)
    size, frame = matrix.data.numel(), compress(matrix.data, matrix_sections(64, 128, 2))
    with pytest.raises(StoreFormatError, match="expected a frame"):
        decompress(b"ABCD" + frame[4:], size)
    with pytest.raises(StoreFormatError, match=f"record of {size + 1} bytes, got one of {size}"):
        decompress(frame, size + 1)
    with pytest.raises(StoreFormatError, match="kind 7"):
        decompress(frame[:21] + b"\7" + frame[22:], size)
    with pytest.raises(StoreFormatError, match="do not cover"):
        decompress(frame[:16] + struct.pack("<I", 1) + frame[20:], size)
    with pytest.raises(StoreFormatError, match="announces"):
        decompress(frame[:-1], size)
    with pytest.raises(StoreFormatError, match="damaged"):
        decompress(frame[:10], size)
    # A zstd frame that announces 2**40 bytes, as long as the first stream's.
    at = 16 + 5 + 9 + 5 * 4
    huge = bytes.fromhex("28b52ffde0") + (2**40).to_bytes(8, "little")
    with pytest.raises(StoreFormatError, match="a stream is not of"):
        decompress(frame[:at] + huge + frame[at + len(huge) :], size)


def test_frames_are_put_together_from_any_chunks() -> None:
    records = [rtn(16, 64, bits).data for bits in (2, 3, 4)]
    parts = []
    for bits, record in zip((2, 3, 4), records, strict=True):
        frame = compress(record, matrix_sections(16, 64, bits))
        parts += [struct.pack("<Q", len(frame)), frame]
    message = b"".join(parts)
    for size in (1, 7, 100, len(message)):
        assembly = wire.FrameAssembly([record.numel() for record in records])
        for start in range(0, len(message), size):
            assembly.add(message[start : start + size])
        for found, truth in zip(assembly.finish(), records, strict=True):
            assert torch.equal(found, truth)
        with pytest.raises(StoreFormatError, match="1 bytes more"):
            assembly.add(b"x")
    short = wire.FrameAssembly([record.numel() for record in records])
    short.add(message[:-1])
    with pytest.raises(StoreFormatError, match="1 of the records did not come whole"):
        short.finish()
    greedy = wire.FrameAssembly([100])
    with pytest.raises(StoreFormatError, match="a frame of 2000000 bytes for a record of 100"):
        greedy.add(struct.pack("<Q", 2_000_000))
