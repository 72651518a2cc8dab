"""From what the memory tier did lately to how large it should be: counts between two moments in,
a decision of `cluster/autoscaling_memory.py` out. Knows no Ray and starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.autoscaling_decision import Memory
from cluster.autoscaling_memory import (
    Extent,
    MemoryDecision,
    MemoryLoad,
    decide_memory,
)
from cluster.memory_scaling_settings import MemoryScalingSettings
from expert_store.listing import HolderLoad
from gpu_worker.messages import WorkerStats


@dataclass(frozen=True, slots=True)
class _Moment:
    """Totals at one time: of each holder by its name and process, and of each GPU worker."""

    at_s: float
    stores: Mapping[str, HolderLoad]
    ndp: Mapping[str, HolderLoad]
    workers: Mapping[str, WorkerStats]


class MemoryScaler:
    """Remembers the moment before and what the decision wants remembered; decides every
    `interval_s`.
    """

    def __init__(self, settings: MemoryScalingSettings) -> None:
        self._settings = settings
        self._memory = (Memory(), Memory())
        self._before: _Moment | None = None

    def is_due(self, now_s: float) -> bool:
        """Whether a decision is to be made: the first asked of it only takes the totals down."""
        return self._before is None or now_s - self._before.at_s >= self._settings.interval_s

    def decide(
        self,
        now_s: float,
        *,
        stores: Mapping[str, HolderLoad],
        ndp: Mapping[str, HolderLoad],
        workers: Iterable[WorkerStats],
        nodes: tuple[int, int],
    ) -> MemoryDecision | None:
        """How large the tier should be; None the first time, when there is nothing to compare.

        Totals are by a name that is another one after a restart. `nodes` are those that can take a
        store actor, and a near-data worker: a further one on the same node is no use. With
        `request_nodes` more may be wanted than there are nodes.
        """
        settings = self._settings
        now = _Moment(now_s, dict(stores), dict(ndp), {w.replica: w for w in workers})
        before, self._before = self._before, now
        if before is None:
            return None
        seconds = now_s - before.at_s
        link_use = tuple(
            min((load.served_bytes - was.served_bytes) / seconds / settings.link_bytes_per_s, 1.0)
            for load, was in _pairs(now.stores, before.stores)
        )
        ndp_use = tuple(
            min((load.busy_s - was.busy_s) / seconds, 1.0)
            for load, was in _pairs(now.ndp, before.ndp)
        )
        link_wait, ndp_wait = _waits(before.workers, now.workers)
        load = MemoryLoad(
            Extent(
                len(stores), *self._bounds(settings.min_replicas, settings.max_replicas, nodes[0])
            ),
            Extent(len(ndp), *self._bounds(settings.min_ndp, settings.max_ndp, nodes[1])),
            link_use,
            ndp_use,
            link_wait,
            ndp_wait,
        )
        decision = decide_memory(
            load, self._memory, now_s, targets=settings.targets, delays=settings.delays
        )
        self._memory = decision.memory
        return decision

    def _bounds(self, least: int, most: int, nodes: int) -> tuple[int, int]:
        if not self._settings.request_nodes:
            most = max(1, min(most, nodes))
        return min(least, most), most


def _pairs(
    now: Mapping[str, HolderLoad], before: Mapping[str, HolderLoad]
) -> Sequence[tuple[HolderLoad, HolderLoad]]:
    return [(load, before[name]) for name, load in now.items() if name in before]


def _waits(
    before: Mapping[str, WorkerStats], now: Mapping[str, WorkerStats]
) -> tuple[float, float]:
    """Parts of the GPU workers' busy time that they waited for copies, and for near data."""
    busy_s = wait_s = near_s = 0.0
    for name, stats in now.items():
        if name not in before:
            continue
        was = before[name]
        busy_s += max(stats.busy_s - was.busy_s, 0.0)
        wait_s += max(_counted(stats, "wait_s") - _counted(was, "wait_s"), 0.0)
        near_s += max(_counted(stats, "near_wait_s") - _counted(was, "near_wait_s"), 0.0)
    if not busy_s:
        return 0.0, 0.0
    return min(max(wait_s - near_s, 0.0) / busy_s, 1.0), min(near_s / busy_s, 1.0)


def _counted(stats: WorkerStats, name: str) -> float:
    return float(stats.counters.get(name, 0.0))
