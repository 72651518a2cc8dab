"""Goal: a store spread over real Ray nodes is read and follows a node that joins, drains or dies.

Method: three or four raylets of this machine with a label each, the launcher of the tier manager,
and a gRPC source that reads every record after each change, byte for byte.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import spread_keeper
from cluster.ray_launcher import RayLauncher, TierSettings
from cluster.segments import expert_sizes
from cluster.settings import DirectorySettings, NdpSettings, StoreSettings
from cluster.spread import SpreadRules
from cluster.spread_keeper import SpreadKeeper
from expert_store.rpc import GrpcSource
from expert_store.segment import Segment
from expert_store.types import RecordRequest
from tests.hand_store import build_store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
WAIT_S = 90.0
LABELS = {"moetier.io/store": "true", "moetier.io/ndp": "true"}


async def until(keeper: SpreadKeeper, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, (keeper.statuses(), keeper.segments.nodes.keys())
        await keeper.tend()
        await asyncio.sleep(0.2)


def read_all(keeper: SpreadKeeper, segment: Segment) -> None:
    """Every record over the network from who is said to hold it, as it stands on the disk."""
    listings = [r.status.listing for r in keeper.running() if r.role == "store"]
    requests = [
        RecordRequest(key, kind) for key in sorted(segment.keys) for kind in ("codes", "factors")
    ]
    with closing(GrpcSource(segment.manifest, lambda: listings)) as source:
        for found, expected in zip(source.fetch(requests), segment.fetch(requests), strict=True):
            assert torch.equal(found, expected)


def test_a_spread_store_is_read_whole_as_nodes_come_and_go(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread_keeper, "LINGER_S", 0.5)
    build_store(tmp_path, experts=6)
    segment = Segment(tmp_path)
    sizes = expert_sizes(segment.manifest, together=True)
    whole = sum(size.codes_bytes for size in sizes)
    store = StoreSettings(path=str(tmp_path), placement="spread", node_bytes=max(1 << 20, whole))
    ndp = NdpSettings(enabled=True, num_threads=1)
    settings = TierSettings(store, ndp, DirectorySettings())
    keeper = SpreadKeeper(
        RayLauncher(settings, str(tmp_path)),
        SpreadRules(sizes, store, ndp),
        start_timeout_s=WAIT_S,
        clock=time.monotonic,
    )

    def placed_on() -> set[str]:
        return {r.status.listing.node_id for r in keeper.running() if r.role == "store"}

    async def scenario() -> None:
        try:
            await keeper.start()
            assert len(placed_on()) == 3
            assert sum(r.status.num_experts for r in keeper.running() if r.role == "ndp") == 12
            assert sum(r.status.num_experts for r in keeper.running() if r.role == "store") == 24
            await asyncio.to_thread(read_all, keeper, segment)

            # Not in a thread: a Ray node sets a signal handler, which only the main one may.
            late = nodes.add_node(num_cpus=1, labels=LABELS)
            await until(keeper, lambda: late.node_id in placed_on())
            await asyncio.to_thread(read_all, keeper, segment)

            leaver = next(node for node in placed_on() if node != late.node_id)
            keeper.drain(leaver)
            await until(keeper, lambda: keeper.is_drained(leaver))
            await asyncio.to_thread(read_all, keeper, segment)

            nodes.remove_node(late, allow_graceful=False)
            await until(keeper, lambda: late.node_id not in placed_on())
            assert len(placed_on()) == 2
            await asyncio.to_thread(read_all, keeper, segment)
        finally:
            await keeper.close()

    asyncio.run(scenario())
