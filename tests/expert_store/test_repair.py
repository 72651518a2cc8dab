"""Goal: a damaged record is refused, then served again from another copy's bytes.

Method: two real stores made alike, one byte of one of them flipped; a real server and source.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from expert_store.errors import CorruptRecordError
from expert_store.listing import Listing
from expert_store.repair import Repairer
from expert_store.rpc import GrpcSource, RecordServer
from expert_store.segment import Segment, locate
from expert_store.types import ExpertKey, RecordRequest
from tests.hand_store import build_store

BAD = RecordRequest(ExpertKey(0, 1), "factors")
PART = RecordRequest(ExpertKey(0, 1), "factors", 1)


def damaged(folder: Path) -> Segment:
    build_store(folder)
    record = locate(Segment(folder).manifest, BAD)
    data = bytearray((folder / record.file).read_bytes())
    data[record.offset] ^= 1
    (folder / record.file).write_bytes(data)
    return Segment(folder)


def sound(folder: Path) -> Segment:
    build_store(folder)
    return Segment(folder)


def test_quarantine_is_told_once_and_ends_with_sound_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    segment, good = damaged(tmp_path / "bad"), sound(tmp_path / "good")
    for _ in range(3):
        with pytest.raises(CorruptRecordError, match="layer 0 expert 1"):
            segment.fetch([BAD])
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    assert segment.quarantined == {(BAD.key, "factors")}
    (data,) = good.fetch([BAD])
    with pytest.raises(CorruptRecordError, match="to repair"):
        segment.repair(BAD, data.flip(0))
    with pytest.raises(CorruptRecordError):
        segment.fetch([PART])
    segment.repair(BAD, data)
    assert not segment.quarantined
    assert segment.num_repaired == 1
    assert torch.equal(segment.fetch([BAD])[0], data)
    assert torch.equal(segment.fetch([PART])[0], good.fetch([PART])[0])


def test_a_record_is_hashed_again_when_somebody_doubts_it(tmp_path: Path) -> None:
    segment = sound(tmp_path / "store")
    segment.fetch([BAD])
    assert segment.recheck(BAD)
    record = locate(segment.manifest, BAD)
    with (tmp_path / "store" / record.file).open("r+b") as file:
        file.seek(record.offset)
        byte = file.read(1)
        file.seek(record.offset)
        file.write(bytes([byte[0] ^ 1]))
    assert not segment.recheck(BAD)
    assert segment.quarantined == {(BAD.key, "factors")}


def test_a_holder_repairs_itself_from_another_copy(tmp_path: Path) -> None:
    segment, good = damaged(tmp_path / "bad"), sound(tmp_path / "good")
    with closing(RecordServer(good)) as server:
        listing = Listing("g", "records", good.manifest.version, "n", server.addresses)
        others = GrpcSource(segment.manifest, lambda: [listing])
        with closing(Repairer(segment, others, interval_s=0.05)):
            with pytest.raises(CorruptRecordError):
                segment.fetch([BAD])
            end = time.monotonic() + 20
            while segment.quarantined and time.monotonic() < end:
                time.sleep(0.02)
            assert torch.equal(segment.fetch([BAD])[0], good.fetch([BAD])[0])
