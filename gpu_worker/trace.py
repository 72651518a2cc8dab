"""Where the tokens of every step of a real run went: recorded as it runs, replayed afterwards.

A trace holds routing, not bytes: `gpu_worker/trace_turns.py` says what a store's records make of
it. On disk it is `gpu_worker/trace_file.py`.

Legend: N steps, S token rows (of one step, or of all of them one after another), K top-k, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from expert_store.types import ModelInfo
from gpu_worker.model import ModelRunner, StepExperts, StepReport, bind_experts
from gpu_worker.restoring import PairPolicy, route

MAX_EXPERTS = 1 << 15
"""Of a layer; expert numbers are kept as int16."""


@dataclass(frozen=True, slots=True)
class TracedModel:
    """Of which model a trace is: what a store must have in common with it."""

    name: str
    model_type: str
    top_k: int
    num_experts: Mapping[int, int]  # MoE layer -> experts

    @staticmethod
    def of(model: ModelInfo) -> TracedModel:
        return TracedModel(model.name, model.model_type, model.top_k, dict(model.num_experts))


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Where the token rows of all steps went in one layer. CPU; padding rows are left out."""

    topk_ids_SK: torch.Tensor  # [S, K] int16
    topk_weights_SK: torch.Tensor  # [S, K] float32, as the router gave them
    run_SK: torch.Tensor  # [S, K] bool: pairs that were run, not skipped
    restore_SK: torch.Tensor  # [S, K] bool: pairs whose plan was to restore them


@dataclass(frozen=True, slots=True)
class StepTrace:
    """A run, step by step. Raises ValueError when its parts do not fit one another."""

    model: TracedModel
    store_version: str  # of the store that ran
    origin: str  # what was run, in words
    rows_per_step: tuple[int, ...]  # 1 or more each
    layers: Mapping[int, LayerRows]  # in the order the model goes through them

    def __post_init__(self) -> None:
        if set(self.layers) != set(self.model.num_experts):
            raise ValueError(
                f"trace: has layers {sorted(self.layers)}, the model's MoE layers are "
                f"{sorted(self.model.num_experts)}"
            )
        if min(self.rows_per_step, default=1) < 1:
            raise ValueError("trace: a step has no token row; leave it out")
        shape = (self.num_rows, self.model.top_k)
        for layer, rows in self.layers.items():
            for name in rows.__slots__:
                if tuple(getattr(rows, name).shape) != shape:
                    found = tuple(getattr(rows, name).shape)
                    raise ValueError(f"layer {layer}: {name}: expected shape {shape}, got {found}")
            ids_SK, count = rows.topk_ids_SK, self.model.num_experts[layer]
            if ids_SK.numel() and not 0 <= int(ids_SK.min()) <= int(ids_SK.max()) < count:
                raise ValueError(
                    f"layer {layer}: got experts {int(ids_SK.min())} to {int(ids_SK.max())}, "
                    f"expected 0 to {count - 1}"
                )

    @property
    def num_rows(self) -> int:
        return sum(self.rows_per_step)

    @property
    def num_steps(self) -> int:
        return len(self.rows_per_step)


def side_by_side(trace: StepTrace, batch: int, num_groups: int | None = None) -> StepTrace:
    """A trace of sequences that decode side by side, as if there had been `batch` of them at a
    time: the first ones through all steps, then the next, `num_groups` times or as often as
    possible. Where a sequence goes does not depend on its neighbours but for rounding.

    Raises ValueError when the steps differ in rows, or there are too few sequences.
    """
    num_sequences = trace.rows_per_step[0]
    if set(trace.rows_per_step) != {num_sequences}:
        raise ValueError(
            f"batch: got {batch}, but the trace's steps have {min(trace.rows_per_step)} to "
            f"{max(trace.rows_per_step)} rows; only a trace of texts can be taken apart"
        )
    most = num_sequences // batch if batch > 0 else 0
    num_groups = most if num_groups is None else num_groups
    if not 1 <= num_groups <= most:
        raise ValueError(
            f"batch: got {num_groups} times {batch} sequences, the trace has {num_sequences}"
        )
    rows_NS = torch.arange(trace.num_rows).reshape(trace.num_steps, num_sequences)
    taken = torch.cat([part.flatten() for part in rows_NS.split(batch, dim=1)[:num_groups]])
    layers = {
        layer: LayerRows(*(getattr(rows, name)[taken] for name in rows.__slots__))
        for layer, rows in trace.layers.items()
    }
    origin = f"{trace.origin}; replayed {batch} side by side"
    return replace(
        trace, origin=origin, rows_per_step=(batch,) * (trace.num_steps * num_groups), layers=layers
    )


class TraceRecorder:
    """`StepExperts` that passes everything on and keeps where the tokens went.

    `pairs` is the policy that `inner` runs with. A step that does not come to its `end` (an expert
    could not be had) is not kept.
    """

    def __init__(self, inner: StepExperts, pairs: PairPolicy) -> None:
        self._inner = inner
        self._pairs = pairs
        self._steps: list[dict[int, LayerRows]] = []
        self._step: dict[int, LayerRows] = {}
        self._valid_S: torch.Tensor | None = None
        self._tags_S: torch.Tensor | None = None

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        self._step = {}
        self._valid_S = None if valid_S is None else valid_S.cpu()
        self._tags_S = token_tags_S
        self._inner.begin(valid_S, token_tags_S)

    def run_layer(
        self,
        layer: int,
        hidden_SH: torch.Tensor,
        topk_ids_SK: torch.Tensor,
        topk_weights_SK: torch.Tensor,
    ) -> torch.Tensor:
        routing = route(
            layer, topk_ids_SK, topk_weights_SK, policy=self._pairs, token_tags_T=self._tags_S
        )
        valid = slice(None) if self._valid_S is None else self._valid_S
        self._step[layer] = LayerRows(
            routing.topk_ids_TK[valid].to(torch.int16),
            routing.topk_weights_TK[valid].clone(),
            routing.run_TK[valid],
            routing.restore_TK[valid],
        )
        return self._inner.run_layer(layer, hidden_SH, topk_ids_SK, topk_weights_SK)

    def end(self) -> StepReport:
        if next(iter(self._step.values())).topk_ids_SK.shape[0]:
            self._steps.append(self._step)
        return self._inner.end()

    def trace(self, model: ModelInfo, store_version: str, origin: str) -> StepTrace:
        """The steps so far. Raises ValueError when there are none."""
        if not self._steps:
            raise ValueError("trace: nothing was run yet")
        layers = {}
        for layer in self._steps[0]:
            parts = [step[layer] for step in self._steps]
            layers[layer] = LayerRows(
                *(torch.cat([getattr(part, name) for part in parts]) for name in parts[0].__slots__)
            )
        first = next(iter(layers))
        rows_per_step = tuple(step[first].topk_ids_SK.shape[0] for step in self._steps)
        return StepTrace(TracedModel.of(model), store_version, origin, rows_per_step, layers)


@contextmanager
def traced(runner: ModelRunner, pairs: PairPolicy) -> Iterator[TraceRecorder]:
    """A recorder between the model and its experts, as long as the `with` lasts."""
    inner = runner.experts
    recorder = TraceRecorder(inner, pairs)
    runner.experts = recorder
    bind_experts(runner.model, recorder)
    try:
        yield recorder
    finally:
        runner.experts = inner
        bind_experts(runner.model, inner)
