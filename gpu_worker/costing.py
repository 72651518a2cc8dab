"""A worker's costs while it runs: measured around source, near data and layers, given to its plans.

Everything here is passed on unchanged where no setting needs costs: nothing is measured then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from expert_store.types import ExpertTokens
from gpu_worker.config import WorkerConfig
from gpu_worker.cost_model import ExpertLoad, LayerTime
from gpu_worker.cost_probe import Probe, device_bytes_per_s, start_costs
from gpu_worker.cost_table import CostTable
from gpu_worker.counters import Tally
from gpu_worker.expert_math import ExpertMath
from gpu_worker.governor import Governor
from gpu_worker.meters import MeteredNearData, MeteredSource
from gpu_worker.planner import DispatchPlan, Policy, predict
from gpu_worker.protocols import ExpertSource, NearData
from gpu_worker.quality_ladder import QualitySetting, quality_ladder
from gpu_worker.record_sizes import RecordSizes


@dataclass(slots=True)
class _Layer:
    """The layer that runs now."""

    started_s: float
    waited_s: float  # of the step, when it began
    time: LayerTime | None = None
    sizes: RecordSizes | None = None  # that it was planned with


class Costing:
    """`source` and `near_data` are to be used instead of those given. One thread plans.

    `table` is None where no setting of the config needs costs. Otherwise costs are measured here,
    which takes some fetches, near-data calls and runs. `governor` is there with a latency target.
    """

    def __init__(
        self,
        source: ExpertSource,
        near_data: NearData | None,
        math: ExpertMath,
        config: WorkerConfig,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.source, self.near_data = source, near_data
        self.table: CostTable | None = None
        self._fetches_itself = config.fetch_threads == 0
        self._clock = clock
        self._layer = _Layer(0.0, 0.0)
        self._row_bytes = source.manifest.model.expert.hidden * config.torch_dtype.itemsize
        costs = None
        if config.near_data == "cost" or config.target_step_s is not None:
            probe = Probe(source, near_data, math, config, clock)
            table = CostTable(start_costs(probe), device_bytes_per_s=device_bytes_per_s(probe))
            self.source = MeteredSource(source, table, clock=clock)
            if near_data is not None:
                self.near_data = MeteredNearData(
                    near_data, table, load_of=self._near_load, clock=clock
                )
            self.table = table
            costs = table.costs()
        self.policy = Policy(config.near_data, costs, self._row_bytes)
        self.governor: Governor | None = None
        if config.target_step_s is not None:
            assert self.table is not None, "costs are measured where there is a target"
            ladder = quality_ladder(config, source.manifest)
            self.governor = Governor(
                ladder,
                self.table,
                target_s=config.target_step_s,
                fetches_itself=self._fetches_itself,
            )

    @property
    def setting(self) -> QualitySetting | None:
        """What the next step runs with; None where nothing is governed."""
        return None if self.governor is None else self.governor.setting

    def begin_layer(self, tally: Tally) -> None:
        """A layer begins; `policy` is what it is planned with."""
        self._layer = _Layer(self._clock(), tally.wait_s)
        if self.table is not None:
            self.policy = replace(self.policy, costs=self.table.costs())

    def planned(self, dispatch: DispatchPlan, sizes: RecordSizes) -> None:
        """What the layer was planned to do."""
        if self.table is not None:
            self._layer.time = predict(dispatch, sizes, self.policy)
            self._layer.sizes = sizes

    def end_layer(self, tally: Tally) -> None:
        """The layer is computed: count what was predicted and what it took, and learn from it."""
        layer = self._layer
        if self.table is None or layer.time is None:
            return
        layer_s = self._clock() - layer.started_s
        tally.predicted_s += layer.time.total_s
        tally.layer_s += layer_s
        busy_s: float | None = layer_s - (tally.wait_s - layer.waited_s)
        if self._fetches_itself and layer.time.link_s > 0:
            busy_s = None  # copies were part of the work
        self.table.ran_layer(layer.time, layer_s, busy_s)

    def end_step(self) -> None:
        if self.table is not None:
            self.table.end_step()

    def _near_load(self, part: ExpertTokens) -> ExpertLoad:
        sizes, num_pairs = self._layer.sizes, len(part.token_rows)
        assert sizes is not None, f"{part.key} runs near data in a layer that was not planned"
        run_bytes = sizes.codes[part.key] + (sizes.factors[part.key] if part.restored else 0)
        return ExpertLoad(num_pairs, run_bytes, act_bytes=2 * num_pairs * self._row_bytes)
