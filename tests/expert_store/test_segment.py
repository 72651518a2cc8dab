"""Goal: a segment gives exactly the store's bytes, as views, and refuses what it cannot trust.

Method: a store built by hand; its files read, cut, flipped and swapped with plain file calls.
"""

from __future__ import annotations

import gc
import hashlib
import threading
import warnings
from pathlib import Path

import pytest
import torch

from expert_store.errors import CorruptRecordError, ExpertUnavailableError, StoreFormatError
from expert_store.format import factors_bytes, parse_factors
from expert_store.segment import Segment, locate
from expert_store.types import ExpertKey, Manifest, RecordRequest
from expert_store.verify import verify
from tests.hand_store import build_store

CODES = RecordRequest(ExpertKey(1, 2), "codes")
FACTORS = RecordRequest(ExpertKey(0, 1), "factors")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    build_store(tmp_path)
    return tmp_path


def file_bytes(store: Path, manifest: Manifest, request: RecordRequest) -> bytes:
    record = locate(manifest, request)
    data = (store / record.file).read_bytes()
    return data[record.offset : record.offset + record.num_bytes]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_every_record_is_the_files_bytes(store: Path) -> None:
    segment = Segment(store)
    assert segment.tier == "disk"
    requests = [
        RecordRequest(key, kind)
        for key in segment.manifest.experts
        for kind in ("codes", "factors")
    ]
    for request, data in zip(requests, segment.fetch(requests), strict=True):
        assert data.dtype == torch.uint8
        assert data.dim() == 1
        assert bytes(data.numpy()) == file_bytes(store, segment.manifest, request)
        assert data.data_ptr() % 64 == 0
    assert segment.num_bytes == sum(
        locate(segment.manifest, request).num_bytes for request in requests
    )


def test_views_share_the_mapping_and_warn_of_nothing(store: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segment = Segment(store)
        first, second = segment.fetch([CODES, CODES])
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("blocks", ["gudg", "GgudDU"])
def test_a_prefix_of_blocks_parses(blocks: str, tmp_path: Path) -> None:
    build_store(tmp_path, blocks=blocks, factor_bits=2, factor_grid="symmetric")
    segment = Segment(tmp_path)
    shape = segment.manifest.model.expert
    repair = segment.manifest.experts[FACTORS.key].repair
    (whole,) = segment.fetch([FACTORS])
    for num_blocks in range(len(blocks) + 1):
        (data,) = segment.fetch([RecordRequest(FACTORS.key, "factors", num_blocks)])
        part = repair.prefix(num_blocks)
        assert part.letters == blocks[:num_blocks]
        assert data.numel() == factors_bytes(shape, part)
        assert torch.equal(data, whole[: data.numel()])
        compensator = parse_factors(FACTORS.key, data, shape, part)
        assert compensator.factors.gate.rank == 16 * part.letters.count("g")
        assert len(compensator.factors.up_planes) == part.letters.count("U")


def test_only_the_keys_it_holds(store: Path) -> None:
    segment = Segment(store, [FACTORS.key])
    assert segment.keys == {FACTORS.key}
    assert len(segment.fetch([FACTORS])) == 1
    with pytest.raises(ExpertUnavailableError, match="layer 1 expert 2 .* holds 1 of 6 experts"):
        segment.fetch([CODES])
    with pytest.raises(ValueError, match="layer 9 expert 0"):
        Segment(store, [ExpertKey(9, 0)])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RecordRequest(ExpertKey(7, 0), "codes"), "layer 7 expert 0 is not in store"),
        (RecordRequest(ExpertKey(0, 0), "codes", 1), "only factors have blocks"),
        (RecordRequest(ExpertKey(0, 0), "factors", 5), "has 4 blocks"),
        (RecordRequest(ExpertKey(0, 0), "factors", -1), "has 4 blocks"),
    ],
)
def test_a_request_no_store_could_answer(
    store: Path, request_: RecordRequest, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Segment(store).fetch([request_])


def test_factors_of_an_expert_without(tmp_path: Path) -> None:
    build_store(tmp_path, blocks="")
    with pytest.raises(ValueError, match="no factors record"):
        Segment(tmp_path).fetch([FACTORS])


@pytest.mark.parametrize("request_", [CODES, FACTORS])
def test_a_flipped_bit_is_named(store: Path, request_: RecordRequest) -> None:
    manifest = Segment(store).manifest
    record = locate(manifest, request_)
    flip(store / record.file, record.offset + record.num_bytes - 1)
    found = hashlib.sha256(file_bytes(store, manifest, request_)).hexdigest()
    segment = Segment(store)
    for _ in range(2):  # a damaged record stays refused
        with pytest.raises(CorruptRecordError) as caught:
            segment.fetch([request_])
        for word in (
            str(store),
            str(request_.key),
            record.sha256,
            found,
            record.file,
            "moetier verify",
        ):
            assert word in str(caught.value)
    # Its neighbours are not affected, nor the other record of the same expert.
    other = "factors" if request_.kind == "codes" else "codes"
    segment.fetch([RecordRequest(ExpertKey(1, 1), "codes"), RecordRequest(request_.key, other)])


def test_damage_outside_the_prefix_is_found_too(store: Path) -> None:
    record = locate(Segment(store).manifest, FACTORS)
    flip(store / record.file, record.offset + record.num_bytes - 1)
    with pytest.raises(CorruptRecordError):
        Segment(store).fetch([RecordRequest(FACTORS.key, "factors", 1)])


def test_swapped_records_are_found(store: Path) -> None:
    manifest = Segment(store).manifest
    first = locate(manifest, RecordRequest(ExpertKey(1, 1), "codes"))
    second = locate(manifest, CODES)
    data = bytearray((store / first.file).read_bytes())
    a = slice(first.offset, first.offset + first.num_bytes)
    b = slice(second.offset, second.offset + second.num_bytes)
    data[a], data[b] = data[b], data[a]
    (store / first.file).write_bytes(data)
    with pytest.raises(CorruptRecordError):
        Segment(store).fetch([CODES])


def test_each_record_is_hashed_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment(store)
    hashed: list[int] = []
    real = hashlib.sha256
    monkeypatch.setattr(
        "expert_store.segment.hashlib.sha256", lambda data: hashed.append(1) or real(data)
    )
    for _ in range(3):
        segment.fetch([CODES, FACTORS])
    assert len(hashed) == 2


@pytest.mark.parametrize("cut", [1, 10_000, None])
def test_a_truncated_file_is_refused_at_open(store: Path, cut: int | None) -> None:
    path = store / "codes/layer-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - cut] if cut else b"")
    with pytest.raises(StoreFormatError, match=f"truncated: expected at least {len(data)} bytes"):
        Segment(store)
    Segment(store, [ExpertKey(0, 0)])  # another file's segment is not affected


def test_a_missing_file_and_a_missing_store(store: Path, tmp_path: Path) -> None:
    (store / "factors/layer-00000.safetensors").unlink()
    with pytest.raises(StoreFormatError, match=r"layer-00000.safetensors cannot be mapped"):
        Segment(store)
    with pytest.raises(StoreFormatError):
        Segment(tmp_path / "nowhere")


def test_records_behind_a_damaged_header_are_read(store: Path) -> None:
    whole = bytes(Segment(store).fetch([CODES])[0].numpy())
    path = store / locate(Segment(store).manifest, CODES).file
    data = path.read_bytes()
    path.write_bytes(b"\xff" * 64 + data[64:])
    assert bytes(Segment(store).fetch([CODES])[0].numpy()) == whole
    assert [item.file for item in verify(store).damage] == [path.relative_to(store).as_posix()]


def test_views_outlive_close(store: Path) -> None:
    segment = Segment(store)
    (data,) = segment.fetch([CODES])
    expected = file_bytes(store, segment.manifest, CODES)
    segment.close()
    segment.close()
    gc.collect()
    assert bytes(data.numpy()) == expected
    with pytest.raises(ExpertUnavailableError, match="closed"):
        segment.fetch([CODES])


def test_the_mapping_goes_with_its_last_view(store: Path) -> None:
    def mapped() -> bool:
        return str(store) in Path("/proc/self/maps").read_text()

    segment = Segment(store)
    (data,) = segment.fetch([CODES])
    segment.close()
    assert mapped()
    del data
    gc.collect()
    assert not mapped()


def test_many_threads_read_the_same_bytes(store: Path) -> None:
    segment = Segment(store)
    requests = [RecordRequest(key, "codes") for key in segment.manifest.experts]
    expected = [file_bytes(store, segment.manifest, request) for request in requests]
    wrong: list[int] = []
    barrier = threading.Barrier(8)

    def read() -> None:
        barrier.wait()
        got = [bytes(data.numpy()) for data in segment.fetch(requests)]
        if got != expected:
            wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
