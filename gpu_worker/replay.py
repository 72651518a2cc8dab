"""Counts the bytes of decoding from recorded routings: all that moves bytes runs, no expert does.

A scoring pass says where every token of its windows goes; `replay_decode` then plays the windows as
sequences that decode, through a real planner, cache, streamer and source.

Legend: S token rows of a pass, W windows, T tokens of a window, B sequences at once, K top-k,
H hidden, P pairs of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from expert_store.types import (
    Compensator,
    ExpertCodes,
    ExpertKey,
    Manifest,
    RecordRequest,
)
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.expert_math import ExpertCall, Record
from gpu_worker.experts import StoreExperts
from gpu_worker.model import ModelRunner, StepExperts, StepReport, bind_experts
from gpu_worker.protocols import ExpertSource, NearData
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.restoring import PairPolicy, route
from kernels.types import GatedMLP, GatedRepair


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """Where the tokens of some windows go in one layer."""

    topk_ids_WTK: torch.Tensor  # [W, T, K] int32
    topk_weights_WTK: torch.Tensor  # [W, T, K] float32


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Where the tokens of some windows go, layer by layer, and the tag of each token."""

    layers: Mapping[int, LayerTrace]
    token_tags_WT: torch.Tensor  # [W, T] int64
    hidden: int  # H of the model
    dtype: torch.dtype  # of its hidden states

    @property
    def num_windows(self) -> int:
        return self.token_tags_WT.shape[0]

    @property
    def num_tokens(self) -> int:
        """Of each window."""
        return self.token_tags_WT.shape[1]


class RoutingRecorder:
    """`StepExperts` that passes everything on and keeps where the tokens went."""

    def __init__(self, inner: StepExperts) -> None:
        self._inner = inner
        self._ids: dict[int, list[torch.Tensor]] = {}
        self._weights: dict[int, list[torch.Tensor]] = {}
        self._tags: list[torch.Tensor] = []
        self._hidden_S0 = torch.empty(0, 0)

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        assert valid_S is None, "windows have no padding"
        assert token_tags_S is not None, "a ModelRunner gives every token its tag"
        self._tags.append(token_tags_S.to("cpu", torch.int64))
        self._inner.begin(valid_S, token_tags_S)

    def run_layer(
        self,
        layer: int,
        hidden_SH: torch.Tensor,
        topk_ids_SK: torch.Tensor,
        topk_weights_SK: torch.Tensor,
    ) -> torch.Tensor:
        self._ids.setdefault(layer, []).append(topk_ids_SK.to("cpu", torch.int32))
        self._weights.setdefault(layer, []).append(topk_weights_SK.to("cpu", torch.float32))
        self._hidden_S0 = hidden_SH[:0]
        return self._inner.run_layer(layer, hidden_SH, topk_ids_SK, topk_weights_SK)

    def end(self) -> StepReport:
        return self._inner.end()

    def trace(self, window_tokens: int) -> RoutingTrace:
        """What was seen since the start, of passes over whole windows, one window after another."""

        def by_window(parts: list[torch.Tensor]) -> torch.Tensor:
            rows_S = torch.cat(parts)
            return rows_S.reshape(-1, window_tokens, *rows_S.shape[1:])

        layers = {
            layer: LayerTrace(by_window(self._ids[layer]), by_window(self._weights[layer]))
            for layer in sorted(self._ids)
        }
        hidden, dtype = self._hidden_S0.shape[1], self._hidden_S0.dtype
        return RoutingTrace(layers, by_window(self._tags), hidden, dtype)


@contextmanager
def recorded(runner: ModelRunner) -> Iterator[RoutingRecorder]:
    """A recorder between the model and its experts, as long as the `with` lasts."""
    inner = runner.experts
    recorder = RoutingRecorder(inner)
    runner.experts = recorder
    bind_experts(runner.model, recorder)
    try:
        yield recorder
    finally:
        runner.experts = inner
        bind_experts(runner.model, inner)


def replay_decode(
    trace: RoutingTrace,
    source: ExpertSource,
    config: WorkerConfig,
    near_data: NearData | None = None,
    *,
    batch: int,
    num_steps: int,
    num_groups: int = 1,
    warm_up: int = 0,
) -> tuple[StepCounters, int]:
    """What decoding moves, and over how many tokens it was counted.

    The first `batch` windows advance together, a token of each per step, for `num_steps` steps;
    then the next `batch` of `num_groups` with the cache as they find it. The first `warm_up` steps
    of all are not counted. Near data, if the resolved `config` uses it, really runs its pairs, on
    zeros. Raises ValueError when the trace is too small.
    """
    if not 1 <= num_steps <= trace.num_tokens or not 1 <= batch * num_groups <= trace.num_windows:
        raise ValueError(
            f"decode: got {num_groups} times {batch} sequences of {num_steps} tokens, but there "
            f"are {trace.num_windows} windows of {trace.num_tokens} tokens to take them from"
        )
    if not 0 <= warm_up < num_steps:
        raise ValueError(f"warm_up: got {warm_up}, expected 0 to {num_steps - 1}")
    experts = StoreExperts(source, config, near_data, math=_NoMath(source.manifest))
    counters = StepCounters()
    try:
        for group in range(num_groups):
            rows = slice(group * batch, (group + 1) * batch)
            for step in range(num_steps):
                spent = _step(experts, trace, rows, step)
                if group or step >= warm_up:
                    counters += spent
        experts.check_integrity()
    finally:
        experts.close()
    return counters, batch * (num_groups * num_steps - warm_up)


def _step(experts: StoreExperts, trace: RoutingTrace, rows: slice, step: int) -> StepCounters:
    """One token of each sequence through all layers."""
    tags_B = trace.token_tags_WT[rows, step]
    nothing_BH = torch.zeros(tags_B.shape[0], trace.hidden, dtype=trace.dtype)
    experts.begin(None, tags_B)
    for layer, seen in trace.layers.items():
        ids_BK = seen.topk_ids_WTK[rows, step]
        experts.run_layer(layer, nothing_BH, ids_BK, seen.topk_weights_WTK[rows, step])
    return experts.end().counters


def uncached_bytes(trace: RoutingTrace, policy: PairPolicy, sizes: RecordSizes) -> float:
    """Expert bytes per token over all tokens of the trace, for one sequence and no cache.

    What `replay_decode` counts with batch 1 and a cache of 0, without stepping through it.
    """
    total = 0
    tags_S = trace.token_tags_WT.reshape(-1)
    for layer, seen in trace.layers.items():
        routing = route(
            layer,
            seen.topk_ids_WTK.flatten(0, 1),
            seen.topk_weights_WTK.flatten(0, 1),
            policy=policy,
            token_tags_T=tags_S,
        )
        run_P = routing.topk_ids_TK[routing.run_TK]
        restored_P = routing.topk_ids_TK[routing.run_TK & routing.restore_TK]
        total += _bytes(sizes.codes, layer, run_P) + _bytes(sizes.factors, layer, restored_P)
    return total / tags_S.numel()


def _bytes(sizes: Mapping[ExpertKey, int], layer: int, experts_P: torch.Tensor) -> int:
    """Of a layer's records, one for each pair; an expert without one counts nothing."""
    counts = torch.bincount(experts_P).tolist()
    return sum(count * sizes.get(ExpertKey(layer, e), 0) for e, count in enumerate(counts))


def weights_per_token(manifest: Manifest) -> int:
    """Weights of the k experts that a token uses, over all MoE layers."""
    model = manifest.model
    return len(model.moe_layers) * model.top_k * 3 * model.expert.hidden * model.expert.ffn


class _NoMath:
    """`ExpertMath` that reads nothing and computes zeros; records are their size alone."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._sizes = RecordSizes.of(manifest)

    def decode_on_host(self, request: RecordRequest, data: torch.Tensor) -> torch.Tensor:
        copy = self._sizes.copy_of(request)
        if copy.decoded_bytes is None:
            return data
        return torch.empty(copy.decoded_bytes, dtype=torch.uint8)

    def parse(self, request: RecordRequest, data: torch.Tensor) -> Record:
        if request.kind == "codes":
            return ExpertCodes(request.key, cast(GatedMLP, None), data.numel())
        repair = self._manifest.experts[request.key].repair
        if request.num_blocks is not None:
            repair = repair.prefix(request.num_blocks)
        return Compensator(request.key, cast(GatedRepair, None), data.numel(), repair)

    def run(self, calls: Sequence[ExpertCall]) -> list[torch.Tensor]:
        return [torch.zeros(call.hidden_PH.shape, dtype=torch.float32) for call in calls]
