"""How many GPU-worker replicas a load deserves: one pure function, and the Serve policy around it.

Imports neither Ray nor our other modules: Serve ships this module by value to its controller and
hands in a context of its own. Delays, scaling factors and the last clamp are Serve's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

RUNNING_SEQUENCES = "moetier_running_sequences"
"""Gauge of a replica: sequences that hold a slot."""
WAITING_SEQUENCES = "moetier_waiting_sequences"
"""Gauge of a replica: sequences that were accepted and hold no slot yet."""
WAITING_TOKENS = "moetier_waiting_tokens"
"""Gauge of a replica: prompt tokens not yet computed, of running and waiting sequences."""

SEQUENCES_PER_REPLICA = 8.0
"""Default target; of the order of the slots of one replica."""
WAITING_TOKENS_PER_REPLICA = 4096.0
"""Default target; a few seconds of prefill for a replica."""

POLICY_IMPORT_PATH = "cluster.autoscaling:GpuWorkerPolicy"
"""What `autoscaling_config.policy.policy_function` names in a Serve config."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The load at which one replica is full.

    - sequences_per_replica: sequences, running or waiting, that one replica should hold.
    - waiting_tokens_per_replica: prompt tokens, not yet computed, that one replica may owe.

    Raises ValueError unless both are positive and finite.
    """

    sequences_per_replica: float = SEQUENCES_PER_REPLICA
    waiting_tokens_per_replica: float = WAITING_TOKENS_PER_REPLICA

    def __post_init__(self) -> None:
        for name in ("sequences_per_replica", "waiting_tokens_per_replica"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}: got {value!r}, expected a positive number")
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name}: got {value}, expected a positive, finite number")


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """Load of one deployment at one moment, summed over its replicas, and the limits to stay in.

    The loads are floats because Serve averages gauges over its look-back window.
    Raises ValueError for a negative or non-finite load and for limits that exclude each other.
    """

    running_sequences: float
    waiting_sequences: float
    waiting_tokens: float
    queued_requests: float  # at Serve's handles, accepted by no replica yet
    min_replicas: int
    max_replicas: int

    def __post_init__(self) -> None:
        loads = ("running_sequences", "waiting_sequences", "waiting_tokens", "queued_requests")
        for name in loads:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}: got {value}, expected a finite number >= 0")
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"limits: got min_replicas {self.min_replicas}, max_replicas {self.max_replicas}, "
                "expected 0 <= min_replicas <= max_replicas"
            )


def desired_replicas(snapshot: LoadSnapshot, targets: Targets) -> int:
    """Replicas that serve this load with none over its targets, within the snapshot's limits.

        by_sequences = (running + waiting + queued) / sequences_per_replica
        by_tokens    = waiting_tokens / waiting_tokens_per_replica
        desired      = clamp(ceil(max(by_sequences, by_tokens)), min_replicas, max_replicas)

    Two terms, because either can fill a replica alone: many short sequences take all slots, one
    long prompt holds up every step. Requests still queued at a handle have an unknown length, so
    they count as sequences only. Absolute, not relative to the present count: asking twice gives
    the same answer while replicas start, which Serve's delay logic relies on.
    """
    sequences = snapshot.running_sequences + snapshot.waiting_sequences + snapshot.queued_requests
    by_sequences = sequences / targets.sequences_per_replica
    by_tokens = snapshot.waiting_tokens / targets.waiting_tokens_per_replica
    # Dividing two huge loads by tiny targets may overflow to inf, which has no ceiling.
    wanted = min(max(by_sequences, by_tokens), float(snapshot.max_replicas))
    return max(math.ceil(wanted), snapshot.min_replicas)


class ServeContext(Protocol):
    """The part of `ray.serve.config.AutoscalingContext` (Ray 2.60) that this policy reads."""

    @property
    def running_replicas(self) -> Iterable[Any]: ...
    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...
    @property
    def total_running_requests(self) -> float: ...
    @property
    def total_queued_requests(self) -> float: ...
    @property
    def capacity_adjusted_min_replicas(self) -> int: ...
    @property
    def capacity_adjusted_max_replicas(self) -> int: ...


def snapshot_of(ctx: ServeContext) -> LoadSnapshot:
    """Read Serve's context. Replicas that reported nothing yet are starting and carry no load;
    when none has reported, Serve's own count of running requests stands in for ours.

    Serve's count is not used beside ours: after long streams it can stay up (ray#61551).
    """
    metrics = ctx.aggregated_metrics or {}
    reporting = set(metrics.get(RUNNING_SEQUENCES, {})) & set(ctx.running_replicas)

    def total(name: str) -> float:
        reported = metrics.get(name, {})
        return math.fsum(reported[replica] for replica in reporting if replica in reported)

    running = total(RUNNING_SEQUENCES) if reporting else ctx.total_running_requests
    return LoadSnapshot(
        running_sequences=running,
        waiting_sequences=total(WAITING_SEQUENCES),
        waiting_tokens=total(WAITING_TOKENS),
        queued_requests=ctx.total_queued_requests or 0.0,
        min_replicas=ctx.capacity_adjusted_min_replicas,
        max_replicas=ctx.capacity_adjusted_max_replicas,
    )


class GpuWorkerPolicy:
    """Serve's class-based policy: built once from `policy_kwargs`, called about every 0.1 s.

    Never blocks and keeps no state. Raises ValueError for targets that are not positive numbers.
    """

    def __init__(
        self,
        sequences_per_replica: float = SEQUENCES_PER_REPLICA,
        waiting_tokens_per_replica: float = WAITING_TOKENS_PER_REPLICA,
    ) -> None:
        self._targets = Targets(sequences_per_replica, waiting_tokens_per_replica)

    def __call__(self, ctx: ServeContext) -> tuple[int, dict[str, Any]]:
        """(desired replicas, state to keep: none)."""
        return desired_replicas(snapshot_of(ctx), self._targets), {}
