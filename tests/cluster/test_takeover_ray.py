"""Goal: tier actors on real Ray outlive the tier manager that started them, are taken over by the
next one as they are, and end by themselves when none comes.

Method: managers are processes of their own that are killed with SIGKILL; a gRPC source reads
between them, byte for byte.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster.ray_launcher import RayLauncher, TierSettings, fingerprint
from cluster.settings import DirectorySettings, NdpSettings, StoreSettings
from cluster.sized_keeper import SizedKeeper
from expert_store.holder import HolderStatus
from expert_store.rpc import GrpcSource
from expert_store.segment import Segment
from expert_store.types import RecordRequest
from tests.hand_store import build_store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
LEASE_S = 10.0
WAIT_S = 90.0


class Manager:
    """A tier manager's keeper in a process of its own."""

    def __init__(self, store: str) -> None:
        settings = TierSettings(
            StoreSettings(path=store, placement="full", replicas=1, label=None, lease_s=LEASE_S),
            NdpSettings(enabled=True, replicas=1, num_threads=1, label=None),
            DirectorySettings(),
        )
        self._launcher = RayLauncher(settings, store)
        self._settings = settings
        self._keeper: SizedKeeper | None = None

    async def start(self) -> list[HolderStatus]:
        """What its actors say of themselves."""
        self._keeper = SizedKeeper(
            self._launcher,
            self._settings.store,
            self._settings.ndp,
            await self._launcher.nodes(),
            workers=list,
            clock=time.monotonic,
        )
        await self._keeper.start()
        return [running.status for running in self._keeper.running()]

    async def close(self) -> None:
        assert self._keeper is not None
        await self._keeper.close()

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def managers() -> Iterator[Any]:
    # Ray's workers cannot import what pytest has loaded.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield ray.remote(num_cpus=0)(Manager)
    finally:
        ray.shutdown()


def read_all(store: Path, found: list[HolderStatus]) -> None:
    segment = Segment(store)
    listings = [status.listing for status in found if status.listing.role == "records"]
    requests = [RecordRequest(key, "codes") for key in sorted(segment.keys)]
    with closing(GrpcSource(segment.manifest, lambda: listings)) as source:
        for got, expected in zip(source.fetch(requests), segment.fetch(requests), strict=True):
            assert torch.equal(got, expected)


def kill(manager: Any) -> None:
    """As a machine does: no farewell."""
    pid = ray.get(manager.pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert have_ended([pid])


def have_ended(pids: list[int]) -> bool:
    """Whether all of these processes are gone, after some waiting if need be."""
    end = time.monotonic() + WAIT_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_the_next_manager_takes_over_and_without_one_they_end(
    managers: Any, tmp_path: Path
) -> None:
    build_store(tmp_path)
    first = managers.remote(str(tmp_path))
    before = ray.get(first.start.remote(), timeout=WAIT_S)
    assert len(before) == 2
    kill(first)
    read_all(tmp_path, before)

    second = managers.remote(str(tmp_path))
    after = ray.get(second.start.remote(), timeout=WAIT_S)
    assert after == before  # processes, ports and names
    read_all(tmp_path, after)
    kill(second)

    assert have_ended([status.pid for status in before]), "their lease has run out long ago"
    time.sleep(3)  # Ray starts no other in their place
    assert not ray.util.list_named_actors(all_namespaces=True)


def test_an_orderly_end_leaves_none(managers: Any, tmp_path: Path) -> None:
    build_store(tmp_path)
    manager = managers.remote(str(tmp_path))
    found = ray.get(manager.start.remote(), timeout=WAIT_S)
    ray.get(manager.close.remote(), timeout=WAIT_S)
    assert have_ended([status.pid for status in found])
    assert not ray.util.list_named_actors(all_namespaces=True)


def test_other_settings_take_nothing_over() -> None:
    store, ndp = StoreSettings(), NdpSettings()
    same = fingerprint(TierSettings(store, ndp, DirectorySettings()), "/s")
    more = StoreSettings(replicas=3)
    assert fingerprint(TierSettings(more, ndp, DirectorySettings()), "/s") == same
    ports = StoreSettings(port_range="20000-20010")
    assert fingerprint(TierSettings(ports, ndp, DirectorySettings()), "/s") != same
    assert fingerprint(TierSettings(store, ndp, DirectorySettings()), "/t") != same
