"""Goal: copies of a store follow the use of their links, on real Ray nodes and over a new manager.

Method: three raylets of this machine with a label each, the launcher of the tier manager, a reader
that does nothing but read from the copies there are, and so waits for them all its time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster import keeper as keeper_module
from cluster.autoscaling_memory import MemoryTargets
from cluster.memory_scaling_settings import MemoryScalingSettings
from cluster.ray_launcher import RayLauncher, TierSettings
from cluster.settings import DirectorySettings, NdpSettings, StoreSettings
from cluster.sized_keeper import SizedKeeper
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource
from expert_store.segment import Segment
from expert_store.types import RecordRequest
from gpu_worker.messages import WorkerStats
from tests.hand_store import build_store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
WAIT_S = 90.0
SCALING = MemoryScalingSettings(
    max_replicas=3,
    link_bytes_per_s=2e3,  # a link that any reading fills
    interval_s=1,
    upscale_delay_s=0,
    downscale_delay_s=3,
    targets=MemoryTargets(use=0.5, wait=0.1, calm_margin=1.0),
)


class Reader:
    """Reads all records again and again while `is_busy`; its statistics as a GPU worker's."""

    def __init__(self, segment: Segment) -> None:
        self.listings: list[Listing] = []
        self.is_busy = True
        self._segment = segment
        self._wait_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stats(self) -> list[WorkerStats]:
        return [WorkerStats("r", 0, 0, 0, busy_s=self._wait_s, counters={"wait_s": self._wait_s})]

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        requests = [RecordRequest(key, "codes") for key in sorted(self._segment.keys)]
        with closing(GrpcSource(self._segment.manifest, lambda: self.listings)) as source:
            while not self._ended.wait(0.01):
                if self.is_busy and self.listings:
                    start_s = time.monotonic()
                    source.fetch(requests)
                    self._wait_s += time.monotonic() - start_s


def test_copies_follow_the_use_of_links(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "LEAVE_S", 1.0)
    build_store(tmp_path)
    store = StoreSettings(path=str(tmp_path), placement="full", autoscaling=SCALING)
    settings = TierSettings(store, NdpSettings(), DirectorySettings())
    launcher = RayLauncher(settings, str(tmp_path))
    reader = Reader(Segment(tmp_path))

    async def made() -> SizedKeeper:
        return SizedKeeper(
            launcher,
            store,
            settings.ndp,
            await launcher.nodes(),
            workers=reader.stats,
            clock=time.monotonic,
        )

    async def until(keeper: SizedKeeper, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, keeper.statuses()
            await keeper.tend()
            reader.listings = [running.status.listing for running in keeper.running()]
            await asyncio.sleep(0.2)

    async def scenario() -> None:
        keeper = await made()
        await keeper.start()
        try:
            assert len(keeper.running()) == 2
            await until(keeper, lambda: len(keeper.running()) == 3)
            where = {running.status.listing.node_id for running in keeper.running()}
            assert len(where) == 3, "a second copy on the same node would have the same link"

            before = {running.status.pid for running in keeper.running()}
            keeper = await made()  # the manager ended; its actors live on
            await keeper.start()
            assert {running.status.pid for running in keeper.running()} == before

            reader.is_busy = False
            await until(keeper, lambda: len(keeper.running()) == 1)
            await until(keeper, lambda: not alive(before - {keeper.running()[0].status.pid}))
        finally:
            await keeper.close()

    try:
        asyncio.run(scenario())
    finally:
        reader.close()


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}/stat").exists()}
