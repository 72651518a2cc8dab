"""What happens to each (token, expert) pair of a layer: a pure function of routing, bytes, costs.

Knows no weights, no cache and no transport; what it decides, `gpu_worker/experts.py` does.
All of a plan is in rising order of expert, whatever the router's or the cache's order was.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from expert_store.types import ExpertKey, RecordKind, RecordRequest
from gpu_worker.assignment import Choice, choose_near
from gpu_worker.config import NearDataPolicy
from gpu_worker.cost_model import ExpertLoad, LayerCosts, LayerTime
from gpu_worker.record_sizes import PlannedCopy, RecordSizes
from gpu_worker.routing import Routing


@dataclass(frozen=True, slots=True)
class ExpertWork:
    """Pairs of one expert: token row, top-k column, and whether its compensator is applied."""

    key: ExpertKey
    token_rows: tuple[int, ...]
    columns: tuple[int, ...]
    restored: tuple[bool, ...]

    @property
    def num_restored(self) -> int:
        return sum(self.restored)


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """One layer's pairs, each in exactly one of `resident`, `streamed` and `remote`.

    An expert may be in `remote` with its low-bit pairs and on the device with its restored ones.
    """

    resident: tuple[ExpertWork, ...]  # every record it needs is on the device
    streamed: tuple[ExpertWork, ...]  # needs at least one of `copies`
    remote: tuple[ExpertWork, ...]  # runs near data, restored pairs with their factors
    hits: tuple[RecordRequest, ...]  # records on the device that the plan uses
    copies: tuple[PlannedCopy, ...]  # codes before factors, an expert's records side by side

    def num_pairs(self) -> int:
        return sum(len(work.token_rows) for work in self._works())

    def num_restored(self) -> int:
        return sum(work.num_restored for work in self._works())

    def copy_bytes(self, kind: RecordKind) -> int:
        return sum(copy.num_bytes for copy in self.copies if copy.request.kind == kind)

    def _works(self) -> tuple[ExpertWork, ...]:
        return (*self.resident, *self.streamed, *self.remote)


@dataclass(frozen=True, slots=True)
class Policy:
    """Who may run near data. "cost" takes whichever way the layer is predicted to end soonest.

    `costs` are what that prediction knows of link, device and workers; only "cost" chooses by them.
    Near data has codes and factors: an expert goes there with all its pairs, restored ones and
    others. `row_bytes` are those of one token's hidden state on its way there.
    """

    near_data: NearDataPolicy = "off"
    costs: LayerCosts | None = None
    row_bytes: int = 0

    def __post_init__(self) -> None:
        if self.near_data == "cost" and (self.costs is None or self.costs.near is None):
            raise ValueError(
                f"costs: got {self.costs}, near_data 'cost' needs those of link and near data; "
                "measure them (gpu_worker/cost_table.py) or choose 'off' or 'low_bit'"
            )


@dataclass(slots=True)
class _Draft:
    """A plan being made."""

    resident: list[ExpertWork] = field(default_factory=list)
    streamed: list[ExpertWork] = field(default_factory=list)
    remote: list[ExpertWork] = field(default_factory=list)
    hits: list[RecordRequest] = field(default_factory=list)
    copies: list[PlannedCopy] = field(default_factory=list)


def plan(
    layer: int,
    routing: Routing,
    *,
    on_device: frozenset[RecordRequest],
    sizes: RecordSizes,
    policy: Policy,
) -> DispatchPlan:
    """The plan of one layer.

    `on_device` are the records that are there now, each in one length; factors with fewer blocks
    than are wanted count as missing and are fetched anew. A pair marked for restoring whose expert
    fetches no factors is a low-bit pair. Raises ValueError for an expert that the store does not
    have.
    """
    draft, held = _Draft(), _by_record(on_device)
    works = group_by_expert(layer, routing, sizes)
    for local, remote in _split(works, held, sizes, policy):
        if remote is not None:
            draft.remote.append(remote)
        if local is not None:
            _place(local, held, sizes, draft)
    return _finish(draft)


def predict(dispatch: DispatchPlan, sizes: RecordSizes, policy: Policy) -> LayerTime:
    """What the plan's layer is predicted to take; the policy has costs."""
    assert policy.costs is not None, "nothing to predict a layer's time from"
    held = _by_record(frozenset(dispatch.hits))
    return policy.costs.layer(
        [_local_load(work, held, sizes) for work in (*dispatch.resident, *dispatch.streamed)],
        [_near_load(work, sizes, policy.row_bytes) for work in dispatch.remote],
    )


def plan_local(
    works: tuple[ExpertWork, ...], *, on_device: frozenset[RecordRequest], sizes: RecordSizes
) -> DispatchPlan:
    """A plan that runs these works on the device: what is left to do when near data is lost."""
    draft, held = _Draft(), _by_record(on_device)
    for work in works:
        _place(work, held, sizes, draft)
    return _finish(draft)


def group_by_expert(layer: int, routing: Routing, sizes: RecordSizes) -> list[ExpertWork]:
    """The pairs of a routing that are run, experts and then token rows in rising order."""
    # In numpy: on a decode step's few pairs its calls cost a third of torch's.
    rows, columns = routing.run_TK.numpy().nonzero()
    ids = routing.topk_ids_TK.numpy()[rows, columns]
    order = ids.argsort(kind="stable")
    flags = routing.restore_TK.numpy()[rows, columns][order].tolist()
    rows_of, columns_of, ids = rows[order].tolist(), columns[order].tolist(), ids[order]
    ends = [*(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(rows_of)]
    works, start = [], 0
    for end in ends if rows_of else ():
        key = ExpertKey(layer, int(ids[start]))
        if key not in sizes.codes:
            raise ValueError(f"routing: {key} is not in the store; is it this model's store?")
        restored = tuple(flags[start:end]) if key in sizes.factors else (False,) * (end - start)
        rows_part, columns_part = tuple(rows_of[start:end]), tuple(columns_of[start:end])
        works.append(ExpertWork(key, rows_part, columns_part, restored))
        start = end
    return works


_Held = Mapping[tuple[ExpertKey, RecordKind], RecordRequest]


@functools.lru_cache(maxsize=128)
def _by_record(on_device: frozenset[RecordRequest]) -> _Held:
    """What is there of each record. A cache that did not change tells the same set in every step,
    and a set's hash is computed once."""
    return {(request.key, request.kind): request for request in on_device}


def _is_held(request: RecordRequest, held: _Held) -> bool:
    found = held.get((request.key, request.kind))
    return found is not None and found.covers(request)


_Split = tuple[ExpertWork | None, ExpertWork | None]


def _split(
    works: Sequence[ExpertWork], held: _Held, sizes: RecordSizes, policy: Policy
) -> list[_Split]:
    """Of each expert's pairs the part for the device, and the part for near data."""
    if policy.near_data == "off":
        return [(work, None) for work in works]
    if policy.near_data == "all":
        return [(None, work) for work in works]
    if policy.near_data == "low_bit":
        return [(_part(work, restored=True), _part(work, restored=False)) for work in works]
    assert policy.costs is not None, "Policy checks the costs"
    near = choose_near(
        [
            Choice(_local_load(work, held, sizes), _near_load(work, sizes, policy.row_bytes))
            for work in works
        ],
        policy.costs,
    )
    return [(None, work) if index in near else (work, None) for index, work in enumerate(works)]


def _local_load(work: ExpertWork, held: _Held, sizes: RecordSizes) -> ExpertLoad:
    needed = _needed(work, sizes)
    return ExpertLoad(
        num_pairs=len(work.token_rows),
        run_bytes=sum(sizes.bytes_of(request) for request in needed),
        copy_bytes=sum(sizes.bytes_of(each) for each in needed if not _is_held(each, held)),
    )


def _near_load(work: ExpertWork, sizes: RecordSizes, row_bytes: int) -> ExpertLoad:
    # A row that several experts there need travels once; counted for each, it is a bound.
    num_pairs = len(work.token_rows)
    run_bytes = sum(sizes.bytes_of(request) for request in _needed(work, sizes))
    return ExpertLoad(num_pairs, run_bytes, act_bytes=2 * num_pairs * row_bytes)


def _part(work: ExpertWork, *, restored: bool) -> ExpertWork | None:
    kept = [index for index, flag in enumerate(work.restored) if flag is restored]
    if not kept:
        return None
    return ExpertWork(
        work.key,
        tuple(work.token_rows[index] for index in kept),
        tuple(work.columns[index] for index in kept),
        (restored,) * len(kept),
    )


def _place(work: ExpertWork, held: _Held, sizes: RecordSizes, draft: _Draft) -> None:
    needed = _needed(work, sizes)
    missing = [request for request in needed if not _is_held(request, held)]
    if not missing:
        draft.hits.extend(needed)
        draft.resident.append(work)
        return
    draft.hits.extend(request for request in needed if request not in missing)
    draft.copies.extend(sizes.copy_of(request) for request in missing)
    draft.streamed.append(work)


def _needed(work: ExpertWork, sizes: RecordSizes) -> list[RecordRequest]:
    """The records that an expert's pairs need on the device."""
    needed = [RecordRequest(work.key, "codes")]
    if work.num_restored:
        needed.append(sizes.factors_of(work.key))
    return needed


def _finish(draft: _Draft) -> DispatchPlan:
    return DispatchPlan(
        resident=tuple(draft.resident),
        streamed=tuple(draft.streamed),
        remote=tuple(draft.remote),
        hits=tuple(draft.hits),
        copies=tuple(draft.copies),
    )
