"""Defects to plant in the product, one at a time: the simulator must find each of them.

Each names a class, the method of it that is replaced, and what makes the wrong one of the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from expert_store.failover import ListedCopies
from expert_store.repair import Repairer
from expert_store.segment import Segment
from gpu_worker.engine import Engine
from gpu_worker.experts import StoreExperts
from gpu_worker.scheduler import Scheduler
from gpu_worker.streamer import Streamer


@dataclass(frozen=True, slots=True)
class Mutation:
    """`make` gives the planted function from the right one."""

    name: str
    owner: type
    attribute: str
    make: Callable[[Any], Any]


def _first_copy_only(right: Any) -> Any:
    def copies(self: Any, refresh: bool) -> Any:
        return right(self, refresh)[:1]

    return copies


def _leaks_a_slot(right: Any) -> Any:
    def finish(self: Any, sequence: Any, reason: Any, error: Any = None) -> Any:
        slot = right(self, sequence, reason, error)
        if slot is not None and reason in ("cancelled", "error"):
            self._free.remove(slot)
        return slot

    return finish


def _hides_degradation(right: Any) -> Any:
    def event(self: Any, *args: Any) -> Any:
        return replace(right(self, *args), degraded=False)

    return event


def _trusts_the_disk(right: Any) -> Any:
    return lambda self, *args: None


def _repairs_nothing(right: Any) -> Any:
    return lambda self: 0


def _keeps_bytes(right: Any) -> Any:
    def release(self: Any, copy: Any) -> None:
        if copy.request.kind == "codes":
            right(self, copy)

    return release


def _gives_up_with_near_data(right: Any) -> Any:
    def collect(self: Any, layer: int, remote: Any, near: Any, local: Any) -> Any:
        parts = right(self, layer, remote, near, local)
        if near is not None and near.exception() is not None:
            local.parts.clear()
        return parts

    return collect


MUTATIONS = (
    Mutation("no failover to a second copy", ListedCopies, "__call__", _first_copy_only),
    Mutation("a cancelled sequence keeps its slot", Scheduler, "finish", _leaks_a_slot),
    Mutation("a degraded answer is not flagged", Engine, "_event", _hides_degradation),
    Mutation("a damaged record is not noticed", Segment, "_check", _trusts_the_disk),
    Mutation("a damaged record is not repaired", Repairer, "repair_all", _repairs_nothing),
    Mutation("bytes in flight are not given back", Streamer, "_release", _keeps_bytes),
    Mutation("lost near data loses its part", StoreExperts, "_collect", _gives_up_with_near_data),
)
