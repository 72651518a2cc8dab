"""The autoscaling policy that Serve runs for the GPU workers: a shell around one pure decision.

Reads Serve's context, asks `cluster/autoscaling_decision.py`, hands back what to remember. Imports
no Ray. Serve ships this module by value to its controller and imports the two beside it there, so
the package must be installed where the controller runs (it must be for the workers as well).
Serve's own delays and factors are to be neutral (0 s, 1): the policy has its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Protocol

from cluster.autoscaling_decision import (
    DEFAULT_CALM_S,
    DEFAULT_UP_S,
    Delays,
    Memory,
    Settings,
    decide,
)
from cluster.autoscaling_rules import LoadSnapshot, ServiceTimes, Targets, Worker

RUNNING_SEQUENCES = "moetier_running_sequences"
"""Gauge of a replica: sequences that hold a slot."""
WAITING_SEQUENCES = "moetier_waiting_sequences"
"""Gauge of a replica: sequences that were accepted and hold no slot yet."""
WAITING_TOKENS = "moetier_waiting_tokens"
"""Gauge of a replica: prompt tokens not yet computed, of running and waiting sequences."""
ARRIVALS = "moetier_arrivals_per_s"
"""Gauge of a replica: requests accepted each second, lately; so are the rates that follow."""
PROMPT_TOKENS = "moetier_prompt_tokens_per_s"
ANSWER_TOKENS = "moetier_answer_tokens_per_s"
STEPS = "moetier_steps_per_s"
BUSY_SHARE = "moetier_busy_share"
"""Gauge of a replica: part of the time that it was in a step."""
WAIT_SHARE = "moetier_wait_share"
"""Gauge of a replica: part of its steps' time that it waited for copies or near-data answers."""

POLICY_IMPORT_PATH = "cluster.autoscaling:GpuWorkerPolicy"
"""What `autoscaling_config.policy.policy_function` names in a Serve config."""


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
    def target_num_replicas(self) -> int: ...
    @property
    def capacity_adjusted_min_replicas(self) -> int: ...
    @property
    def capacity_adjusted_max_replicas(self) -> int: ...
    @property
    def policy_state(self) -> Mapping[str, Any] | None: ...
    @property
    def current_time(self) -> float | None: ...


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
    num = max(len(reporting), 1)
    return LoadSnapshot(
        running_sequences=running,
        waiting_sequences=total(WAITING_SEQUENCES),
        waiting_tokens=total(WAITING_TOKENS),
        queued_requests=ctx.total_queued_requests or 0.0,
        min_replicas=ctx.capacity_adjusted_min_replicas,
        max_replicas=ctx.capacity_adjusted_max_replicas,
        target_replicas=ctx.target_num_replicas,
        reporting_replicas=len(reporting),
        arrivals_per_s=total(ARRIVALS),
        prompt_tokens_per_s=total(PROMPT_TOKENS),
        answer_tokens_per_s=total(ANSWER_TOKENS),
        steps_per_s=total(STEPS),
        busy_share=total(BUSY_SHARE) / num,
        wait_share=total(WAIT_SHARE) / num,
    )


class GpuWorkerPolicy:
    """Serve's class-based policy: built once from `policy_kwargs`, called about every 0.1 s.

    The keyword arguments are, all together, the fields of `Targets`, `ServiceTimes` and `Worker`,
    and upscale_delay_s, downscale_delay_s and downscale_to_zero_delay_s. Never blocks; what it
    remembers is in Serve's policy state. Raises ValueError for what is unknown or makes no sense.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.settings = settings_of(kwargs)

    def __call__(self, ctx: ServeContext) -> tuple[int, dict[str, Any]]:
        """(desired replicas, what to remember)."""
        now_s = time.time() if ctx.current_time is None else ctx.current_time
        memory = Memory.of(ctx.policy_state or {})
        decision = decide(snapshot_of(ctx), memory, now_s, self.settings)
        return decision.num_replicas, decision.memory.as_state()


def settings_of(kwargs: Mapping[str, Any]) -> Settings:
    """The policy's settings from plain values. Raises ValueError naming the one that is wrong."""
    delays = ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s")
    of_targets = {field.name for field in fields(Targets)}
    of_service = {field.name for field in fields(ServiceTimes)}
    of_worker = {field.name for field in fields(Worker)}
    known = sorted({*of_targets, *of_service, *of_worker, *delays})
    if unknown := sorted(set(kwargs) - set(known)):
        raise ValueError(f"{unknown[0]}: unknown to the policy; it knows {', '.join(known)}")
    service = {name: kwargs[name] for name in of_service & set(kwargs)}
    if service and (missing := sorted(of_service - set(service))):
        raise ValueError(f"{missing[0]}: got nothing, but {min(service)}; give all of service")
    calm_s = kwargs.get("downscale_delay_s", DEFAULT_CALM_S)
    return Settings(
        targets=Targets(**{name: kwargs[name] for name in of_targets & set(kwargs)}),
        service=ServiceTimes(**service) if service else None,
        delays=Delays(
            up_s=kwargs.get("upscale_delay_s", DEFAULT_UP_S),
            calm_s=calm_s,
            zero_s=kwargs.get("downscale_to_zero_delay_s", calm_s),
        ),
        worker=Worker(**{name: kwargs[name] for name in of_worker & set(kwargs)}),
    )
