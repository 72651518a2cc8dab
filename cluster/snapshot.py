"""What is known of a running cluster at one moment, as plain values that any process can read,
and the reports that it is put together from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from gpu_worker.messages import WorkerStats

Role = Literal["store", "ndp"]
Stats = TypeVar("Stats")


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One store or NDP actor. `problem` is None while it answers. Of its records some may be
    damaged and refused (`quarantined`), or served from another copy's bytes (`repaired`).
    """

    name: str
    role: Role
    node: str
    restarts: int = 0
    problem: str | None = None
    quarantined: int = 0
    repaired: int = 0


@dataclass(frozen=True, slots=True)
class IngressStats:
    """Requests that one ingress replica has answered, by (route, status); and how often it sent one
    to another worker because the first was lost.
    """

    replica: str
    requests: Mapping[tuple[str, int], int] = field(default_factory=dict)
    retries: int = 0


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """Everything that reported lately. Replicas that have gone silent are not in it."""

    tiers: tuple[TierStatus, ...] = ()
    workers: tuple[WorkerStats, ...] = ()
    ingresses: tuple[IngressStats, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not answer, one line each; empty when all is well."""
        return tuple(f"{tier.name}: {tier.problem}" for tier in self.tiers if tier.problem)

    @property
    def has_store(self) -> bool:
        """Whether some store actor answers."""
        return any(tier.role == "store" and tier.problem is None for tier in self.tiers)


class Reports(Generic[Stats]):
    """The last report of each replica. One that is older than `expiry_s` does not count any more.

    `clock` gives seconds.
    """

    def __init__(self, expiry_s: float, clock: Callable[[], float]) -> None:
        self._expiry_s = expiry_s
        self._clock = clock
        self._last: dict[str, tuple[float, Stats]] = {}

    def add(self, replica: str, stats: Stats) -> None:
        self._last[replica] = (self._clock(), stats)

    def current(self) -> tuple[Stats, ...]:
        """Of those who are heard of; who has gone silent is forgotten."""
        oldest = self._clock() - self._expiry_s
        self._last = {name: last for name, last in self._last.items() if last[0] >= oldest}
        return tuple(stats for _, stats in self._last.values())
