"""What happens to each (token, expert) pair of a layer: a pure function of routing, bytes, costs.

Knows no weights, no cache and no transport; what it decides, `gpu_worker/experts.py` does.
All of a plan is in rising order of expert, whatever the router's or the cache's order was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from expert_store.types import ExpertKey, Manifest, RecordKind, RecordRequest
from gpu_worker.config import NearDataPolicy
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
class PlannedCopy:
    """One record to bring to the device."""

    request: RecordRequest
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """One layer's pairs, each in exactly one of `resident`, `streamed` and `remote`.

    An expert may be in `remote` with its low-bit pairs and on the device with its restored ones.
    """

    resident: tuple[ExpertWork, ...]  # every record it needs is on the device
    streamed: tuple[ExpertWork, ...]  # needs at least one of `copies`
    remote: tuple[ExpertWork, ...]  # runs near data, from codes alone
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
class RecordSizes:
    """Bytes of every record. An expert of rank 0 has no factors and is not in that mapping."""

    codes: Mapping[ExpertKey, int]
    factors: Mapping[ExpertKey, int]

    @staticmethod
    def of(manifest: Manifest) -> RecordSizes:
        experts = manifest.experts.items()
        return RecordSizes(
            codes={key: info.codes.num_bytes for key, info in experts},
            factors={key: info.factors.num_bytes for key, info in experts if info.factors},
        )

    def bytes_of(self, request: RecordRequest) -> int:
        return (self.codes if request.kind == "codes" else self.factors)[request.key]


@dataclass(frozen=True, slots=True)
class Policy:
    """Who may run near data. "cost" compares copying with running there, in seconds.

    Copying an expert's codes takes bytes / link_bytes_per_s; running it near data takes
    tokens * near_data_token_s. Codes that are on the device, or that a restored pair needs there
    anyway, cost nothing.
    """

    near_data: NearDataPolicy = "off"
    link_bytes_per_s: float | None = None
    near_data_token_s: float | None = None

    def near_is_cheaper(self, num_tokens: int, copy_bytes: int) -> bool:
        assert self.link_bytes_per_s is not None, "WorkerConfig checks the costs"
        assert self.near_data_token_s is not None, "WorkerConfig checks the costs"
        return num_tokens * self.near_data_token_s < copy_bytes / self.link_bytes_per_s


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

    `on_device` are the records that are there now. A pair marked for restoring whose expert has no
    factors is a low-bit pair. Raises ValueError for an expert that the store does not have.
    """
    draft = _Draft()
    for work in group_by_expert(layer, routing, sizes):
        local, remote = _split(work, on_device, sizes, policy)
        if remote is not None:
            draft.remote.append(remote)
        if local is not None:
            _place(local, on_device, sizes, draft)
    return _finish(draft)


def plan_local(
    works: tuple[ExpertWork, ...], *, on_device: frozenset[RecordRequest], sizes: RecordSizes
) -> DispatchPlan:
    """A plan that runs these works on the device: what is left to do when near data is lost."""
    draft = _Draft()
    for work in works:
        _place(work, on_device, sizes, draft)
    return _finish(draft)


def group_by_expert(layer: int, routing: Routing, sizes: RecordSizes) -> list[ExpertWork]:
    """The pairs of a routing that are run, experts and then token rows in rising order."""
    rows, columns = routing.run_TK.nonzero().unbind(1)
    ids = routing.topk_ids_TK[rows, columns]
    order = ids.argsort(stable=True)
    flags = routing.restore_TK[rows, columns][order].tolist()
    rows_of, columns_of = rows[order].tolist(), columns[order].tolist()
    experts, counts = ids.unique(sorted=True, return_counts=True)
    works, start = [], 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        key = ExpertKey(layer, expert)
        if key not in sizes.codes:
            raise ValueError(f"routing: {key} is not in the store; is it this model's store?")
        part = slice(start, start + count)
        restored = tuple(flags[part]) if key in sizes.factors else (False,) * count
        works.append(ExpertWork(key, tuple(rows_of[part]), tuple(columns_of[part]), restored))
        start += count
    return works


def _split(
    work: ExpertWork, on_device: frozenset[RecordRequest], sizes: RecordSizes, policy: Policy
) -> tuple[ExpertWork | None, ExpertWork | None]:
    """The part of an expert's pairs for the device, and the part for near data."""
    if policy.near_data == "off":
        return work, None
    if policy.near_data == "low_bit":
        return _part(work, restored=True), _part(work, restored=False)
    codes_come_anyway = work.num_restored > 0 or RecordRequest(work.key, "codes") in on_device
    if codes_come_anyway:
        return work, None
    if policy.near_is_cheaper(len(work.token_rows), sizes.codes[work.key]):
        return None, work
    return work, None


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


def _place(
    work: ExpertWork, on_device: frozenset[RecordRequest], sizes: RecordSizes, draft: _Draft
) -> None:
    needed = [RecordRequest(work.key, "codes")]
    if work.num_restored:
        needed.append(RecordRequest(work.key, "factors"))
    missing = [request for request in needed if request not in on_device]
    draft.hits.extend(request for request in needed if request in on_device)
    draft.copies.extend(PlannedCopy(request, sizes.bytes_of(request)) for request in missing)
    (draft.streamed if missing else draft.resident).append(work)


def _finish(draft: _Draft) -> DispatchPlan:
    return DispatchPlan(
        resident=tuple(draft.resident),
        streamed=tuple(draft.streamed),
        remote=tuple(draft.remote),
        hits=tuple(draft.hits),
        copies=tuple(draft.copies),
    )
