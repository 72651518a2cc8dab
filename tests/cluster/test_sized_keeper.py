"""Goal: a tier has two copies once two nodes are there, grows when links are busy and shrinks when
not, never stopping an actor that workers may still be asking.

Method: a launcher of this process, holders whose totals and a clock whose time only tests move.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from cluster.autoscaling_memory import MemoryTargets
from cluster.keeper import (
    LEAVE_S,
)
from cluster.memory_scaling_settings import MemoryScalingSettings
from cluster.placement import Node
from cluster.settings import NdpSettings, StoreSettings
from cluster.sized_keeper import LOOK_S, SizedKeeper
from cluster.tier_actors import (
    TierLost,
)
from expert_store.listing import HolderLoad
from gpu_worker.messages import WorkerStats
from tests.cluster.fake_tiers import NODES, Clock, FakeLauncher

LABEL = "tier=x"
LINK = 1e6
SCALING = MemoryScalingSettings(
    max_replicas=3,
    link_bytes_per_s=LINK,
    interval_s=5,
    upscale_delay_s=0,
    downscale_delay_s=10,
    request_nodes=True,
    targets=MemoryTargets(use=0.5, wait=0.1, calm_margin=1.0),
)


class World:
    """A keeper over fake actors; each worker second is half waiting for copies, if `is_slow`."""

    def __init__(self, nodes: tuple[Node, ...], **store: Any) -> None:
        self.launcher = FakeLauncher(nodes)
        self.clock = Clock()
        self.wait = 0.0
        self.keeper = SizedKeeper(
            self.launcher,
            StoreSettings(placement="full", label=LABEL, **store),
            NdpSettings(enabled=True, label=LABEL),
            nodes,
            workers=self.workers,
            clock=self.clock,
        )

    def workers(self) -> list[WorkerStats]:
        counters = {"wait_s": self.wait * self.clock.now_s, "near_wait_s": 0.0}
        return [WorkerStats("w", 0, 0, 0, busy_s=self.clock.now_s, counters=counters)]

    async def passes(self, seconds: float, *, link: float = 0.0) -> None:
        """Time passes in which every store actor's link is used so much."""
        self.clock.now_s += seconds
        for handle, placed in enumerate(self.launcher.placed, start=1):
            if placed.need.section == "store":
                was = self.launcher.loads.get(handle, HolderLoad()).served_bytes
                self.launcher.loads[handle] = HolderLoad(int(was + link * LINK * seconds))
        await self.keeper.tend()
        await self.keeper.tend()  # what the first wanted, this one starts and asks

    @property
    def names(self) -> list[str]:
        return sorted(status.name for status in self.keeper.statuses())


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def test_a_second_node_gets_a_second_copy() -> None:
    async def scenario() -> None:
        world = World(NODES[:1])
        await world.keeper.start()
        assert world.names == ["ndp-0", "store-0"]
        world.launcher.live = list(NODES)
        await world.passes(LOOK_S)
        assert world.names == ["ndp-0", "ndp-1", "store-0", "store-1"]
        assert {(name, node) for name, node in world.launcher.started[2:]} == {
            ("store-1", "b"),
            ("ndp-1", "b"),
        }
        world.launcher.live = list(NODES[:1])  # a lost node is no reason to want fewer
        await world.passes(LOOK_S)
        assert world.names == ["ndp-0", "ndp-1", "store-0", "store-1"]

    run(scenario())


def test_two_nodes_have_two_copies_from_the_start() -> None:
    async def scenario() -> None:
        world = World(NODES)
        await world.keeper.start()
        assert world.names == ["ndp-0", "ndp-1", "store-0", "store-1"]

    run(scenario())


def test_a_number_that_is_given_holds() -> None:
    async def scenario() -> None:
        world = World(NODES, replicas=1)
        await world.keeper.start()
        await world.passes(LOOK_S)
        assert world.keeper.num_of("store") == 1

    run(scenario())


def test_busy_links_get_copies_and_nodes_and_calm_gives_them_back() -> None:
    async def scenario() -> None:
        world = World(NODES, autoscaling=SCALING)
        await world.keeper.start()
        await world.passes(5)  # the first look
        world.wait = 0.5
        await world.passes(5, link=0.9)
        # 1.8 links' worth at half use are 4, at most 3, of which there is room for 2.
        assert world.launcher.requested == [(LABEL, 3)]
        assert world.keeper.num_of("store") == 2
        world.launcher.live.append(Node("c", "10.0.0.3", {"tier": "x"}))
        await world.passes(5, link=0.9)
        assert world.keeper.num_of("store") == 3
        assert world.launcher.started[-1] == ("store-2", "c")
        world.wait = 0.0
        for _ in range(5):
            await world.passes(5, link=0.05)
        assert world.keeper.num_of("store") == 1
        assert world.launcher.requested[-1] == (LABEL, 1)

    run(scenario())


def test_one_that_is_too_many_serves_until_workers_know() -> None:
    async def scenario() -> None:
        world = World(NODES)
        await world.keeper.start()
        before = world.keeper.generation
        world.keeper.resize("store", 1)
        assert world.keeper.generation > before
        assert len([r for r in world.keeper.running() if r.role == "store"]) == 1
        await world.keeper.tend()
        assert world.launcher.stopped == []
        world.clock.now_s += LEAVE_S
        await world.keeper.tend()
        assert world.launcher.stopped == [2]

    run(scenario())


def test_of_those_too_many_the_lost_one_goes_first() -> None:
    async def scenario() -> None:
        world = World(NODES)
        await world.keeper.start()
        world.launcher.sick[1] = TierLost("restarting", is_final=False)
        await world.keeper.tend()
        world.keeper.resize("store", 1)
        (kept,) = [r for r in world.keeper.running() if r.role == "store"]
        assert kept.handle == 2
        await world.keeper.close()
        assert sorted(world.launcher.stopped) == [1, 2, 3, 4]

    run(scenario())


def test_the_next_manager_goes_on_with_as_many_as_there_are() -> None:
    async def scenario() -> None:
        world = World(NODES, autoscaling=SCALING)
        await world.keeper.start()
        world.wait = 0.5
        for _ in range(3):
            await world.passes(5, link=0.9)
        assert "store-1" in world.names
        before = [running.handle for running in world.keeper.running()]
        num_started = len(world.launcher.started)
        following = SizedKeeper(
            world.launcher,
            StoreSettings(placement="full", label=LABEL, autoscaling=SCALING),
            NdpSettings(enabled=True, label=LABEL),
            NODES,
            workers=world.workers,
            clock=world.clock,
        )
        await following.start()
        assert [running.handle for running in following.running()] == before
        assert len(world.launcher.started) == num_started

    run(scenario())
