"""What an expert cache is asked for when a trace runs over a store, and how often it has it.

Drives the worker's own cache, turn by turn, as a step of `gpu_worker/experts.py` does without near
data; nothing is read or computed. What the best choice would have found is
`gpu_worker/eviction_optimum.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from expert_store.types import ExpertKey, ModelInfo, RecordKind, RecordRequest
from gpu_worker.eviction import EvictionPolicy
from gpu_worker.expert_cache import CacheBudgets, ExpertCache
from gpu_worker.expert_math import Record
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.routing import shares
from gpu_worker.trace import LayerRows, StepTrace, TracedModel


@dataclass(frozen=True, slots=True)
class Need:
    """A record that a step needs, and what it takes on the device."""

    request: RecordRequest
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LayerTurn:
    """One layer of one step: what it needs, experts in rising order and codes before factors.

    `scores` is what `ExpertCache.begin_turn` is told.
    """

    layer: int
    needs: tuple[Need, ...]
    scores: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What was asked for and what was there, by kind."""

    asked: Mapping[RecordKind, int]
    hits: Mapping[RecordKind, int]
    asked_bytes: Mapping[RecordKind, int]
    hit_bytes: Mapping[RecordKind, int]

    def hit_share(self, kind: RecordKind | None = None) -> float:
        """Share of the bytes asked for that were there, of one kind or of both; 0 for none."""
        kinds: Iterable[RecordKind] = self.asked_bytes if kind is None else (kind,)
        asked = sum(self.asked_bytes.get(one, 0) for one in kinds)
        return sum(self.hit_bytes.get(one, 0) for one in kinds) / asked if asked else 0.0


class CacheTally:
    """`CacheCounts` while they are counted."""

    def __init__(self) -> None:
        self._asked: Counter[RecordKind] = Counter()
        self._hits: Counter[RecordKind] = Counter()
        self._asked_bytes: Counter[RecordKind] = Counter()
        self._hit_bytes: Counter[RecordKind] = Counter()

    def add(self, need: Need, bytes_there: int) -> None:
        """One record that was asked for, of which so many bytes were there; a hit if all were."""
        kind = need.request.kind
        self._asked[kind] += 1
        self._asked_bytes[kind] += need.num_bytes
        self._hits[kind] += bytes_there == need.num_bytes
        self._hit_bytes[kind] += bytes_there

    def freeze(self) -> CacheCounts:
        return CacheCounts(
            dict(self._asked), dict(self._hits), dict(self._asked_bytes), dict(self._hit_bytes)
        )


def check_same_model(trace: StepTrace, model: ModelInfo) -> None:
    """Raise ValueError when the trace is of another model than a store's."""
    found = TracedModel.of(model)
    for name in ("model_type", "top_k", "num_experts"):
        told, there = getattr(trace.model, name), getattr(found, name)
        if told != there:
            raise ValueError(
                f"trace: is of {trace.model.name} with {name} {told}, the store of {model.name} "
                f"has {there}; record a trace of this model with `moetier trace`"
            )


def turns_of(trace: StepTrace, sizes: RecordSizes) -> list[LayerTurn]:
    """The turns of all steps. Experts that have no factors in the store need none."""
    by_layer = {
        layer: _turns_of_layer(layer, rows, trace.rows_per_step, sizes)
        for layer, rows in trace.layers.items()
    }
    return [turns[step] for step in range(trace.num_steps) for turns in by_layer.values()]


def replay_turns(
    turns: Sequence[LayerTurn], budgets: CacheBudgets, policy: EvictionPolicy
) -> CacheCounts:
    """Play the turns through an empty cache."""
    cache = ExpertCache(budgets, policy)
    tally = CacheTally()
    nothing = cast(Record, None)  # the cache hands records back and never looks into them
    for turn in turns:
        cache.begin_turn(turn.layer, turn.scores if cache.wants_scores else None)
        pinned, missing = [], []
        for need in turn.needs:
            is_there = need.request in cache
            tally.add(need, need.num_bytes if is_there else 0)
            if is_there:
                cache.pin(need.request)
                pinned.append(need.request)
            else:
                missing.append(need)
        for need in missing:
            if cache.put_pinned(need.request, nothing, need.num_bytes):
                pinned.append(need.request)
        cache.unpin(pinned)
    cache.check_integrity(idle=True)
    return tally.freeze()


def _turns_of_layer(
    layer: int, rows: LayerRows, rows_per_step: Sequence[int], sizes: RecordSizes
) -> list[LayerTurn]:
    """A turn per step, from sums over the step's rows by expert."""
    num_experts = 1 + int(rows.topk_ids_SK.max())
    steps_S1 = torch.arange(len(rows_per_step)).repeat_interleave(torch.tensor(rows_per_step))[
        :, None
    ]
    cells_SK = steps_S1 * num_experts + rows.topk_ids_SK.long()
    cells = len(rows_per_step) * num_experts

    def sums(mask_SK: torch.Tensor, weights_SK: torch.Tensor | None = None) -> torch.Tensor:
        weights_P = None if weights_SK is None else weights_SK[mask_SK]
        return torch.bincount(cells_SK[mask_SK], weights_P, cells).reshape(-1, num_experts)

    used = sums(rows.run_SK)
    restored = sums(rows.restore_SK).tolist()
    weight = sums(rows.run_SK, shares(rows.topk_weights_SK)).tolist()
    needs = [_needs(ExpertKey(layer, expert), sizes) for expert in range(num_experts)]
    turns = []
    for step, experts in enumerate(used.tolist()):
        present = [expert for expert, count in enumerate(experts) if count]
        of_step = [
            need
            for expert in present
            for need in needs[expert][: 2 if restored[step][expert] else 1]
        ]
        scores = {expert: weight[step][expert] for expert in present}
        turns.append(LayerTurn(layer, tuple(of_step), scores))
    return turns


def _needs(key: ExpertKey, sizes: RecordSizes) -> tuple[Need, ...]:
    """An expert's codes and, if the store has any, its factors."""
    requests = [RecordRequest(key, "codes")]
    if key in sizes.factors:
        requests.append(sizes.factors_of(key))
    return tuple(Need(one, sizes.copy_of(one).device_bytes) for one in requests)
