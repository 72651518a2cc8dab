"""The policies that are compared, their knobs, and what a run of one is worth.

Ours with everything its config lets one set; Serve's default with `target_ongoing_requests` alone,
the rest as Serve ships it, and with all it has.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.autoscaling_rules import ServiceTimes, Targets
from cluster.autoscaling_settings import AutoscalingSettings
from cluster.tune.replica import Served
from cluster.tune.search import Knob, Score, Values
from cluster.tune.simulate import Outcome, Site
from cluster.tune.trace import Trace

SERVE_PUSH_S = 10.0
"""Serve's own interval between reports of load; its look-back and delays are its defaults too."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What a request is promised, and how many may miss it.

    - ttft_s: seconds from its arrival to its first token.
    - per_token_s: mean seconds between its further tokens.
    - limit: share of requests that may miss one of the two, be refused or be lost.
    - settle_s: requests of the first so many seconds do not count: a trace begins with the fewest
      workers and no past, which a cluster that runs does not.
    """

    ttft_s: float = 2.0
    per_token_s: float = 0.2
    limit: float = 0.01
    settle_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("ttft_s", "per_token_s"):
            if not 0 < getattr(self, name) <= 86400:
                got = getattr(self, name)
                raise ValueError(f"{name}: got {got}, expected more than 0, at most 86400")
        if not 0 <= self.limit < 1:
            raise ValueError(f"limit: got {self.limit}, expected 0 or more and less than 1")
        if not 0 <= self.settle_s <= 86400:
            raise ValueError(f"settle_s: got {self.settle_s}, expected 0 to 86400")


@dataclass(frozen=True, slots=True)
class Contestant:
    """A policy: its name, its knobs, and Serve's `autoscaling_config` for values of them.

    `start` is the policy as it comes, where the search begins.
    """

    name: str
    knobs: tuple[Knob, ...]
    options: Callable[[Values], dict[str, Any]]
    start: Values


_OF_TARGETS = ("headroom", "calm_margin", "lead_s", "smooth_s")
OUR_KNOBS = (
    Knob("headroom", 0.8, 3.0, is_log=True),
    Knob("lead_s", 0.0, 60.0),
    Knob("smooth_s", 5.0, 60.0, is_log=True),
    Knob("downscale_delay_s", 15.0, 900.0, is_log=True),
)
"""Few, so that few trials cover them; what is not here has a value that hardly mattered."""
_FIXED: Values = {"calm_margin": 0.9, "upscale_delay_s": 1.0, "look_back_s": 5.0}
TARGET = Knob("target_ongoing_requests", 0.5, 16.0, is_log=True)
SERVE_KNOBS = (
    TARGET,
    Knob("upscale_delay_s", 0.0, 60.0),
    Knob("downscale_delay_s", 15.0, 900.0, is_log=True),
    Knob("look_back_period_s", 2.0, 60.0, is_log=True),
    Knob("metrics_interval_s", 1.0, 10.0, is_log=True),
)


_OURS: Values = {
    **{name: getattr(Targets(), name) for name in ("headroom", "lead_s", "smooth_s")},
    "downscale_delay_s": AutoscalingSettings().downscale_delay_s,
}
_SERVES: Values = {
    "target_ongoing_requests": 2.0,
    "upscale_delay_s": 30.0,
    "downscale_delay_s": 600.0,
    "look_back_period_s": 30.0,
    "metrics_interval_s": SERVE_PUSH_S,
}


def settings_for(
    values: Values, promise: Promise, site: Site, service: ServiceTimes
) -> AutoscalingSettings:
    """Our section of the config, with what was promised as the policy's targets."""
    values = {**_FIXED, **values}
    targets = Targets(
        ttft_s=promise.ttft_s,
        per_token_s=promise.per_token_s,
        **{name: values[name] for name in _OF_TARGETS},
    )
    return AutoscalingSettings(
        min_replicas=site.min_replicas,
        max_replicas=site.max_replicas,
        upscale_delay_s=values["upscale_delay_s"],
        downscale_delay_s=values["downscale_delay_s"],
        downscale_to_zero_delay_s=values["downscale_delay_s"],
        look_back_s=values["look_back_s"],
        targets=targets,
        service=service,
    )


def contestants(promise: Promise, site: Site, service: ServiceTimes) -> tuple[Contestant, ...]:
    """Ours first, then Serve's default in two ways."""
    limits: dict[str, Any] = {
        "min_replicas": site.min_replicas,
        "max_replicas": site.max_replicas,
        "initial_replicas": max(site.min_replicas, 1),
    }

    def ours(values: Values) -> dict[str, Any]:
        settings = settings_for(values, promise, site, service)
        worker = site.worker
        return settings.serve_config(slots=worker.slots, prefill_chunk=worker.prefill_chunk)

    def target_alone(values: Values) -> dict[str, Any]:
        return {**limits, "metrics_interval_s": SERVE_PUSH_S, **values}

    def all_knobs(values: Values) -> dict[str, Any]:
        # Serve wants the window to be longer than the interval.
        longest = max(values["look_back_period_s"], 1.1 * values["metrics_interval_s"])
        return {**limits, **values, "look_back_period_s": longest}

    most = float(site.worker.slots + site.max_waiting)
    target = replace(TARGET, high=max(min(most, 2.0 * site.worker.slots), 1.0))
    return (
        Contestant("moetier", OUR_KNOBS, ours, _OURS),
        Contestant("Serve's default, target tuned", (target,), target_alone, _SERVES),
        Contestant("Serve's default, all tuned", (target, *SERVE_KNOBS[1:]), all_knobs, _SERVES),
    )


def counted(outcome: Outcome, promise: Promise) -> list[Served]:
    """The requests that came after the cluster had settled; all where none did."""
    later = [s for s in outcome.served if s.request.arrival_s >= promise.settle_s]
    return later or list(outcome.served)


def missed(served: Sequence[Served], promise: Promise) -> int:
    """Requests that did not get what was promised."""
    return sum(
        each.lost or each.ttft_s > promise.ttft_s or each.per_token_s > promise.per_token_s
        for each in served
    )


def score(outcomes: Sequence[Outcome], promise: Promise) -> Score:
    """Over all of them: share that missed, hours of workers for each run, the worst run's share."""
    counting = [counted(outcome, promise) for outcome in outcomes]
    misses = [missed(served, promise) for served in counting]
    return Score(
        sum(misses) / sum(map(len, counting)),
        statistics.fmean(outcome.replica_s for outcome in outcomes) / 3600,
        max(num / len(served) for num, served in zip(misses, counting, strict=True)),
    )


def typical(service: ServiceTimes, traces: Sequence[Trace]) -> ServiceTimes:
    """The fitted times, with the mean lengths of these traces."""
    return replace(
        service,
        step_s=float(f"{service.step_s:.4g}"),
        sequence_s=float(f"{service.sequence_s:.4g}"),
        prompt_token_s=float(f"{service.prompt_token_s:.4g}"),
        prompt_tokens=round(statistics.fmean(t.mean_prompt_tokens for t in traces), 1),
        answer_tokens=round(statistics.fmean(t.mean_answer_tokens for t in traces), 1),
    )
