"""What autoscaling of GPU workers can be told, and that as Serve's own option: without torch.

The docstring is the section's documentation in `deploy/cluster.example.yaml`, field by field.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.autoscaling import POLICY_IMPORT_PATH
from cluster.autoscaling_rules import ServiceTimes, Targets
from cluster.strict import within


@dataclass(frozen=True, slots=True)
class AutoscalingSettings:
    """How many GPU workers run, decided from what they have to do. `moetier tune` finds values.

    - min_replicas, max_replicas: bounds of the number of workers. With a minimum of 0 the last one
      ends when nothing was asked for downscale_to_zero_delay_s; the next request starts one.
    - upscale_delay_s: seconds that more workers must be needed before they are started.
    - downscale_delay_s, downscale_to_zero_delay_s: seconds in which fewer, or none, must have been
      enough all the time.
    - look_back_s: seconds over which the load is averaged.
    - metrics_interval_s: how often workers report their load.
    - targets: the load at which one worker is full, or the waiting that is still good.
    - service: what a step costs and what requests are like, for targets in seconds: step_s,
      sequence_s, prompt_token_s, prompt_tokens and answer_tokens, as `moetier tune` prints them.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    downscale_to_zero_delay_s: float = 600.0
    look_back_s: float = 10.0
    metrics_interval_s: float = 1.0
    targets: Targets = field(default_factory=Targets)
    service: ServiceTimes | None = None

    def __post_init__(self) -> None:
        within("min_replicas", self.min_replicas, 0, 1000)
        within("max_replicas", self.max_replicas, max(self.min_replicas, 1), 1000)
        within("upscale_delay_s", self.upscale_delay_s, 0, 86400)
        within("downscale_delay_s", self.downscale_delay_s, 0, 86400)
        within("downscale_to_zero_delay_s", self.downscale_to_zero_delay_s, 0, 86400)
        within("look_back_s", self.look_back_s, 0.5, 3600)
        within("metrics_interval_s", self.metrics_interval_s, 0.1, 600)
        if self.look_back_s <= self.metrics_interval_s:
            raise ValueError(
                f"look_back_s: got {self.look_back_s}, expected more than metrics_interval_s, "
                f"{self.metrics_interval_s}"
            )
        if self.targets.predicts and self.service is None:
            raise ValueError(
                "service: got null, but targets.ttft_s and targets.per_token_s are predicted from "
                "it; paste what moetier tune prints, or leave both targets out"
            )

    def policy_kwargs(self, *, slots: int, prefill_chunk: int) -> dict[str, Any]:
        """What the policy is built from, as plain values; both arguments as the worker's config."""
        return {
            **asdict(self.targets),
            **({} if self.service is None else asdict(self.service)),
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
            "downscale_to_zero_delay_s": self.downscale_to_zero_delay_s,
            "slots": slots,
            "prefill_chunk": prefill_chunk,
        }

    def serve_config(self, *, slots: int, prefill_chunk: int) -> dict[str, Any]:
        """Serve's `autoscaling_config` for it, as plain values."""
        kwargs = self.policy_kwargs(slots=slots, prefill_chunk=prefill_chunk)
        return {
            "min_replicas": self.min_replicas,
            # One to begin with: until one has run nobody knows the model, nor whether it can run.
            "initial_replicas": max(self.min_replicas, 1),
            "max_replicas": self.max_replicas,
            # The policy has delays of its own; Serve's would come on top.
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "look_back_period_s": self.look_back_s,
            "metrics_interval_s": self.metrics_interval_s,
            "policy": {"policy_function": POLICY_IMPORT_PATH, "policy_kwargs": kwargs},
        }
