"""Goal: a spread store follows its nodes and its heat, and no expert is ever without an actor.

Method: the keepers' fake launcher and a clock that only tests move. After every round the live
actors are asked which experts they hold.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest

from cluster.expert_heat import HALF_LIFE_S, TELL_INTERVAL_S, ExpertHeat, UseCounter
from cluster.placement import Node, PlacementError
from cluster.segments import ExpertSize, SegmentError
from cluster.settings import NdpSettings, StoreSettings
from cluster.spread import LINK_LABEL, SpreadRules, room_bytes, wants_spread
from cluster.spread_keeper import LINGER_S, REPLACE_INTERVAL_S, SHUN_S, SpreadKeeper
from cluster.tier_actors import (
    TierLost,
    TierStartError,
)
from expert_store.types import ExpertKey
from gpu_worker.messages import ExpertUses
from tests.cluster.fake_tiers import Clock, FakeLauncher

MIB = 1 << 20
KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(12)]
SIZES = tuple(ExpertSize(key, MIB) for key in KEYS)
LABELS = {"tier": "x"}
NODES = [Node(f"node-{n}", f"10.0.0.{n}", LABELS, {"CPU": 4.0}) for n in range(6)]


def rules(*, room: int = 24, ndp: bool = True) -> SpreadRules:
    store = StoreSettings(placement="spread", label="tier=x", node_bytes=room * MIB)
    return SpreadRules(SIZES, store, NdpSettings(enabled=ndp, label="tier=x"))


class Bench:
    """A keeper over some of the nodes."""

    def __init__(self, num_nodes: int, spread: SpreadRules | None = None) -> None:
        self.clock = Clock()
        self.launcher = FakeLauncher(NODES[:num_nodes])
        self.keeper = SpreadKeeper(
            self.launcher, spread or rules(), start_timeout_s=30, clock=self.clock
        )

    def copies(self, section: str = "store") -> Counter[ExpertKey]:
        """How many running actors hold, or run, each expert."""
        found: Counter[ExpertKey] = Counter()
        for running in self.keeper.running():
            placed = self.launcher.placed[running.handle - 1]
            if placed.need.section == section:
                assert placed.keys is not None
                found.update(placed.keys)
        return found

    def live(self) -> set[int]:
        return set(range(1, len(self.launcher.placed) + 1)) - set(self.launcher.stopped)

    async def settle(self, rounds: int = 4) -> None:
        """Rounds, with what they begin run to its end; codes have an actor in every one."""
        for _ in range(rounds):
            await self.keeper.tend()
            for _ in range(100):
                await asyncio.sleep(0)
            assert set(self.copies()) == set(KEYS)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def test_every_node_holds_a_part_and_each_expert_is_held_twice_and_run_once() -> None:
    async def scenario() -> None:
        bench = Bench(4)
        await bench.keeper.start()
        assert bench.copies() == Counter(dict.fromkeys(KEYS, 2))
        assert bench.copies("ndp") == Counter(dict.fromkeys(KEYS, 1))
        assert sorted(s.name for s in bench.keeper.statuses()) == sorted(
            f"{kind}-{node.node_id[:8]}" for kind in ("store", "ndp") for node in NODES[:4]
        )
        generation = bench.keeper.generation
        await bench.settle()
        assert bench.keeper.generation == generation
        assert len(bench.launcher.placed) == 8, "nothing is restarted without a reason"

    run(scenario())


def test_a_lost_nodes_records_are_held_elsewhere() -> None:
    async def scenario() -> None:
        bench = Bench(4)
        await bench.keeper.start()
        generation = bench.keeper.generation
        for handle, placed in enumerate(bench.launcher.placed, start=1):
            if placed.node == NODES[0]:
                bench.launcher.sick[handle] = TierLost("its node died", is_final=True)
        bench.launcher.live.remove(NODES[0])
        await bench.settle()
        assert bench.copies() == Counter(dict.fromkeys(KEYS, 2))
        assert bench.copies("ndp") == Counter(dict.fromkeys(KEYS, 1))
        assert bench.keeper.generation > generation
        movement = bench.keeper.segments.movement
        assert 0 < movement.moved_bytes == movement.least_bytes
        bench.clock.now_s += LINGER_S
        await bench.settle()
        assert bench.live() == {running.handle for running in bench.keeper.running()}

    run(scenario())


def test_a_newcomer_takes_its_share_and_the_old_actors_linger() -> None:
    async def scenario() -> None:
        bench = Bench(3)
        await bench.keeper.start()
        before = bench.live()
        bench.launcher.live.append(NODES[3])
        await bench.settle()
        now = {running.handle for running in bench.keeper.running()}
        assert bench.copies() == Counter(dict.fromkeys(KEYS, 2))
        movement = bench.keeper.segments.movement
        assert movement.moved_bytes <= movement.least_bytes + MIB
        assert before - now, "those that gave something away are replaced"
        assert bench.live() == before | now, "workers that do not know yet still find them"
        bench.clock.now_s += LINGER_S
        await bench.settle()
        assert bench.live() == now

    run(scenario())


def test_a_drained_node_is_emptied_before_it_is_stopped() -> None:
    async def scenario() -> None:
        bench = Bench(4)
        await bench.keeper.start()
        bench.keeper.drain("node-1")
        await bench.settle()
        assert bench.copies() == Counter(dict.fromkeys(KEYS, 2))
        assert not bench.keeper.is_drained("node-1"), "its actors linger"
        bench.clock.now_s += LINGER_S
        await bench.settle()
        assert bench.keeper.is_drained("node-1")
        assert all(bench.launcher.placed[h - 1].node != NODES[1] for h in bench.live())

    run(scenario())


def test_a_drain_without_room_elsewhere_is_told_and_changes_nothing() -> None:
    async def scenario() -> None:
        scarce = Bench(3, rules(room=17, ndp=False))
        await scarce.keeper.start()
        scarce.keeper.drain("node-2")
        await scarce.settle()
        (problem,) = [s.problem for s in scarce.keeper.statuses() if s.problem]
        assert problem is not None
        assert "the records do not fit" in problem
        assert not scarce.keeper.is_drained("node-2")
        assert len(scarce.keeper.running()) == 3
        scarce.launcher.live.append(NODES[3])
        scarce.clock.now_s += 30
        await scarce.settle()
        scarce.clock.now_s += LINGER_S
        await scarce.settle()
        assert scarce.keeper.is_drained("node-2")
        assert [s.problem for s in scarce.keeper.statuses()] == [None] * 3

    run(scenario())


def test_a_newcomer_where_nothing_starts_is_left_out_and_tried_again() -> None:
    async def scenario() -> None:
        bench = Bench(3)
        await bench.keeper.start()
        bench.launcher.bad_nodes.add("node-3")
        bench.launcher.live.append(NODES[3])
        await bench.settle()
        problems = [s.problem for s in bench.keeper.statuses() if s.problem]
        assert any("did not start on 10.0.0.3: no such folder" in str(p) for p in problems)
        # Meanwhile another loss is answered without it.
        for handle, placed in enumerate(bench.launcher.placed, start=1):
            if placed.node == NODES[0]:
                bench.launcher.sick[handle] = TierLost("its node died", is_final=True)
        bench.launcher.live.remove(NODES[0])
        bench.clock.now_s += 1
        await bench.settle()
        assert bench.copies() == Counter(dict.fromkeys(KEYS, 2))
        bench.launcher.bad_nodes.clear()
        bench.clock.now_s += SHUN_S
        await bench.settle()
        assert {r.status.listing.node_id for r in bench.keeper.running()} == {
            "node-1",
            "node-2",
            "node-3",
        }
        assert [s.problem for s in bench.keeper.statuses() if s.problem] == []

    run(scenario())


def test_an_expert_that_got_hot_gets_more_copies_at_the_next_look() -> None:
    async def scenario() -> None:
        bench = Bench(4)
        await bench.keeper.start()
        uses = [ExpertUses(*key, 10) for key in KEYS] + [ExpertUses(0, 3, 1000)]
        bench.keeper.add_uses(uses)
        bench.keeper.add_uses([ExpertUses(99, 0, 5)])  # another version's
        await bench.settle()
        assert bench.copies()[ExpertKey(0, 3)] == 2
        bench.clock.now_s += REPLACE_INTERVAL_S
        await bench.settle()
        assert bench.copies()[ExpertKey(0, 3)] == 4
        assert bench.keeper.segments.movement.hot_bytes == 2 * MIB
        bench.clock.now_s += REPLACE_INTERVAL_S
        placed = len(bench.launcher.placed)
        await bench.settle()
        assert len(bench.launcher.placed) == placed, "the same heat moves nothing again"

    run(scenario())


def test_a_start_that_cannot_be_says_why_and_leaves_nothing() -> None:
    async def scenario() -> None:
        with pytest.raises(SegmentError, match=r"store\.node_bytes"):
            await Bench(2, rules(room=5)).keeper.start()
        with pytest.raises(PlacementError, match="no live node has the label tier=x"):
            await Bench(0).keeper.start()
        bench = Bench(3)
        bench.launcher.bad_nodes.add("node-1")
        with pytest.raises(TierStartError, match=r"on 10\.0\.0\.1: no such folder"):
            await bench.keeper.start()
        await bench.keeper.close()
        assert bench.live() == set()
        elsewhere = SpreadRules(
            SIZES, StoreSettings(label="tier=x", node_bytes=24 * MIB), NdpSettings(enabled=True)
        )
        with pytest.raises(PlacementError, match=r"moetier.io/ndp=true.*tier=x too"):
            await Bench(3, elsewhere).keeper.start()

    run(scenario())


def test_the_link_of_a_node_is_read_from_its_label() -> None:
    """Heat goes rather to the node with the fast link; a label that is no speed is told."""

    def node(n: int, gbps: str) -> Node:
        return Node(f"node-{n}", f"10.0.0.{n}", LABELS | {LINK_LABEL: gbps}, {"CPU": 4.0})

    nodes = [node(0, "25"), node(1, "1"), NODES[2]]
    assert [m.link_bytes_s for m in rules().memory_nodes(nodes)] == [25e9 / 8, 1e9 / 8, 1e9]
    for wrong in ("fast", "0", "-1", "inf", "nan", ""):
        with pytest.raises(PlacementError, match=r"node 10\.0\.0\.0: label .*link-gbps"):
            rules().memory_nodes([node(0, wrong)])


def test_closing_in_the_middle_of_a_move_stops_everything() -> None:
    async def scenario() -> None:
        bench = Bench(3)
        await bench.keeper.start()
        bench.launcher.live.append(NODES[3])
        await bench.keeper.tend()
        await asyncio.sleep(0)
        await bench.keeper.close()
        assert bench.live() == set()

    run(scenario())


def test_auto_spreads_where_some_node_cannot_hold_all() -> None:
    def node(memory: float | None) -> Node:
        return Node("n", "10.0.0.1", LABELS, {} if memory is None else {"memory": memory})

    auto = StoreSettings(label="tier=x")
    big, small = node(100 * MIB), node(30 * MIB)
    assert not wants_spread(auto, SIZES, [big, node(None)])
    assert wants_spread(auto, SIZES, [big, small, small])
    assert not wants_spread(auto, SIZES, [small]), "as before there were segments: from its disk"
    assert not wants_spread(auto, SIZES, [small, small]), "two copies do not fit"
    assert not wants_spread(auto, SIZES, [big, Node("o", "10.0.0.2", {}, {"memory": 1.0})])
    assert not wants_spread(StoreSettings(placement="full"), SIZES, [small])
    assert wants_spread(StoreSettings(placement="spread"), SIZES, [big])
    assert room_bytes(auto, big) == 60 * MIB
    with pytest.raises(PlacementError, match=r"store\.node_bytes"):
        room_bytes(auto, node(None))


def test_heat_cools_by_half_and_workers_tell_the_hottest_now_and_then() -> None:
    clock = Clock()
    heat = ExpertHeat(KEYS, clock)
    heat.add([ExpertUses(0, 1, 8)])
    clock.now_s += HALF_LIFE_S
    heat.add([ExpertUses(0, 1, 1), ExpertUses(7, 7, 3)])
    assert heat.current()[ExpertKey(0, 1)] == pytest.approx(5)
    assert set(heat.current()) == set(KEYS)
    counter = UseCounter(clock)
    counter.add([KEYS[0], KEYS[1], KEYS[0]])
    assert counter.take() == ()
    clock.now_s += TELL_INTERVAL_S
    assert counter.take() == (ExpertUses(0, 0, 2), ExpertUses(0, 1, 1))
    clock.now_s += TELL_INTERVAL_S
    assert counter.take() == ()


def test_a_keeper_after_a_crash_takes_over_the_placement() -> None:
    async def scenario() -> None:
        bench = Bench(4)
        await bench.keeper.start()
        num_started = len(bench.launcher.started)
        copies, runs = bench.copies(), bench.copies("ndp")

        bench.keeper = SpreadKeeper(  # the first one is never closed
            bench.launcher, rules(), start_timeout_s=30, clock=bench.clock
        )
        await bench.keeper.start()
        assert len(bench.launcher.started) == num_started
        assert (bench.copies(), bench.copies("ndp")) == (copies, runs)

    run(scenario())


def test_a_placement_that_lost_a_part_is_made_anew() -> None:
    async def scenario() -> None:
        bench = Bench(3)
        await bench.keeper.start()
        bench.launcher.sick[1] = TierLost("its process is gone", is_final=True)
        bench.keeper = SpreadKeeper(bench.launcher, rules(), start_timeout_s=30, clock=bench.clock)
        await bench.keeper.start()
        assert set(bench.copies().values()) == {2}
        assert bench.copies("ndp") == Counter(KEYS)

    run(scenario())
