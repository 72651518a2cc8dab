"""What is known of a running cluster at one moment, as plain values that any process can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gpu_worker.messages import WorkerStats

Role = Literal["store", "ndp"]


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One store or NDP actor. `problem` is None while it answers."""

    name: str
    role: Role
    node: str
    restarts: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class IngressStats:
    """Requests that one ingress replica has answered, by (route, status)."""

    replica: str
    requests: Mapping[tuple[str, int], int] = field(default_factory=dict)


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
