"""Goal: several stores are served at once, each by tiers of its own, as long as workers use them.

Method: the keepers' fake launcher, one for each store, and a clock that only tests move.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from cluster.keeper import (
    Keeper,
)
from cluster.tier_actors import (
    TierLost,
    TierStartError,
)
from cluster.tier_sets import LOADING_S, MAX_STORES, UNUSED_S, TierSets, TooManyStoresError
from tests.cluster.fake_tiers import NDP, STORE, Clock, FakeLauncher

OLD, NEW = "/stores/v1", "/stores/v2"


class Bench:
    """Tier sets whose every store gets a launcher that the test can reach."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.launchers: dict[str, list[FakeLauncher]] = {}
        self.sick: dict[str, TierLost] = {}  # by store: how its actors answer
        self.sets = TierSets(self._keeper, clock=self.clock)

    async def _keeper(self, store: str) -> Keeper:
        launcher = FakeLauncher()
        if store in self.sick:
            launcher.sick = dict.fromkeys(range(100), self.sick[store])
        self.launchers.setdefault(store, []).append(launcher)
        count = sum(map(len, self.launchers.values()))
        return Keeper(
            launcher,
            (STORE, NDP),
            start_timeout_s=30,
            clock=self.clock,
            first_generation=1000 * count,
        )

    def starts(self, store: str) -> int:
        return len(self.launchers.get(store, ()))


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


async def settle() -> None:
    """Let what was begun in the background run as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_configured_store_is_there_once_it_is_configured() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(OLD)
        assert tuple(bench.sets.keepers) == (OLD,)
        assert [s.name for s in bench.sets.statuses()] == ["store-0", "ndp-0"]
        keeper = await bench.sets.get(OLD)
        assert [r.role for r in keeper.running()] == ["store", "ndp"]
        assert bench.starts(OLD) == 1

    run(scenario())


def test_a_first_store_that_does_not_start_is_the_callers_to_hear() -> None:
    async def scenario() -> None:
        bench = Bench()
        bench.sick[OLD] = TierLost("no store there", is_final=True)
        with pytest.raises(TierStartError, match="no store there"):
            await bench.sets.configure(OLD)
        assert tuple(bench.sets.keepers) == ()
        assert bench.sets.configured is None

    run(scenario())


def test_two_versions_are_served_while_the_old_one_has_workers() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(OLD)
        await bench.sets.configure(NEW)
        new = await bench.sets.get(NEW)
        old = bench.sets.used(OLD)
        assert old is not None
        assert old is not new
        assert old.generation != new.generation
        names = [s.name for s in bench.sets.statuses()]
        assert names == ["store-0@v1", "ndp-0@v1", "store-0", "ndp-0"]
        for _ in range(10):
            bench.clock.now_s += UNUSED_S - 1
            assert bench.sets.used(OLD) is old
            await bench.sets.tend()
        assert tuple(bench.sets.keepers) == (OLD, NEW)
        bench.clock.now_s += UNUSED_S
        await bench.sets.tend()
        assert tuple(bench.sets.keepers) == (NEW,)
        assert bench.launchers[OLD][0].stopped == [1, 2]
        assert bench.launchers[NEW][0].stopped == []

    run(scenario())


def test_the_configured_store_stays_without_any_worker() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(OLD)
        bench.clock.now_s += 10 * LOADING_S
        await bench.sets.tend()
        assert tuple(bench.sets.keepers) == (OLD,)

    run(scenario())


def test_a_store_that_a_worker_still_loads_is_kept_until_its_first_report() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(OLD)
        await bench.sets.get(NEW)
        bench.clock.now_s += LOADING_S - 1
        await bench.sets.tend()
        assert NEW in bench.sets.keepers
        assert bench.sets.used(NEW) is not None
        bench.clock.now_s += UNUSED_S
        await bench.sets.tend()
        assert tuple(bench.sets.keepers) == (OLD,)

    run(scenario())


def test_rolling_back_finds_the_old_tiers_still_there() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(OLD)
        before = await bench.sets.get(OLD)
        await bench.sets.configure(NEW)
        await bench.sets.get(NEW)
        await bench.sets.configure(OLD)
        assert await bench.sets.get(OLD) is before
        assert bench.starts(OLD) == 1
        bench.clock.now_s += LOADING_S
        await bench.sets.tend()
        assert tuple(bench.sets.keepers) == (OLD,)

    run(scenario())


def test_askers_of_one_store_share_its_start_and_outlive_one_another() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(OLD)
        asks = [asyncio.create_task(bench.sets.get(NEW)) for _ in range(5)]
        await asyncio.sleep(0)
        asks[0].cancel()
        found = await asyncio.gather(*asks, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert len({id(keeper) for keeper in found[1:]}) == 1
        assert bench.starts(NEW) == 1

    run(scenario())


def test_a_new_store_that_does_not_start_leaves_the_old_one_serving() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(OLD)
        bench.sick[NEW] = TierLost("damaged", is_final=True)
        await bench.sets.configure(NEW)
        await settle()
        with pytest.raises(TierStartError, match="damaged"):
            await bench.sets.get(NEW)
        assert bench.sets.used(OLD) is not None
        assert tuple(bench.sets.keepers) == (OLD,)
        # It is tried again, ever less often, until it works.
        starts: list[float] = []
        for _ in range(1000):
            count = bench.starts(NEW)
            await bench.sets.tend()
            await settle()
            if bench.starts(NEW) > count:
                starts.append(bench.clock.now_s)
            bench.clock.now_s += 0.25
        gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        assert gaps == sorted(gaps)
        assert 30 <= gaps[-1] <= 31
        del bench.sick[NEW]
        assert await bench.sets.get(NEW) is not None

    run(scenario())


def test_a_report_for_a_store_without_tiers_starts_them_and_does_not_wait() -> None:
    """So it is after the manager itself was restarted: the workers still run."""

    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(NEW)
        assert bench.sets.used(OLD) is None
        assert bench.sets.used(OLD) is None
        await settle()
        assert bench.sets.used(OLD) is not None
        assert bench.starts(OLD) == 1

    run(scenario())


def test_stores_have_a_limit_that_says_what_is_served() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(OLD)
        for number in range(MAX_STORES - 1):
            await bench.sets.get(f"/s/{number}")
        with pytest.raises(TooManyStoresError, match="cannot serve /s/x: 8 stores .* /stores/v1"):
            await bench.sets.get("/s/x")
        assert bench.sets.used("/s/x") is None
        bench.clock.now_s += LOADING_S
        await bench.sets.tend()
        assert tuple(bench.sets.keepers) == (OLD,)
        await bench.sets.get("/s/x")

    run(scenario())


def test_closing_stops_everything() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.sets.configure(OLD)
        await bench.sets.get(NEW)
        await bench.sets.close()
        assert tuple(bench.sets.keepers) == ()
        for store in (OLD, NEW):
            assert bench.launchers[store][0].stopped == [1, 2]

    run(scenario())
