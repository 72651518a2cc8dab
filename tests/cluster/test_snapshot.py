"""Goal: who has gone silent is not taken for running, and /health says so within seconds.

Method: reports on a clock of the test; the route over them, without HTTP and without Ray.
"""

from __future__ import annotations

import asyncio

import pytest

from cluster.openai_errors import ApiError
from cluster.orchestrator import WORKER_EXPIRY_S
from cluster.routes import Routes
from cluster.settings import HttpSettings
from cluster.snapshot import ClusterSnapshot, IngressStats, Reports, TierStatus
from gpu_worker.actor import REPORT_INTERVAL_S
from gpu_worker.messages import ModelDescription, WorkerStats


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TiersOf:
    """A tier manager that has the reports, and a worker that once described its model."""

    def __init__(self, workers: Reports[WorkerStats]) -> None:
        self._workers = workers

    async def snapshot(self, ingress: IngressStats) -> ClusterSnapshot:
        store = TierStatus("store-0", "store", "here")
        return ClusterSnapshot((store,), self._workers.current(), (ingress,))

    async def describe(self) -> ModelDescription:
        return ModelDescription("mini", "mixtral", 5, 6)


def test_a_report_counts_until_it_is_too_old() -> None:
    clock = Clock()
    reports = Reports[int](3.0, clock)
    reports.add("a", 1)
    clock.now_s += 2
    reports.add("b", 2)
    clock.now_s += 1
    assert reports.current() == (1, 2)
    clock.now_s += 0.1
    assert reports.current() == (2,)
    reports.add("a", 3)
    assert set(reports.current()) == {2, 3}


def test_health_follows_a_worker_that_was_killed_within_three_reports() -> None:
    clock = Clock()
    reports = Reports[WorkerStats](WORKER_EXPIRY_S, clock)
    tiers = TiersOf(reports)
    routes = Routes(tiers, tiers, HttpSettings(), "i")  # type: ignore[arg-type]
    reports.add("w", WorkerStats("w", 0, 0, 0))
    clock.now_s += 2 * REPORT_INTERVAL_S
    assert asyncio.run(routes.health()).status_code == 200
    clock.now_s += 1.1 * REPORT_INTERVAL_S
    with pytest.raises(ApiError, match="no GPU worker reports") as caught:
        asyncio.run(routes.health())
    assert caught.value.status == 503
    reports.add("w2", WorkerStats("w2", 0, 0, 0))
    assert asyncio.run(routes.health()).status_code == 200


def test_no_worker_is_healthy_where_autoscaling_may_end_the_last_one() -> None:
    tiers = TiersOf(Reports[WorkerStats](WORKER_EXPIRY_S, Clock()))
    routes = Routes(tiers, tiers, HttpSettings(), "i", needs_worker=False)  # type: ignore[arg-type]
    assert asyncio.run(routes.health()).status_code == 200
