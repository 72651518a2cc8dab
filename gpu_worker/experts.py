"""Runs a step's MoE layers out of a store: plan, start, compute, sum, say what could not be had.

Owns the cache and the streamer of one worker. Knows no sequence and no scheduler: a token is a row.

Legend: S token rows, K top-k, H hidden, P pairs of one expert.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import torch

from expert_store.errors import StoreError
from expert_store.types import ExpertKey, ExpertOutputs, ExpertTokens, RecordRequest
from expert_store.warnings_told import WarningsTold
from gpu_worker.combine import Part, combine
from gpu_worker.config import WorkerConfig
from gpu_worker.costing import Costing
from gpu_worker.counters import StepCounters, Tally
from gpu_worker.eviction import eviction_policy
from gpu_worker.expert_cache import CacheBudgets, ExpertCache
from gpu_worker.expert_math import ExpertMath, KernelMath
from gpu_worker.late_factors import LateFactors
from gpu_worker.local_run import DeviceExperts, LocalRun
from gpu_worker.look_ahead import LookAhead
from gpu_worker.model import StepReport
from gpu_worker.planner import DispatchPlan, ExpertWork, plan, plan_local
from gpu_worker.protocols import ExpertSource, NearData, WireCounted
from gpu_worker.record_sizes import PlannedCopy, RecordSizes
from gpu_worker.restoring import route
from gpu_worker.router_guess import Guess, RouterGuess
from gpu_worker.routing import Routing, expert_scores
from gpu_worker.streamer import Streamer
from kernels import ops

logger = logging.getLogger(__name__)


class ExpertsFailed(StoreError):
    """Experts of one layer could not be had; the step has no result.

    `token_rows` are the rows of the step that need one of them. The others could go on: run the
    step again without the sequences of these rows. `counters` is what the step moved until here.
    """

    def __init__(
        self,
        layer: int,
        failed: Mapping[ExpertKey, tuple[int, ...]],
        cause: StoreError,
        counters: StepCounters,
    ) -> None:
        self.layer = layer
        self.failed = dict(failed)
        self.cause = cause
        self.counters = counters
        super().__init__(
            f"layer {layer}: {len(self.failed)} of its experts could not be had, which token rows "
            f"{sorted(self.token_rows)} need; the first cause: {cause}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled as its message alone unless it says how it was made.
        return ExpertsFailed, (self.layer, self.failed, self.cause, self.counters)

    @property
    def token_rows(self) -> frozenset[int]:
        return frozenset(row for rows in self.failed.values() for row in rows)


class StoreExperts:
    """`StepExperts` out of a store. Not thread-safe; `close` ends its threads.

    `config` is resolved; `math` is the device's own unless given. Raises ValueError when near data
    is wanted and not given, or the largest expert does not fit into max_in_flight_bytes.
    """

    def __init__(
        self,
        source: ExpertSource,
        config: WorkerConfig,
        near_data: NearData | None = None,
        *,
        math: ExpertMath | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert config.top_n is not None, "resolve the config first"
        assert config.fetch_bytes is not None, "resolve the config first"
        if config.near_data != "off" and near_data is None:
            raise ValueError(
                f"near_data: got {config.near_data!r}, but no near-data worker is connected; "
                f"start one or choose 'off'"
            )
        self._pairs = config.pair_policy(source.manifest)
        self._sizes = RecordSizes.of(source.manifest, config.factor_share)
        self._num_records = Counter(key.layer for key in (*self._sizes.codes, *self._sizes.factors))
        self._wire = source if isinstance(source, WireCounted) else None
        self._clock = clock
        self.cache = ExpertCache(
            CacheBudgets(config.cache_bytes, config.factor_cache_share),
            eviction_policy(config.cache_policy),
        )
        math = math or KernelMath(source.manifest, ops.default_backend(config.device))
        near_data = near_data if config.near_data != "off" else None
        self.costing = Costing(source, near_data, math, config, clock=clock)
        source, self._near_data = self.costing.source, self.costing.near_data
        self.streamer = Streamer(
            source,
            decode=math.decode_on_host,
            device=config.device,
            max_in_flight_bytes=config.max_in_flight_bytes,
            fetch_bytes=config.fetch_bytes,
            num_threads=config.fetch_threads,
            clock=clock,
        )
        self._told = WarningsTold(logger, clock)
        self.late_factors = LateFactors(self.streamer, self.cache, math, config.factor_deadline_s)
        self._device = DeviceExperts(self.cache, self.streamer, math, self.late_factors, self._told)
        self._ahead = LookAhead(self.costing.source, config, math, clock)
        self.begin(None)

    def predict_with(self, guess: RouterGuess | None) -> None:
        """Fetch ahead by these guesses of a layer's routing, as far as the config wants that."""
        self._ahead.predict_with(guess)

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        if (setting := self.costing.setting) is not None:
            self._pairs, self._sizes = setting.pairs, setting.sizes
            if setting.cache != self.cache.budgets:
                self.cache.set_budgets(setting.cache)
        self._active_S = valid_S
        self._token_tags_S = token_tags_S
        self._tally = Tally()
        self._degraded_rows: Counter[int] = Counter()
        self._near_bytes_at_begin = self._near_bytes()
        self._wire_bytes_at_begin = self._wire_bytes()
        self._ahead.begin(self._tally)
        self.late_factors.settle(self._tally)

    def run_layer(
        self,
        layer: int,
        hidden_SH: torch.Tensor,
        topk_ids_SK: torch.Tensor,
        topk_weights_SK: torch.Tensor,
    ) -> torch.Tensor:
        """As in `StepExperts`. Raises ExpertsFailed; ValueError when the store lacks the expert.

        Sums in float32 and, for each row, in rising order of expert: neither what landed first nor
        what was resident nor who ran it changes the order.
        """
        routing = route(
            layer,
            topk_ids_SK,
            topk_weights_SK,
            policy=self._pairs,
            active_T=self._active_S,
            token_tags_T=self._token_tags_S,
        )
        self._tally.skipped_pairs += routing.num_skipped
        self.cache.begin_turn(layer, expert_scores(routing) if self.cache.wants_scores else None)
        self.costing.begin_layer(self._tally)
        ahead = self._ahead.settle(layer, topk_ids_SK, self._tally)
        local = LocalRun(self._device, hidden_SH, self._tally)
        try:
            dispatch = self._plan(layer, routing, ahead.requests)
            self.costing.planned(dispatch, self._sizes)
            near = self._submit(dispatch.remote, hidden_SH)
            local.run(dispatch, ahead, partial(self._fetch_ahead, layer, hidden_SH))
        finally:
            self._ahead.finish(ahead)
        near_parts = self._collect(layer, dispatch.remote, near, local)
        self._degraded_rows += local.degraded_rows
        if local.failed:
            raise ExpertsFailed(layer, local.failed, local.causes[0], self._freeze())
        parts = [*local.parts, *near_parts]
        num_run = sum(len(part.work.token_rows) for part in parts)
        # A part that is missing would be a wrong answer that nobody notices.
        assert num_run == dispatch.num_pairs(), f"{layer=}: {num_run} of {dispatch.num_pairs()}"
        output_SH = combine(parts, hidden_SH, topk_weights_SK)
        self.costing.end_layer(self._tally)
        return output_SH

    def end(self) -> StepReport:
        self._ahead.end(self._tally)
        self.costing.end_step()
        return StepReport(self._freeze(), dict(self._degraded_rows))

    def check_integrity(self) -> None:
        """AssertionError when the cache's or the streamer's books do not balance between steps."""
        self.cache.check_integrity(idle=True)
        self.streamer.check_integrity(idle=True)
        self._ahead.check_integrity()

    def close(self) -> None:
        """End the fetch threads. The source and near data belong to whoever passed them in."""
        self.streamer.close()
        self._ahead.close()

    def _plan(self, layer: int, routing: Routing, ahead: frozenset[RecordRequest]) -> DispatchPlan:
        on_device = self.cache.of_layer(layer)
        if ahead:
            # Of a record that is there twice, in two lengths, the plan shall see what came last.
            names = {(request.key, request.kind) for request in ahead}
            on_device = ahead | {r for r in on_device if (r.key, r.kind) not in names}
        policy = self.costing.policy
        return plan(layer, routing, on_device=on_device, sizes=self._sizes, policy=policy)

    def _fetch_ahead(self, layer: int, hidden_SH: torch.Tensor) -> None:
        self._ahead.start(layer, hidden_SH, self._copies_for, is_resident=self._is_resident)

    def _is_resident(self, layer: int) -> bool:
        return len(self.cache.of_layer(layer)) == self._num_records[layer]

    def _copies_for(self, guess: Guess) -> Sequence[PlannedCopy]:
        """What a layer would have to copy if its routing were the guessed one."""
        routing = route(
            guess.layer,
            guess.topk_ids_SK,
            guess.topk_weights_SK,
            policy=self._pairs,
            active_T=self._active_S,
            token_tags_T=self._token_tags_S,
        )
        return self.late_factors.askable(self._plan(guess.layer, routing, frozenset()).copies)

    def _submit(
        self, remote: Sequence[ExpertWork], hidden_SH: torch.Tensor
    ) -> Future[ExpertOutputs] | None:
        if not remote:
            return None
        assert self._near_data is not None, "a plan without near data has no remote work"
        # Only rows that somebody there needs travel.
        rows = sorted({row for work in remote for row in work.token_rows})
        sent_at = {row: index for index, row in enumerate(rows)}
        if len(rows) < hidden_SH.shape[0]:
            hidden_SH = hidden_SH[torch.tensor(rows, device=hidden_SH.device)]
        return self._near_data.submit(
            hidden_SH.cpu(),
            [self._near_work(work, sent_at) for work in remote],
        )

    def _near_work(self, work: ExpertWork, sent_at: Mapping[int, int]) -> ExpertTokens:
        rows = tuple(sent_at[row] for row in work.token_rows)
        if not work.num_restored:
            return ExpertTokens(work.key, rows)
        return ExpertTokens(
            work.key, rows, work.restored, self._sizes.factors_of(work.key).num_blocks
        )

    def _collect(
        self,
        layer: int,
        remote: tuple[ExpertWork, ...],
        near: Future[ExpertOutputs] | None,
        local: LocalRun,
    ) -> list[Part]:
        """What near data computed. When it is lost, its experts run on the device instead."""
        if near is None:
            return []
        start_s = self._clock()
        wait([near])
        waited_s = self._clock() - start_s
        self._tally.wait_s += waited_s
        self._tally.near_wait_s += waited_s
        # Not raised: its traceback would keep this frame, and so activations, in a circle.
        if isinstance(error := near.exception(), StoreError):
            message = "layer %d: near data lost, its experts are copied: %s"
            self._told.warn("near data", message, layer, error)
            on_device = self.cache.of_layer(layer)
            local.run(plan_local(remote, on_device=on_device, sizes=self._sizes))
            return []
        answer = near.result()
        counts = [len(work.token_rows) for work in remote]
        for place, work in enumerate(remote):
            self._tally.near_data_pairs += len(work.token_rows)
            local.count_pairs(work, has_factors=place not in answer.degraded)
        outputs = answer.output_PH.split(counts)
        return [Part(work, rows_PH) for work, rows_PH in zip(remote, outputs, strict=True)]

    def _near_bytes(self) -> tuple[int, int]:
        return (0, 0) if self._near_data is None else self._near_data.bytes_moved

    def _wire_bytes(self) -> int:
        return 0 if self._wire is None else self._wire.bytes_moved[1]

    def _freeze(self) -> StepCounters:
        sent, received = self._near_bytes()
        self._tally.sent_bytes = sent - self._near_bytes_at_begin[0]
        self._tally.received_bytes = received - self._near_bytes_at_begin[1]
        self._tally.wire_bytes = self._wire_bytes() - self._wire_bytes_at_begin
        return self._tally.freeze()
