"""What Ray Serve makes of a policy: its own functions, called with simulated time.

The one file of the tuner that imports Ray: policy, scaling factors, delays and cold start are
Serve's code (`ray.serve.autoscaling_policy`, Ray 2.60), put together as its own wrapper does, which
reads the clock of the wall instead. Starts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve import autoscaling_policy as serve_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.autoscaling import GpuWorkerPolicy
from cluster.tune.simulate import View

Policy = Callable[[Any], tuple[float, dict[str, Any]]]


class ServeDecider:
    """Decides as Serve's controller would, for the options that a config gives it.

    `options` are those of `autoscaling_config`, plain values. With a policy in them it must be
    ours; without one it is Serve's default, by ongoing requests. Raises ValueError for options that
    Serve or the policy refuses.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        ours = options.get("policy")
        plain = {name: value for name, value in options.items() if name != "policy"}
        self._config = AutoscalingConfig(**plain)
        self._policy: Policy = serve_policy.replica_queue_length_autoscaling_policy
        self._reads_gauges = ours is not None
        if ours is not None:
            self._policy = GpuWorkerPolicy(**ours["policy_kwargs"])
        self._state: dict[str, Any] = {}

    @property
    def look_back_s(self) -> float:
        return self._config.look_back_period_s

    @property
    def metrics_interval_s(self) -> float:
        return self._config.metrics_interval_s

    @property
    def reads_gauges(self) -> bool:
        return self._reads_gauges

    def decide(self, view: View) -> int:
        """The target that follows from what Serve knows now."""
        context = self._context(view)
        cold = serve_policy._get_cold_start_scale_up_replicas(context)
        if cold is not None:
            return int(cold)
        wanted, state = self._policy(context)
        num = serve_policy._apply_scaling_factors(wanted, len(view.replicas), self._config)
        if not view.replicas and num > 0:
            self._state = {**self._state, **state}
            return int(num)
        counters = serve_policy._extract_internal_policy_state(self._state)
        num, counters = serve_policy._apply_delay_logic(
            max(0, num), view.target, self._config, counters, _now=view.now_s
        )
        self._state = {**state, **counters}
        return math.ceil(num)

    def _context(self, view: View) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=None,
            deployment_name="GpuWorker",
            app_name="moetier",
            current_num_replicas=len(view.replicas),
            target_num_replicas=view.target,
            running_replicas=list(view.replicas),
            total_num_requests=view.total_requests,
            total_queued_requests=view.queued_requests,
            aggregated_metrics=view.gauges,
            raw_metrics=None,
            capacity_adjusted_min_replicas=view.min_replicas,
            capacity_adjusted_max_replicas=view.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=view.now_s,
            config=self._config,
        )
