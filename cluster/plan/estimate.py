"""The closed form of a plan: what a step asks of every part, and which part that limits.

Pure: expectations over some drawn layers, with a cache that holds what is used most. Queues are the
simulation's (`cluster/plan/simulation.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from cluster.plan.routing import RoutingSource
from cluster.plan.system import System
from cluster.plan.worker import warm_cache
from gpu_worker.planner import DispatchPlan, Policy, plan, predict


@dataclass(frozen=True, slots=True)
class Estimate:
    """A step of one worker while all workers do the same.

    - part_s: what each part is busy with it: no step is shorter than the longest.
    - step_s: of a worker alone, whose parts wait for each other as in a layer, without queues.
    """

    part_s: Mapping[str, float]
    step_s: float

    @property
    def bottleneck(self) -> str:
        """The part that is busy longest."""
        return max(self.part_s, key=lambda part: self.part_s[part])

    @property
    def bound_s(self) -> float:
        return self.part_s[self.bottleneck]


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one layer of one step asks for."""

    in_bytes: float
    out_bytes: float
    near_s: float
    device_s: float
    total_s: float


def estimate(system: System, routing: RoutingSource, steps: range) -> Estimate:
    """Expectations over these steps of a routing."""
    costs = system.layer_costs()
    policy = Policy(system.near_data, costs, system.row_bytes)
    cache = warm_cache(system, routing)
    tokens = [routing.num_tokens(step) for step in steps]
    layers = []
    for step in steps:
        for layer in system.layers:
            dispatch = plan(
                layer,
                routing.layer(step, layer),
                on_device=cache.of_layer(layer),
                sizes=system.sizes,
                policy=policy,
            )
            layers.append(_asked(system, dispatch, policy))
    num_layers = len(system.layers) * system.layer_scale
    ends_s = fmean(map(system.ends_s, tokens)) * system.layer_scale
    dense_s = fmean(map(system.dense_s, tokens))
    share = num_layers * system.num_gpus / system.num_nodes
    in_bytes = fmean(layer.in_bytes for layer in layers)
    out_bytes = fmean(layer.out_bytes for layer in layers)
    part_s = {
        "GPU": num_layers * (dense_s + fmean(layer.device_s for layer in layers)) + ends_s,
        "GPU links": num_layers * max(in_bytes, out_bytes) / system.gpu_bytes_per_s,
        "node links": share * max(in_bytes, out_bytes) / system.node_bytes_per_s,
        "node workers": share * fmean(layer.near_s for layer in layers),
        "calls and overhead": num_layers * (system.fixed_s + system.call_s),
    }
    step_s = num_layers * (dense_s + fmean(layer.total_s for layer in layers)) + ends_s
    return Estimate(part_s, step_s)


def _asked(system: System, dispatch: DispatchPlan, policy: Policy) -> _Layer:
    pairs = sum(len(work.token_rows) for work in dispatch.remote)
    rows = {row for work in dispatch.remote for row in work.token_rows}
    copied = dispatch.copy_bytes("codes") + dispatch.copy_bytes("factors")
    time = predict(dispatch, system.sizes, policy)
    return _Layer(
        in_bytes=copied + pairs * system.row_bytes,
        out_bytes=len(rows) * system.row_bytes,
        near_s=sum(system.near_s(work) for work in dispatch.remote),
        device_s=time.device_s,
        total_s=time.total_s,
    )
