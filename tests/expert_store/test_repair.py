"""Goal: a damaged record is found, refused, then served again from another copy's bytes.

Method: two real stores made alike, one byte of one of them flipped, before it is opened or while it
is mapped; a real server and source, real holders.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from expert_store.errors import CorruptRecordError, ExpertUnavailableError
from expert_store.holder import Holder
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


def spoil(segment: Segment) -> None:
    """One byte of the mapped file."""
    record = locate(segment.manifest, BAD)
    with (segment.store / record.file).open("r+b") as file:
        file.seek(record.offset)
        byte = file.read(1)
        file.seek(record.offset)
        file.write(bytes([byte[0] ^ 1]))


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


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
    spoil(segment)
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
            until(lambda: not segment.quarantined)
            assert torch.equal(segment.fetch([BAD])[0], good.fetch([BAD])[0])


def test_damage_that_comes_later_is_found_without_a_read(tmp_path: Path) -> None:
    """Each turn hashes as many records as their bytes allow, over and over."""
    segment, good = sound(tmp_path / "bad"), sound(tmp_path / "good")
    segment.fetch([BAD])
    rate = segment.num_bytes / 0.05 / 4  # the whole segment in four turns
    with closing(RecordServer(good)) as server:
        listing = Listing("g", "records", good.manifest.version, "n", server.addresses)
        others = GrpcSource(segment.manifest, lambda: [listing])
        with closing(Repairer(segment, others, interval_s=0.05, scrub_bytes_per_s=rate)):
            spoil(segment)
            until(lambda: segment.num_repaired == 1)
            assert torch.equal(segment.fetch([BAD])[0], good.fetch([BAD])[0])


def test_a_scrub_hashes_no_more_than_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = sound(tmp_path / "store")
    hashed: list[RecordRequest] = []
    monkeypatch.setattr(segment, "recheck", hashed.append)
    repairer = Repairer(segment, Nobody(), interval_s=1000.0, scrub_bytes_per_s=1e-9)
    repairer.scrub()
    assert len(hashed) == 1, "one record may be larger than a turn's bytes"
    for _ in range(5):
        repairer.scrub()
    assert len(hashed) == 1, "and is paid for in the next turns"
    repairer.close()
    repairer = Repairer(segment, Nobody(), interval_s=1000.0)
    repairer.scrub()
    assert len(hashed) == 1, "without a rate nothing is hashed"
    repairer.close()


class Nobody:
    """No other copy answers; counts how often it was asked."""

    asked = 0

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        self.asked += 1
        raise ExpertUnavailableError("no other copy (test)")

    def close(self) -> None: ...


def test_what_nobody_has_is_told_once_and_asked_ever_less_often(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    segment, nobody = damaged(tmp_path / "bad"), Nobody()
    with pytest.raises(CorruptRecordError):
        segment.fetch([BAD])
    with closing(Repairer(segment, nobody, interval_s=0.01)):
        until(lambda: nobody.asked > 0)
        time.sleep(0.3)
        assert nobody.asked == 1, "the next time is 5 s later"
    assert len([r for r in caplog.records if "cannot be repaired yet" in r.message]) == 1
    with closing(Repairer(segment, nobody, interval_s=1000.0, max_bytes=1)) as repairer:
        repairer.repair_all()
        repairer.repair_all()
    assert nobody.asked == 1
    assert len([r for r in caplog.records if "too many places" in r.message]) == 1


def holder(segment: Segment, name: str, **options: float) -> Holder:
    return Holder(
        segment,
        "records",
        partial(RecordServer, segment),
        tcp_address="127.0.0.1:0",
        name=name,
        node_id="n",
        directory=None,
        **options,
    )


def test_a_holder_repairs_itself_from_those_it_is_told_of(tmp_path: Path) -> None:
    """And says so, which makes it no other holder."""
    bad, good = damaged(tmp_path / "bad"), sound(tmp_path / "good")
    with closing(holder(bad, "bad")) as broken, closing(holder(good, "good")) as whole:
        before = broken.status
        broken.know([broken.status.listing, whole.status.listing])
        with pytest.raises(CorruptRecordError):
            bad.fetch([BAD])
        assert broken.status.num_quarantined == 1
        until(lambda: broken.status.num_repaired == 1)
        assert broken.status.num_quarantined == 0
        assert broken.status == before
        assert torch.equal(bad.fetch([BAD])[0], good.fetch([BAD])[0])
