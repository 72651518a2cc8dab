"""Goal: records come over gRPC byte for byte, from another copy where one fails, in bounded time.

Method: real servers in this process on free ports and unix sockets, in front of segments built by
hand; copies stopped, damaged and hung on purpose.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store import wire
from expert_store.errors import (
    CorruptRecordError,
    DirectoryError,
    ExpertUnavailableError,
    StoreError,
    StoreFormatError,
)
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource, RecordServer
from expert_store.segment import Segment, locate
from expert_store.types import ExpertKey, RecordKind, RecordRequest
from tests.circles import no_tensor_in_a_circle
from tests.hand_store import build_store

KINDS: tuple[RecordKind, ...] = ("codes", "factors")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    build_store(folder)
    return folder


def serve(stack: ExitStack, store: Path, *addresses: str, **kwargs: object) -> RecordServer:
    segment = stack.enter_context(closing(Segment(store, kwargs.pop("keys", None))))
    return stack.enter_context(
        closing(RecordServer(segment, addresses or ("127.0.0.1:0",), **kwargs))
    )


def listing(server: RecordServer, name: str = "a", **kwargs: object) -> Listing:
    fields = {"role": "records", "version": server._version, "node_id": "n", "keys": None}
    return Listing(name=name, addresses=server.addresses, **{**fields, **kwargs})


def connect(
    stack: ExitStack, store: Path, *listings: Listing, deadline_s: float = 20.0
) -> GrpcSource:
    manifest = Segment(store).manifest
    source = GrpcSource(manifest, lambda: listings, deadline_s=deadline_s)
    return stack.enter_context(closing(source))


def all_requests(store: Path) -> list[RecordRequest]:
    return [RecordRequest(key, kind) for key in Segment(store).manifest.experts for kind in KINDS]


def damage(store: Path, request: RecordRequest) -> None:
    record = locate(Segment(store).manifest, request)
    data = bytearray((store / record.file).read_bytes())
    data[record.offset] ^= 1
    (store / record.file).write_bytes(data)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_every_record_and_prefix_is_the_segments(
    stack: ExitStack, store: Path, tmp_path: Path, kind: str
) -> None:
    address = "127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s"
    source = connect(stack, store, listing(serve(stack, store, address)))
    requests = all_requests(store)
    requests += [RecordRequest(ExpertKey(0, 1), "factors", n) for n in (0, 1, 3, 4)]
    expected = Segment(store).fetch(requests)
    assert source.tier == "grpc"
    for found, truth in zip(source.fetch(requests), expected, strict=True):
        assert torch.equal(found, truth)
    for request, truth in zip(requests, expected, strict=True):  # alone: by one small message
        assert torch.equal(source.fetch([request])[0], truth)
    sent, received = source.bytes_moved
    assert received == 2 * sum(data.numel() for data in expected)
    assert 0 < sent < 10_000
    assert source.fetch([]) == []


def test_a_record_longer_than_a_message(stack: ExitStack, tmp_path: Path) -> None:
    store = tmp_path / "store"
    build_store(store, layers=(0,), experts=1, hidden=2048, ffn=4096, bits=3, blocks="")
    request = RecordRequest(ExpertKey(0, 0), "codes")
    source = connect(stack, store, listing(serve(stack, store)))
    (data,) = source.fetch([request])
    assert data.numel() > 4 * wire.CHUNK_BYTES
    assert torch.equal(data, Segment(store).fetch([request])[0])


def test_segments_of_different_experts_serve_one_fetch(stack: ExitStack, store: Path) -> None:
    keys = sorted(Segment(store).manifest.experts)
    parts = (frozenset(keys[:2]), frozenset(keys[2:]))
    source = connect(
        stack,
        store,
        *(
            listing(serve(stack, store, keys=part), name=str(i), keys=part)
            for i, part in enumerate(parts)
        ),
    )
    requests = all_requests(store)
    for found, truth in zip(source.fetch(requests), Segment(store).fetch(requests), strict=True):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_second_copy_serves_when_one_is_gone(stack: ExitStack, store: Path, lost: int) -> None:
    servers = [serve(stack, store), serve(stack, store)]
    source = connect(stack, store, *(listing(s, name=str(i)) for i, s in enumerate(servers)))
    requests = all_requests(store)
    source.fetch(requests)
    servers[lost].close(grace_s=0)
    with no_tensor_in_a_circle():
        source.fetch(requests)
    for found, truth in zip(source.fetch(requests), Segment(store).fetch(requests), strict=True):
        assert torch.equal(found, truth)


def test_a_damaged_copy_is_passed_over_record_by_record(
    stack: ExitStack, store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    build_store(other)
    requests = all_requests(store)
    truth = [data.clone() for data in Segment(store).fetch(requests)]
    damage(store, requests[0])
    damage(other, requests[5])
    listings = [listing(serve(stack, folder), name=folder.name) for folder in (store, other)]
    source = connect(stack, store, *listings)
    with no_tensor_in_a_circle():
        source.fetch(requests)
    for found, expected in zip(source.fetch(requests), truth, strict=True):
        assert torch.equal(found, expected)
    damage(other, requests[0])
    fresh = connect(stack, store, listings[0], listing(serve(stack, other), name="fresh"))
    with pytest.raises(CorruptRecordError, match=r"layer 0 expert 0 .*expected sha256"):
        fresh.fetch(requests)


def test_all_copies_gone_is_an_error_within_the_deadline(stack: ExitStack, store: Path) -> None:
    server = serve(stack, store)
    source = connect(stack, store, listing(server), deadline_s=0.4)
    server.close(grace_s=0)
    started = time.monotonic()
    with pytest.raises(ExpertUnavailableError, match="layer 0 expert 0 within 0.4 s.*UNAVAILABLE"):
        source.fetch(all_requests(store))
    assert time.monotonic() - started < 2
    nobody = connect(stack, store, deadline_s=0.2)
    with pytest.raises(ExpertUnavailableError, match="no copy is listed"):
        nobody.fetch(all_requests(store))


def test_a_copy_that_comes_back_is_asked_again(stack: ExitStack, store: Path) -> None:
    first = serve(stack, store)
    first.close(grace_s=0)
    listings = [listing(first)]
    source = GrpcSource(Segment(store).manifest, lambda: tuple(listings), deadline_s=20)
    stack.enter_context(closing(source))
    found: list[torch.Tensor] = []
    requests = all_requests(store)
    thread = threading.Thread(target=lambda: found.extend(source.fetch(requests)))
    thread.start()
    listings[0] = listing(serve(stack, store))  # a restarted copy, elsewhere
    thread.join()
    assert len(found) == len(requests)


def test_a_hung_copy_costs_half_the_deadline(
    stack: ExitStack, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, good = serve(stack, store), serve(stack, store)
    release = threading.Event()
    stack.callback(release.set)
    fetch = staticmethod(lambda requests: release.wait() and [])
    monkeypatch.setattr(hung, "_segment", type("Hung", (), {"fetch": fetch}))
    # Half of it must be enough for the good copy on a busy machine.
    source = connect(stack, store, listing(hung, name="a"), listing(good, name="b"), deadline_s=6.0)
    requests = all_requests(store)
    assert len(source.fetch(requests)) == len(requests)


def test_a_hung_only_copy_hits_the_deadline(
    stack: ExitStack, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = serve(stack, store)
    release = threading.Event()
    stack.callback(release.set)
    fetch = staticmethod(lambda requests: release.wait() and [])
    monkeypatch.setattr(hung, "_segment", type("Hung", (), {"fetch": fetch}))
    source = connect(stack, store, listing(hung), deadline_s=0.3)
    with pytest.raises(ExpertUnavailableError, match="DEADLINE_EXCEEDED"):
        source.fetch(all_requests(store))


def test_a_copy_that_lists_more_than_it_holds(stack: ExitStack, store: Path) -> None:
    part = serve(stack, store, keys=[ExpertKey(0, 0)])
    source = connect(stack, store, listing(part), deadline_s=0.3)
    assert len(source.fetch([RecordRequest(ExpertKey(0, 0), "codes")])) == 1
    with pytest.raises(ExpertUnavailableError, match="is not in this segment"):
        source.fetch([RecordRequest(ExpertKey(1, 1), "codes")])
    whole = connect(stack, store, listing(part), listing(serve(stack, store), name="b"))
    assert len(whole.fetch(all_requests(store))) == 12


def test_another_stores_copy_is_never_mixed_in(
    stack: ExitStack, store: Path, tmp_path: Path
) -> None:
    build_store(tmp_path / "newer", seed=1)
    newer = serve(stack, tmp_path / "newer")
    source = connect(stack, store, listing(newer), deadline_s=0.2)
    with pytest.raises(ExpertUnavailableError, match="no copy is listed"):
        source.fetch(all_requests(store))
    version = Segment(store).manifest.version
    lying = connect(stack, store, listing(newer, version=version), deadline_s=0.3)
    with pytest.raises(ExpertUnavailableError, match="holds store version"):
        lying.fetch(all_requests(store))


def test_callers_mistakes_and_a_lost_directory(stack: ExitStack, store: Path) -> None:
    source = connect(stack, store, listing(serve(stack, store)))
    with pytest.raises(ValueError, match="layer 7 expert 0"):
        source.fetch([RecordRequest(ExpertKey(7, 0), "codes")])
    with pytest.raises(ValueError, match="deadline_s: got 0"):
        GrpcSource(source.manifest, tuple, deadline_s=0)

    def lost() -> tuple[Listing, ...]:
        raise DirectoryError("Redis is away")

    with pytest.raises(ExpertUnavailableError, match="Redis is away"):
        GrpcSource(source.manifest, lost).fetch(all_requests(store))
    source.close()
    with pytest.raises(ExpertUnavailableError, match="closed"):
        source.fetch(all_requests(store))


def test_a_port_in_use_is_named(stack: ExitStack, store: Path) -> None:
    address = serve(stack, store).addresses[0]
    with pytest.raises(StoreError, match=f"cannot listen on {address}"):
        serve(stack, store, address)
    with pytest.raises(ValueError, match="addresses"):
        RecordServer(Segment(store), ())


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"", "a header has"),
        (b"GET / HTTP/1.1\r\n\r\n", "magic"),
        (wire.encode_call("v", [])[:-1], "announces"),
        (wire.encode_call("v", []) + b"x", "announces"),
        (wire.encode_call("v", [])[:12] + b"\x02" + wire.encode_call("v", [])[13:], "compression"),
    ],
)
def test_a_malformed_request_is_a_bad_request(
    stack: ExitStack, store: Path, message: bytes, told: str
) -> None:
    server = serve(stack, store)
    with grpc.insecure_channel(server.addresses[0]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream("/moetier.Records/Fetch")(message, timeout=10))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert told in caught.value.details()
    # and the server lives on
    source = connect(stack, store, listing(server))
    assert len(source.fetch(all_requests(store))) == 12


def test_the_request_bytes_are_fixed() -> None:
    call = wire.encode_call("abc", [RecordRequest(ExpertKey(1, 2), "factors", 3)])
    assert call == (
        b"MTRQ\x02\x00\x03\x00\x01\x00\x00\x00\x00\x00\x00\x00abc"
        b"\x01\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x03\x00\x00\x00"
    )
    with pytest.raises(ValueError, match="requests: got 4097"):
        wire.encode_call("", [RecordRequest(ExpertKey(0, 0), "codes")] * 4097)


u32 = st.integers(0, 2**32 - 1)
requests_ = st.builds(
    RecordRequest,
    st.builds(ExpertKey, u32, u32),
    st.sampled_from(KINDS),
    st.none() | st.integers(0, 2**31 - 1),
)


@settings(deadline=None)
@given(
    st.text("0123456789abcdef", max_size=64),
    st.lists(requests_, max_size=8),
    st.sampled_from(["none", "zstd"]),
)
def test_requests_survive_the_wire(
    version: str, requests: list[RecordRequest], compression: wire.Compression
) -> None:
    call = wire.decode_call(wire.encode_call(version, requests, compression))
    assert call == wire.RecordCall(version, tuple(requests), compression)


@settings(deadline=None)
@given(st.lists(requests_, max_size=3), st.data())
def test_a_mutated_request_is_decoded_or_a_value_error(
    requests: list[RecordRequest], data: st.DataObject
) -> None:
    message = bytearray(wire.encode_call("0a", requests))
    for _ in range(data.draw(st.integers(0, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(message)))
    try:
        call = wire.decode_call(bytes(message[:cut]))
    except ValueError:
        return
    again = wire.encode_call(call.version, call.requests, call.compression)
    assert again == bytes(message[:cut])


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=6), st.integers(1, 30))
def test_records_are_put_together_from_any_chunks(lengths: list[int], chunk: int) -> None:
    data = bytes(i % 256 for i in range(sum(lengths)))
    assembly = wire.Assembly(lengths)
    for start in range(0, len(data), chunk):
        assembly.add(data[start : start + chunk])
    assert b"".join(bytes(record.numpy()) for record in assembly.finish()) == data
    with pytest.raises(StoreFormatError, match="1 bytes more"):
        assembly.add(b"x")
    short = wire.Assembly([*lengths, 1])
    short.add(data)
    with pytest.raises(StoreFormatError, match=f"1 of the records' {len(data) + 1} bytes"):
        short.finish()
