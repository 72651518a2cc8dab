"""Goal: a GPU worker's source and near-data worker go on when the actors behind them are replaced.

Method: real record servers and near-data servers of this process, over a store made by hand; the
object-store transport needs Ray and is in test_serve_ray.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_store import build_store

from cluster.expert_heat import UseCounter
from cluster.following import FollowingSource
from cluster.metrics import render
from cluster.settings import DirectorySettings
from cluster.snapshot import ClusterSnapshot
from cluster.tier_link import Endpoints, TierLink, connect, open_directory
from expert_store.actor import StoreHandle
from expert_store.directory import RedisDirectory
from expert_store.errors import ExpertUnavailableError
from expert_store.health import ReadingStatistics
from expert_store.listing import Listing
from expert_store.rpc import RecordServer
from expert_store.segment import Segment
from expert_store.types import ExpertKey, ExpertTokens, RecordRequest
from gpu_worker.messages import TierCalls, WorkerStats
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpServer

CODES = [RecordRequest(ExpertKey(0, 1), "codes"), RecordRequest(ExpertKey(1, 2), "factors")]
WORK = [ExpertTokens(ExpertKey(0, 0), (0, 2)), ExpertTokens(ExpertKey(0, 1), (1,))]


class Tiers:
    """Servers over one segment, and what the tier manager would say of them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.segment = Segment(folder)
        stack.callback(self.segment.close)
        self._stack = stack
        self._num = 0

    def record_server(self) -> tuple[RecordServer, StoreHandle]:
        server = RecordServer(self.segment)
        self._stack.callback(server.close)
        return server, StoreHandle(None, self._listing("records", server.addresses))

    def near_data_server(self) -> tuple[NdpServer, Listing]:
        server = NdpServer(Executor(self.segment, num_threads=1))
        self._stack.callback(server.close)
        return server, self._listing("near_data", server.addresses)

    def _listing(self, role: Any, addresses: tuple[str, ...]) -> Listing:
        self._num += 1
        version = self.segment.manifest.version
        return Listing(f"actor-{self._num}", role, version, "node", addresses)


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[Tiers]:
    build_store(tmp_path / "store")
    with ExitStack() as stack:
        yield Tiers(tmp_path / "store", stack)


def link_to(tiers: Tiers, endpoints: Endpoints) -> TierLink:
    return connect(endpoints, store=str(tiers.folder), transport="grpc", directory=None)


def test_records_go_on_from_another_server(tiers: Tiers) -> None:
    first, first_handle = tiers.record_server()
    _, second_handle = tiers.record_server()
    expected = tiers.segment.fetch(CODES)
    link = link_to(tiers, Endpoints(1, (first_handle,), ()))
    try:
        assert link.source.tier == "grpc"
        for got, want in zip(link.source.fetch(CODES), expected, strict=True):
            assert torch.equal(got, want)
        first.close(0)
        link.follow(Endpoints(2, (second_handle,), ()))
        assert link.generation == 2
        for got, want in zip(link.source.fetch(CODES), expected, strict=True):
            assert torch.equal(got, want)
    finally:
        link.close()


def test_compressed_records_are_the_same_and_their_wire_bytes_are_counted(tiers: Tiers) -> None:
    """Over a change of source too: what the one that is gone moved still counts."""
    _, handle = tiers.record_server()
    expected = tiers.segment.fetch(CODES)
    link = connect(
        Endpoints(1, (handle,), ()),
        store=str(tiers.folder),
        transport="grpc",
        compression="zstd",
        directory=None,
    )
    try:
        for got, want in zip(link.source.fetch(CODES), expected, strict=True):
            assert torch.equal(got, want)
        sent, received = link.source.bytes_moved
        record_bytes = sum(data.numel() for data in expected)
        assert sent > 0 < received != record_bytes
        link.source.switch(Segment(tiers.folder))  # from now on nothing crosses a wire
        link.source.fetch(CODES)
        assert link.source.bytes_moved == (sent, received)
    finally:
        link.close()


def test_near_data_goes_on_with_another_worker_and_counts_all_bytes(tiers: Tiers) -> None:
    _, store = tiers.record_server()
    first, first_listing = tiers.near_data_server()
    _, second_listing = tiers.near_data_server()
    hidden_TH = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    link = link_to(tiers, Endpoints(1, (store,), (first_listing,)))
    try:
        assert link.near_data is not None
        before = link.near_data.submit(hidden_TH, WORK).result(20).output_PH
        moved = link.near_data.bytes_moved
        assert min(moved) > 0
        first.close(0)
        with pytest.raises(ExpertUnavailableError):
            link.near_data.submit(hidden_TH, WORK).result(20)
        link.follow(Endpoints(2, (store,), ()))
        with pytest.raises(ExpertUnavailableError):
            link.near_data.submit(hidden_TH, WORK).result(20)
        link.follow(Endpoints(3, (store,), (second_listing,)))
        after = link.near_data.submit(hidden_TH, WORK).result(20).output_PH
        assert torch.equal(after, before)
        assert all(now > then for now, then in zip(link.near_data.bytes_moved, moved, strict=True))
    finally:
        link.close()


def test_two_near_data_workers_share_and_one_is_enough(tiers: Tiers) -> None:
    _, store = tiers.record_server()
    first, first_listing = tiers.near_data_server()
    _, second_listing = tiers.near_data_server()
    hidden_TH = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    link = link_to(tiers, Endpoints(1, (store,), (first_listing, second_listing)))
    try:
        assert link.near_data is not None
        before = link.near_data.submit(hidden_TH, WORK).result(20).output_PH
        first.close(0)
        after = link.near_data.submit(hidden_TH, WORK).result(20).output_PH
        assert torch.equal(after, before)
    finally:
        link.close()


def test_calls_are_counted_over_a_change_of_source(tiers: Tiers) -> None:
    """A server that is gone makes a failover, which counts on when its source is gone too."""
    first, first_handle = tiers.record_server()
    _, second_handle = tiers.record_server()
    endpoints = Endpoints(1, (first_handle, second_handle), ())
    link, other = link_to(tiers, endpoints), link_to(tiers, endpoints)
    try:
        assert set(link.calls.fetches.values()) == {0}
        first.close(0)
        # Of every expert, since of which server one is read depends on this process' number.
        link.source.fetch([RecordRequest(key, "codes") for key in tiers.segment.manifest.experts])
        before = link.calls.fetches
        assert before["calls"] > before["failed_over"] > 0
        for _ in range(3):
            link.source.switch(Segment(tiers.folder))  # which counts no calls to copies
            assert link.calls.fetches == before
        link.source.switch(other.source)
        link.source.fetch(CODES)
        assert link.calls.fetches["calls"] > before["calls"]
        assert link.calls.fetches["failed_over"] >= before["failed_over"]
        assert link.calls.near_data == {}
    finally:
        link.close()
        other.close()


def test_near_data_calls_are_counted_over_a_change_of_workers(tiers: Tiers) -> None:
    _, store = tiers.record_server()
    first, first_listing = tiers.near_data_server()
    _, second_listing = tiers.near_data_server()
    hidden_TH = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    link = link_to(tiers, Endpoints(1, (store,), (first_listing, second_listing)))
    try:
        assert link.near_data is not None
        first.close(0)
        link.near_data.submit(hidden_TH, WORK).result(20)
        before, moved = link.near_data.statistics, link.near_data.bytes_moved
        assert before.calls > before.failed_over > 0 < min(moved)
        for generation in (2, 3, 4):
            link.follow(Endpoints(generation, (store,), (second_listing,)))
            assert link.near_data.statistics == before
            assert link.near_data.bytes_moved == moved
        link.near_data.submit(hidden_TH, WORK).result(20)
        assert link.near_data.statistics == replace(before, calls=before.calls + 1)
        assert link.calls.near_data["failed_over"] == before.failed_over
    finally:
        link.close()


def test_what_ends_after_an_exchange_still_counts(tiers: Tiers) -> None:
    """Readers of the counts never see them fall while sources are exchanged under fetches."""
    _, handle = tiers.record_server()
    endpoints = Endpoints(1, (handle,), ())
    links = [link_to(tiers, endpoints) for _ in range(6)]
    followed, seen, is_over = links[0].source, [0], threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            seen.append(followed.statistics.calls)

    def fetch() -> None:
        while not is_over.is_set():
            followed.fetch(CODES)

    threads = [threading.Thread(target=each) for each in (watch, fetch, fetch)]
    try:
        for thread in threads:
            thread.start()
        for link in links[1:]:
            followed.switch(link.source)
            before = followed.statistics.calls
            while followed.statistics.calls <= before + 2:
                assert all(thread.is_alive() for thread in threads)
    finally:
        is_over.set()
        for thread in threads:
            thread.join(30)
        for link in links:
            link.close()
    assert seen == sorted(seen)
    assert followed.statistics.calls >= 6


def test_metrics_tell_the_calls_by_worker() -> None:
    calls = TierCalls(asdict(ReadingStatistics(9, 8, 7, 6, 5, 4)), {"hung": 3})
    workers = (WorkerStats("w", 0, 0, 0, tier_calls=calls), WorkerStats("v", 0, 0, 0))
    lines = render(ClusterSnapshot((), workers, ())).splitlines()
    told = {
        "fetch_calls": 9,
        "hedged_fetches": 8,
        "won_hedges": 7,
        "failed_over_fetches": 6,
        "corrupt_fetches": 5,
        "hung_fetches": 4,
        "hung_near_data_calls": 3,
        "near_data_calls": 0,
    }
    for name, count in told.items():
        assert f'moetier_{name}_total{{replica="w"}} {count}' in lines
        assert f'moetier_{name}_total{{replica="v"}} 0' in lines


def test_without_near_data_there_is_none(tiers: Tiers) -> None:
    _, store = tiers.record_server()
    link = link_to(tiers, Endpoints(1, (store,), ()))
    assert link.near_data is None
    link.close()


class Lost:
    """A source that fails, and is exchanged in the middle of that if told so."""

    tier = "test"

    def __init__(self, manifest: Any, during: Any = None) -> None:
        self.manifest = manifest
        self._during = during
        self.closed = False

    def fetch(self, requests: Any) -> list[torch.Tensor]:
        if self._during is not None:
            self._during()
        raise ExpertUnavailableError("its actor is gone (test)")

    def close(self) -> None:
        self.closed = True


def test_a_fetch_that_fails_on_an_exchanged_source_is_asked_again(tiers: Tiers) -> None:
    manifest = tiers.segment.manifest
    lost = Lost(manifest, lambda: source.switch(Segment(tiers.folder)))
    source = FollowingSource(lost, UseCounter(lambda: 0.0))
    (data, _) = source.fetch(CODES)
    assert torch.equal(data, tiers.segment.fetch(CODES)[0])
    assert lost.closed
    source.close()


def test_a_fetch_that_fails_on_the_source_of_today_fails(tiers: Tiers) -> None:
    with pytest.raises(ExpertUnavailableError):
        FollowingSource(Lost(tiers.segment.manifest), UseCounter(lambda: 0.0)).fetch(CODES)


def test_the_directory_is_opened_where_it_is_used(tmp_path: Path) -> None:
    assert open_directory(DirectorySettings()) is None
    password = tmp_path / "password"
    password.write_text("hunter2\n")
    opener = open_directory(
        DirectorySettings(
            kind="redis", redis_url="redis://127.0.0.1:1/0", password_file=str(password)
        )
    )
    assert opener is not None
    directory = opener()
    assert isinstance(directory, RedisDirectory)
    directory.close()
