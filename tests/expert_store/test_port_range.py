"""Goal: holders share a range of ports, one each, and say so when it is used up.

Method: real gRPC servers on this machine, in front of one hand-made store.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from expert_store.errors import StoreError
from expert_store.holder import Holder, each_port
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource, RecordServer
from expert_store.segment import Segment
from expert_store.types import RecordRequest
from tests.hand_store import build_store


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that were free just now."""
    for first in range(21000, 60000, 97):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return first
    raise AssertionError("no free ports")


def hold(stack: ExitStack, segment: Segment, ports: str) -> Listing:
    holder = Holder(
        segment,
        "records",
        partial(RecordServer, segment),
        tcp_address=f"127.0.0.1:{ports}",
        name=f"h{len(ports)}",
        node_id="n",
        directory=None,
    )
    stack.callback(holder.close)
    return holder.status.listing


def test_each_holder_takes_the_next_port_until_none_is_left(tmp_path: Path) -> None:
    build_store(tmp_path / "store")
    first = free_ports(2)
    ports = f"{first}-{first + 1}"
    with ExitStack() as stack:
        found = [hold(stack, Segment(tmp_path / "store"), ports) for _ in range(2)]
        tcp = [listing.addresses[1] for listing in found]
        assert tcp == [f"127.0.0.1:{first}", f"127.0.0.1:{first + 1}"]
        segment = Segment(tmp_path / "store")
        with pytest.raises(StoreError, match=f"cannot listen on 127.0.0.1:{first + 1}"):
            hold(stack, segment, ports)
        request = RecordRequest(min(segment.keys), "codes")
        for listing in found:  # both sockets of the second survived that the first port was taken
            for address in listing.addresses:
                only = Listing("x", "records", listing.version, "n", (address,), None)
                source = stack.enter_context(
                    closing(GrpcSource(segment.manifest, lambda o=only: [o]))
                )
                (record,) = source.fetch([request])
                assert record.equal(segment.fetch([request])[0])


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:0", ["10.0.0.1:0"]),
        ("[::1]:7000-7001", ["[::1]:7000", "[::1]:7001"]),
        ("10.0.0.1:7000-7000", ["10.0.0.1:7000"]),
    ],
)
def test_each_port(address: str, expected: list[str]) -> None:
    assert each_port(address) == expected
