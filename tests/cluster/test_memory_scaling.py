"""Goal: totals of two moments become the right shares, and those the right size of the tier.

Method: arithmetic spelled out along a hand-made clock: bytes over a known link, seconds of work.
"""

from __future__ import annotations

import pytest

from cluster.autoscaling_memory import MemoryDecision, MemoryTargets
from cluster.memory_scaling import MemoryScaler
from cluster.memory_scaling_settings import MemoryScalingSettings
from expert_store.listing import HolderLoad
from gpu_worker.messages import WorkerStats

LINK = 1e8
SETTINGS = MemoryScalingSettings(
    max_replicas=4,
    link_bytes_per_s=LINK,
    interval_s=10,
    upscale_delay_s=0,
    downscale_delay_s=20,
    targets=MemoryTargets(use=0.5, wait=0.1, calm_margin=1.0),
)


def worker(busy_s: float, wait_s: float, near_s: float, name: str = "w") -> WorkerStats:
    counters = {"wait_s": wait_s, "near_wait_s": near_s}
    return WorkerStats(name, 0, 0, 0, busy_s=busy_s, counters=counters)


class Tier:
    """A tier whose holders serve at a steady rate, and workers that wait a steady share."""

    def __init__(self, settings: MemoryScalingSettings = SETTINGS, nodes: int = 4) -> None:
        self.scaler = MemoryScaler(settings)
        self.now_s = 0.0
        self.nodes = nodes
        self.stores = {"store-0": 0.0}
        self.ndp = {"ndp-0": 0.0}
        self.busy_s = self.wait_s = self.near_s = 0.0

    def after(
        self,
        seconds: float = 10.0,
        *,
        link: float = 0.0,
        ndp: float = 0.0,
        wait: float = 0.0,
        near: float = 0.0,
    ) -> MemoryDecision | None:
        """The decision after so long, with each link, near-data worker and wait used so much."""
        self.now_s += seconds
        self.stores = {name: was + link * LINK * seconds for name, was in self.stores.items()}
        self.ndp = {name: was + ndp * seconds for name, was in self.ndp.items()}
        self.busy_s += seconds
        self.wait_s += (wait + near) * seconds
        self.near_s += near * seconds
        return self.scaler.decide(
            self.now_s,
            stores={name: HolderLoad(served_bytes=int(v)) for name, v in self.stores.items()},
            ndp={name: HolderLoad(busy_s=v) for name, v in self.ndp.items()},
            workers=[worker(self.busy_s, self.wait_s, self.near_s)],
            nodes=(self.nodes, self.nodes),
        )


def test_the_first_moment_is_only_taken_down() -> None:
    tier = Tier()
    assert tier.scaler.is_due(0.0)
    assert tier.after() is None
    assert not tier.scaler.is_due(tier.now_s + 9)
    assert tier.scaler.is_due(tier.now_s + 10)


def test_a_busy_link_that_workers_wait_for_gets_copies() -> None:
    tier = Tier()
    tier.after()
    decision = tier.after(link=0.9, wait=0.5)
    assert decision is not None
    assert (decision.store, decision.ndp) == (2, 1)  # 0.9 of a link, at half use


def test_waiting_for_near_data_is_not_waiting_for_copies() -> None:
    tier = Tier()
    tier.after()
    decision = tier.after(link=0.9, ndp=0.9, near=0.5)
    assert decision is not None
    assert (decision.store, decision.ndp) == (1, 2)


def test_no_more_than_nodes_unless_more_are_asked_for() -> None:
    for request, expected in ((False, 1), (True, 2)):
        settings = MemoryScalingSettings(
            link_bytes_per_s=LINK,
            upscale_delay_s=0,
            request_nodes=request,
            targets=SETTINGS.targets,
        )
        tier = Tier(settings, nodes=1)
        tier.after()
        decision = tier.after(link=0.9, wait=0.5)
        assert decision is not None
        assert decision.store == expected


def test_what_is_not_used_goes_after_a_calm_time() -> None:
    tier = Tier()
    tier.stores = {"store-0": 0.0, "store-1": 0.0}
    tier.after()
    wanted = [tier.after(link=0.05) for _ in range(4)]
    assert [decision.store for decision in wanted if decision] == [2, 2, 2, 1]


def test_a_restarted_holder_is_not_compared_with_the_one_before() -> None:
    tier = Tier()
    tier.after()
    tier.stores = {"store-0 again": 0.0}
    decision = tier.after(link=0.9, wait=0.5)
    assert decision is not None
    assert decision.store == 1  # nothing is known of it: as it was, until there is


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_replicas", 0), ("max_replicas", 0), ("link_bytes_per_s", 0), ("interval_s", 0)],
)
def test_nonsense_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: got {value}"):
        MemoryScalingSettings(**{field: value})
