"""Goal: when a part of a real cluster dies under load, no request fails that another could answer.

Method: the cluster of `benchmarks/faults` (Ray, Serve, Redis; each host a set of namespaces) under
its independent clients, broken in every way of the catalogue. Only outcomes are asserted:
how long it takes is the report's business (`python -m benchmarks.faults`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_endpoint import wait_until

from benchmarks.faults.catalogue import ALL
from benchmarks.faults.hosts import Host, Network, Pause, check_machine
from benchmarks.faults.leftovers import footprint, leftovers
from benchmarks.faults.run import LoadedCluster, Windows, loaded_cluster
from benchmarks.offload_parts.hosts import HostsUnavailable

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

FAULTS = {fault.key: fault for fault in ALL}
WINDOWS = Windows(before_s=6.0, after_s=3.0)


@pytest.fixture(scope="module")
def machine() -> None:
    """A machine that can have hosts, or a skip that says what it lacks."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server not found; apt-get install redis-server")
    try:
        check_machine()
        Pause().close()
    except HostsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["redis", "rocksdb"])
def cluster(machine: None, request: pytest.FixtureRequest) -> Iterator[LoadedCluster]:
    with loaded_cluster(request.param) as cluster:
        yield cluster
        prints = footprint(cluster.deployment)
    assert not leftovers(prints)


@pytest.mark.parametrize(
    ("cluster", "key"),
    sorted((fault.gcs, fault.key) for fault in ALL if fault.key != "none"),
    indirect=["cluster"],
)
def test_no_request_fails_that_another_part_could_answer(key: str, cluster: LoadedCluster) -> None:
    figures = cluster.suffer(FAULTS[key], WINDOWS).figures
    assert figures.sent > 0, "no load"
    assert figures.failed_with_alternative == 0, figures
    assert figures.changed == 0, figures
    assert figures.full_quality_s is not None, "not whole again"
    assert figures.tokens_per_s_after > 0, figures


def test_hosts_reach_each_other_only_while_their_links_are_up(
    machine: None, tmp_path: Path
) -> None:
    with Network(("one", "two"), tmp_path) as network:
        listen = "import socket; s = socket.create_server(('', 80)); s.accept()[0].send(b'hello')"
        ask = (
            "import socket, sys; "
            "s = socket.create_connection((sys.argv[1], 80), 2); print(s.recv(9))"
        )
        one, two = network["one"], network["two"]
        address = one.address
        one.start(["python3", "-c", listen], {})
        two.set_link(is_up=False)
        two.start(["python3", "-c", ask, address], {})
        wait_ended(two)
        assert "hello" not in two.log.read_text()
        two.set_link(is_up=True)
        for _ in range(5):  # a link takes a moment to be up
            two.start(["python3", "-c", ask, address], {})
            wait_ended(two)
            if "hello" in two.log.read_text():
                break
        assert "hello" in two.log.read_text()
        left = one.processes() | two.processes()
    assert not [process for process in left if process.is_alive]


def wait_ended(host: Host) -> None:
    wait_until(lambda: not host.is_running, "the host's command has ended")
