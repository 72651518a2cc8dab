"""Goal: a slow, hung or lost copy costs little while another one is there, and is found out.

Method: latencies and counts on a clock moved by hand; real servers that hang, slow down or die.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch

from expert_store.failover import Attempts, Copy
from expert_store.health import CopyHealth
from expert_store.latency import MAX_REST_S, ExtraRequests, Latencies
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource, RecordServer
from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from tests.hand_store import build_store


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_slow_copy_is_avoided_probed_and_believed_again() -> None:
    clock = Time()
    latencies = Latencies(clock)
    assert latencies.best(["a", "b"], 1000) == ["a", "b"]
    for _ in range(8):
        latencies.answered("a", 1000, 0.2)
        latencies.answered("b", 1000, 0.01)
    assert latencies.best(["a", "b"], 1000) == ["a"]  # the probe
    assert latencies.best(["a", "b"], 1000) == ["b"]
    assert latencies.best(["a"], 1000) == ["a"]  # better than none
    assert latencies.best(["a", "b"], 10**6) == ["a", "b"]  # of that size nothing is known
    clock.now += MAX_REST_S
    assert latencies.best(["a", "b"], 1000) == ["a"]
    for _ in range(8):
        latencies.answered("a", 1000, 0.01)
    assert latencies.best(["a", "b"], 1000) == ["a", "b"]


def test_a_copy_that_fails_rests_longer_each_time() -> None:
    clock = Time()
    latencies = Latencies(clock, rest_s=0.5, max_rest_s=2.0)
    for pause_s in (0.5, 1.0, 2.0, 2.0):
        latencies.failed("a")
        clock.now += pause_s - 0.01
        assert latencies.best(["a", "b"], 1) == ["b"]
        clock.now += 0.02
        assert latencies.best(["a", "b"], 1) == ["a", "b"]
    latencies.answered("a", 1, 0.1)
    latencies.failed("a")
    clock.now += 0.51
    assert not latencies.is_resting("a")
    latencies.overtaken("a", 1, 0.1)
    assert not latencies.is_resting("a")
    latencies.overtaken("a", 1, 0.1)
    assert latencies.is_resting("a")


def test_extra_requests_are_a_bounded_share() -> None:
    extra = ExtraRequests(0.05, burst=2)
    assert [extra.spend() for _ in range(3)] == [True, True, False]
    spent = 0
    for _ in range(1000):
        extra.earn()
        spent += extra.spend()
    assert 45 <= spent <= 50
    with pytest.raises(ValueError, match="share and burst"):
        ExtraRequests(2)


def test_a_late_batch_is_asked_of_another_holder_only() -> None:
    requests = [RecordRequest(ExpertKey(0, expert), "codes") for expert in range(2)]
    health = CopyHealth(Time())
    attempts = Attempts(requests, sizes=[10, 10], health=health, max_batch=8)
    copies = [Copy("unix:a", None, True, "a"), Copy("a:1", None, False, "a")]
    (late,) = attempts.plan(copies)
    assert late.is_only_hope
    attempts.began(late)
    assert attempts.plan(copies) == []
    assert attempts.plan_besides(late, copies) == []
    (other,) = attempts.plan_besides(late, [*copies, Copy("b:1", None, False, "b")])
    assert (other.address, other.indices, other.num_bytes) == ("b:1", (0, 1), 20)
    records = [torch.zeros(10, dtype=torch.uint8)] * 2
    attempts.answered(other, records)
    attempts.answered(late, [torch.ones(10, dtype=torch.uint8)] * 2)
    assert attempts.results is not None
    assert int(attempts.results[0].sum()) == 0  # the first answer stays


def test_clients_read_a_hot_expert_of_different_copies() -> None:
    hot = [RecordRequest(ExpertKey(3, 4), "codes")]
    copies = [Copy("a:1", None, False, "a"), Copy("b:1", None, False, "b")]

    def chosen(client: int) -> str:
        health = CopyHealth(Time(), client)
        (batch,) = Attempts(hot, sizes=[10], health=health, max_batch=8).plan(copies)
        return batch.address

    assert {chosen(0), chosen(1)} == {"a:1", "b:1"}
    assert {chosen(7) for _ in range(5)} == {chosen(1)}  # the same one each time


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


class Slowed:
    """A segment that waits before each read: for `pause_s`, or until `gate` is set."""

    def __init__(self, segment: Segment) -> None:
        self.segment, self.manifest = segment, segment.manifest
        self.gate = threading.Event()
        self.pause_s = 0.0
        self.num_reads = 0

    def fetch(self, requests: list[RecordRequest]) -> list[torch.Tensor]:
        self.num_reads += 1
        self.gate.wait(self.pause_s)
        return self.segment.fetch(requests)


def copies(stack: ExitStack, store: Path) -> tuple[list[Slowed], GrpcSource]:
    build_store(store)
    slowed = [Slowed(stack.enter_context(closing(Segment(store)))) for _ in range(2)]
    servers = [stack.enter_context(closing(RecordServer(segment))) for segment in slowed]
    stack.callback(lambda: [segment.gate.set() for segment in slowed])
    version = slowed[0].manifest.version
    listings = [
        Listing(f"s{i}", "records", version, "n", server.addresses)
        for i, server in enumerate(servers)
    ]
    source = GrpcSource(slowed[0].manifest, lambda: listings, deadline_s=20.0)
    return slowed, stack.enter_context(closing(source))


def test_a_hung_copy_costs_under_a_second_once(stack: ExitStack, tmp_path: Path) -> None:
    slowed, source = copies(stack, tmp_path / "store")
    requests = [RecordRequest(key, "codes") for key in source.manifest.experts]
    slowed[0].pause_s = 20.0
    began = time.monotonic()
    found = source.fetch(requests)
    first_s = time.monotonic() - began
    assert all(map(torch.equal, found, slowed[1].segment.fetch(requests)))
    reads = slowed[0].num_reads
    source.fetch(requests)
    assert slowed[0].num_reads == reads  # it rests
    assert source.statistics.hung == 1
    assert 0.5 <= first_s < 5  # half a second, and room for a busy machine


def test_a_slow_copy_is_hedged_then_left_out(stack: ExitStack, tmp_path: Path) -> None:
    slowed, source = copies(stack, tmp_path / "store")
    requests = [RecordRequest(key, "codes") for key in source.manifest.experts]
    for _ in range(10):
        source.fetch(requests)
    slowed[0].pause_s = 20.0
    for _ in range(20):
        source.fetch(requests)
    assert source.statistics.hedged + source.statistics.hung >= 1
    assert slowed[0].num_reads <= 10 + 6
    assert source.statistics.hedged <= 8 + 0.05 * source.statistics.calls
