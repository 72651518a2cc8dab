"""Goal: tier actors come up where they belong, are replaced when lost, and never in a busy loop.

Method: a launcher of this process whose actors die on command, and a clock that only tests move
(`fake_tiers.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from cluster.keeper import (
    Keeper,
)
from cluster.placement import Need, Node, PlacementError
from cluster.tier_actors import (
    TierLost,
    TierStartError,
)
from tests.cluster.fake_tiers import NDP, NODES, STORE, Clock, FakeLauncher


def keeper_of(launcher: FakeLauncher, clock: Clock, *needs: Need) -> Keeper:
    return Keeper(launcher, needs or (STORE,), start_timeout_s=30, clock=clock)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def test_all_start_and_answer() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        keeper = keeper_of(launcher, Clock(), STORE, replace(STORE, name="store-1"), NDP)
        await keeper.start()
        assert launcher.started == [("store-0", "a"), ("store-1", "b"), ("ndp-0", "a")]
        assert [s.problem for s in keeper.statuses()] == [None] * 3
        assert [r.role for r in keeper.running()] == ["store", "store", "ndp"]
        await keeper.close()
        assert launcher.stopped == [1, 2, 3]
        assert keeper.running() == ()

    run(scenario())


def test_a_missing_label_fails_before_anything_starts() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher([Node("a", "10.0.0.1")])
        with pytest.raises(PlacementError, match="tier=x"):
            await keeper_of(launcher, Clock()).start()
        assert launcher.started == []

    run(scenario())


def test_an_actor_that_cannot_start_is_named_and_the_others_are_stopped() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        launcher.sick[2] = TierLost("no store at /x", is_final=True)
        with pytest.raises(TierStartError, match=r"ndp-0 did not start on 10\.0\.0\.1: no store"):
            await keeper_of(launcher, Clock(), STORE, NDP).start()
        assert sorted(launcher.stopped) == [1, 2]

    run(scenario())


def test_a_restart_behind_the_same_handle_is_noticed() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        keeper = keeper_of(launcher, Clock())
        await keeper.start()
        generation = keeper.generation
        await keeper.tend()
        assert keeper.generation == generation, "nothing changed"
        launcher.sick[1] = TierLost("restarting", is_final=False)
        await keeper.tend()
        assert [s.problem for s in keeper.statuses()] == ["restarting"]
        del launcher.sick[1]
        launcher.pids[1] = 999
        await keeper.tend()
        (status,) = keeper.statuses()
        assert (status.problem, status.restarts) == (None, 1)
        assert keeper.generation == generation + 1
        assert launcher.started == [("store-0", "a")]

    run(scenario())


def test_damaged_records_are_told_and_make_it_no_other_actor() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        keeper = keeper_of(launcher, clock)
        await keeper.start()
        generation = keeper.generation
        launcher.quarantined[1] = 3
        await keeper.tend()
        (status,) = keeper.statuses()
        assert (status.quarantined, status.restarts, status.problem) == (3, 0, None)
        assert keeper.generation == generation

    run(scenario())


def test_a_dead_actor_is_replaced_on_a_live_node() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        keeper = keeper_of(launcher, clock)
        await keeper.start()
        launcher.live = [NODES[1]]
        launcher.sick[1] = TierLost("its node died", is_final=True)
        await keeper.tend()
        assert launcher.stopped == [1]
        assert keeper.running() == ()
        await keeper.tend()
        assert len(launcher.started) == 1, "not before the backoff has passed"
        clock.now_s += 0.5
        await keeper.tend()
        await keeper.tend()
        assert launcher.started == [("store-0", "a"), ("store-0", "b")]
        (running,) = keeper.running()
        assert running.handle == 2
        (status,) = keeper.statuses()
        assert (status.node, status.problem, status.restarts) == ("10.0.0.2", None, 1)

    run(scenario())


def test_a_silent_actor_is_given_up_after_the_start_timeout() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        keeper = keeper_of(launcher, clock)
        await keeper.start()
        launcher.sick[1] = TierLost("unavailable", is_final=False)
        await keeper.tend()
        clock.now_s += 29
        await keeper.tend()
        assert launcher.stopped == []
        clock.now_s += 1
        await keeper.tend()
        assert launcher.stopped == [1]

    run(scenario())


def test_the_backoff_doubles_to_its_bound_and_a_success_resets_it() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        keeper = keeper_of(launcher, clock)
        await keeper.start()
        launcher.sick = {n: TierLost("crash", is_final=True) for n in range(100)}
        starts: list[float] = []
        for _ in range(4000):
            before = len(launcher.started)
            await keeper.tend()
            if len(launcher.started) > before:
                starts.append(clock.now_s)
            clock.now_s += 0.25
        gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        assert gaps[0] <= 2
        assert gaps == sorted(gaps)
        assert 30 <= gaps[-1] <= 31
        launcher.sick = {}
        clock.now_s += 30
        await keeper.tend()
        await keeper.tend()
        assert [s.problem for s in keeper.statuses()] == [None]
        launcher.sick[len(launcher.started)] = TierLost("crash", is_final=True)
        await keeper.tend()
        clock.now_s += 0.5
        before = len(launcher.started)
        await keeper.tend()
        assert len(launcher.started) == before + 1

    run(scenario())


def test_what_found_no_place_is_tried_at_once_when_a_node_comes() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        keeper = keeper_of(launcher, clock)
        await keeper.start()
        launcher.live = []
        launcher.sick[1] = TierLost("its node died", is_final=True)
        for _ in range(100):
            await keeper.tend()
            clock.now_s += 1.0
        assert len(launcher.started) == 1
        problems: list[str | None] = []
        launcher.live = [NODES[1]]
        for _ in range(2):
            await keeper.tend()
            problems += [status.problem for status in keeper.statuses()]
            clock.now_s += 0.1
        assert launcher.started[1:] == [("store-0", "b")]
        assert problems[-1] is None
        launcher.sick[2] = TierLost("crash", is_final=True)
        for _ in range(100):
            await keeper.tend()
        assert len(launcher.started) == 2, "the same nodes: not before the backoff has passed"

    run(scenario())


def test_copies_that_share_a_node_part_when_another_is_free() -> None:
    """A lost node's copy is started beside the other; the node comes back, with another id."""

    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        keeper = keeper_of(launcher, clock, STORE, replace(STORE, name="store-1"))
        await keeper.start()
        assert [running.status.listing.node_id for running in keeper.running()] == ["a", "b"]
        launcher.live = [NODES[0]]
        launcher.sick[2] = TierLost("its node died", is_final=True)
        for _ in range(60):
            await keeper.tend()
            clock.now_s += 1.0
        where = [running.status.listing.node_id for running in keeper.running()]
        assert where == ["a", "a"]
        launcher.live.append(replace(NODES[1], node_id="c"))
        launcher.sick[4] = TierLost("starting", is_final=False)
        for _ in range(15):
            await keeper.tend()
            clock.now_s += 1.0
        assert [r.handle for r in keeper.running()] == [1, 3], (
            "both serve until the new one answers"
        )
        del launcher.sick[4]
        for _ in range(60):
            await keeper.tend()
            clock.now_s += 1.0
        where = [running.status.listing.node_id for running in keeper.running()]
        assert sorted(where) == ["a", "c"]
        assert launcher.started[3:] == [("store-1", "c")]
        assert launcher.stopped == [2, 3]

    run(scenario())


def test_a_drained_node_is_left_once_the_actor_elsewhere_answers() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        keeper = keeper_of(launcher, clock)
        await keeper.start()
        generation = keeper.generation
        launcher.sick[2] = TierLost("starting", is_final=False)
        keeper.drain("a")
        await keeper.tend()
        await keeper.tend()
        assert launcher.started == [("store-0", "a"), ("store-0", "b")]
        assert [r.handle for r in keeper.running()] == [1], "the old one serves meanwhile"
        assert not keeper.is_drained("a")
        del launcher.sick[2]
        await keeper.tend()
        assert [r.handle for r in keeper.running()] == [2]
        assert launcher.stopped == [1]
        assert keeper.is_drained("a")
        assert keeper.generation == generation + 1

    run(scenario())


def test_a_drained_node_is_not_left_for_nowhere() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher([NODES[0]]), Clock()
        keeper = keeper_of(launcher, clock)
        await keeper.start()
        keeper.drain("a")
        for _ in range(3):
            await keeper.tend()
        assert [r.handle for r in keeper.running()] == [1]
        assert launcher.stopped == []
        launcher.live.append(NODES[1])
        launcher.sick[2] = TierLost("crash", is_final=True)
        clock.now_s += 30
        await keeper.tend()
        assert launcher.stopped == [2], "the one elsewhere failed"
        assert [r.handle for r in keeper.running()] == [1]
        clock.now_s += 30
        await keeper.tend()
        assert [r.handle for r in keeper.running()] == [3]

    run(scenario())


def test_closing_in_the_middle_of_a_drain_stops_both() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        keeper = keeper_of(launcher, Clock())
        await keeper.start()
        launcher.sick[2] = TierLost("starting", is_final=False)
        keeper.drain("a")
        await keeper.tend()
        await keeper.close()
        assert sorted(launcher.stopped) == [1, 2]

    run(scenario())


def test_a_node_that_is_gone_is_told_as_the_problem() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        keeper = keeper_of(launcher, clock)
        await keeper.start()
        launcher.live = []
        launcher.sick[1] = TierLost("its node died", is_final=True)
        await keeper.tend()
        clock.now_s += 1
        await keeper.tend()
        (status,) = keeper.statuses()
        assert status.problem is not None
        assert "no live node has the label tier=x" in status.problem

    run(scenario())


def test_a_keeper_after_a_crash_takes_over_what_runs() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        second = replace(STORE, name="store-1")
        first = keeper_of(launcher, clock, STORE, second, NDP)
        await first.start()
        before = first.running()
        launcher.sick[2] = TierLost("its process is gone", is_final=True)

        keeper = keeper_of(launcher, clock, STORE, second, NDP)  # the first one is never closed
        await keeper.start()
        assert launcher.started[3:] == [("store-1", "b")]  # away from the one that was found
        assert [r.handle for r in keeper.running()] == [1, 4, 3]
        assert keeper.running()[0].status == before[0].status
        assert launcher.stopped == []
        assert [s.problem for s in keeper.statuses()] == [None] * 3
        await keeper.close()
        assert sorted(launcher.stopped) == [1, 3, 4]

    run(scenario())


def test_what_runs_on_a_node_that_is_gone_is_not_taken_over() -> None:
    async def scenario() -> None:
        launcher, clock = FakeLauncher(), Clock()
        await keeper_of(launcher, clock, STORE).start()
        launcher.live = [node for node in launcher.live if node.node_id != "a"]
        keeper = keeper_of(launcher, clock, STORE)
        await keeper.start()
        assert launcher.started == [("store-0", "a"), ("store-0", "b")]

    run(scenario())
