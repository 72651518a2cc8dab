"""The device's part of one layer's plan: uses the records that are there, awaits the others.

Resident experts are computed while copies are under way, then each expert as its records land.
Knows no router, no near data and no sequence.

Legend: S token rows, H hidden, P pairs of one expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from expert_store.errors import StoreError
from expert_store.types import Compensator, ExpertCodes, ExpertKey, RecordKind, RecordRequest
from gpu_worker.combine import Part
from gpu_worker.counters import Tally
from gpu_worker.device_experts import DeviceExperts
from gpu_worker.expert_math import ExpertCall, Record
from gpu_worker.gathering import Gathering, Release, cut, gather
from gpu_worker.planner import DispatchPlan, ExpertWork
from gpu_worker.prefetch import AheadRecords
from gpu_worker.record_sizes import PlannedCopy
from gpu_worker.stream import Landed, Stream


class LocalRun:
    """One layer on the device. `run` may be called again, for work that came back from elsewhere.

    Fills `parts`, and `degraded_rows` with the pairs whose compensator could not be had. An expert
    whose codes could not be had is in `failed` with its token rows; the parts are then worthless.
    """

    def __init__(self, device: DeviceExperts, hidden_SH: torch.Tensor, tally: Tally) -> None:
        self._device = device
        self._hidden_SH = hidden_SH
        self._tally = tally
        self._pinned: list[RecordRequest] = []
        self.parts: list[Part] = []
        self.failed: dict[ExpertKey, tuple[int, ...]] = {}
        self.causes: list[StoreError] = []
        self.degraded_rows: Counter[int] = Counter()

    def run(
        self,
        dispatch: DispatchPlan,
        ahead: AheadRecords | None = None,
        on_landed: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute what the plan has for the device. Blocks until all of it came or failed.

        `ahead` are records that the plan counts as being there; they may still be on their way.
        `on_landed` is called once all copies are here, before the last experts are computed.
        """
        device = self._device
        copies = device.late.askable(dispatch.copies)
        for copy in copies:
            self._count_copy(copy)
        try:
            from_ahead, records = self._find(dispatch.hits, ahead)
            works = (*dispatch.resident, *dispatch.streamed)
            if not from_ahead and not copies:
                # Nothing to wait for: no stream is made and no arrival counted. What the plan would
                # stream runs too: of its copies none may be asked for now.
                on_landed()
                self._compute([gather(work, records, num_due=0) for work in works])
                return
            due = Counter(request.key for request in from_ahead)
            due.update(copy.request.key for copy in copies)
            gatherings = {work.key: gather(work, records, num_due=due[work.key]) for work in works}
            with device.streamer.start(copies) as stream:
                if stream.is_whole:
                    on_landed()
                self._run_ready(gatherings)
                again: dict[PlannedCopy, RecordRequest] = {}
                if ahead is not None and from_ahead:
                    again = self._await_ahead(from_ahead, gatherings, ahead)
                self._await(gatherings, stream, on_landed)
            if again:
                wanted = {copy.request: request for copy, request in again.items()}
                with device.streamer.start(list(again)) as stream:
                    self._await(gatherings, stream, lambda: None, wanted)
        finally:
            device.cache.unpin(self._pinned)
            self._pinned.clear()

    def _find(
        self, hits: Sequence[RecordRequest], ahead: AheadRecords | None
    ) -> tuple[_Wanted, _Records]:
        """Of the records that the plan counts as there: those fetched ahead, by the name they were
        fetched under, and those of the cache, pinned."""
        from_ahead: _Wanted = {}
        records: _Records = {}
        for request in hits:
            fetched = None if ahead is None else ahead.covering(request)
            if fetched is not None:
                from_ahead[fetched] = request
            else:
                records[request.key, request.kind] = self._pin(request)
                self._tally.cache_hits[request.kind] += 1
        return from_ahead, records

    def _await_ahead(
        self, from_ahead: _Wanted, gatherings: dict[ExpertKey, Gathering], ahead: AheadRecords
    ) -> dict[PlannedCopy, RecordRequest]:
        """What is here of the records fetched ahead, then each of the others as it lands. Returns
        those lost or late, to be fetched like any other, and what the plan wants of each."""
        waiting = dict(from_ahead)
        again: dict[PlannedCopy, RecordRequest] = {}
        for fetched in from_ahead:
            landed = ahead.take(fetched)
            if landed is not None:
                self._take_ahead(landed, waiting, gatherings, ahead)
        self._run_ready(gatherings)
        while waiting:
            patience_s = self._device.late.patience_of(ahead.copies_due(waiting))
            landed = ahead.next(waiting, patience_s)
            if landed is None:
                for copy in ahead.copies_due(waiting):
                    if copy.request.kind == "factors":
                        self._go_without(copy.request, gatherings)
                    else:
                        again[copy] = waiting[copy.request]
                        self._count_copy(copy)
                self._run_ready(gatherings)
                break
            if landed.error is not None:
                again[landed.copy] = waiting.pop(landed.copy.request)
                ahead.release(landed.copy.request)
                self._count_copy(landed.copy)
                continue
            self._take_ahead(landed, waiting, gatherings, ahead)
            self._run_ready(gatherings)
        return again

    def _take_ahead(
        self,
        landed: Landed,
        waiting: _Wanted,
        gatherings: dict[ExpertKey, Gathering],
        ahead: AheadRecords,
    ) -> None:
        copy = landed.copy
        wanted = waiting.pop(copy.request)
        self._count_copy(copy)
        self._take(landed, gatherings[copy.request.key], ahead.release, wanted)

    def _await(
        self,
        gatherings: dict[ExpertKey, Gathering],
        stream: Stream,
        on_landed: Callable[[], None],
        wanted: Mapping[RecordRequest, RecordRequest] = MappingProxyType({}),
    ) -> None:
        try:
            while not stream.is_whole:
                patience_s = self._device.late.patience_of(stream.copies_due)
                arrived = stream.batch(patience_s)
                if not arrived:
                    break
                for landed in arrived:
                    request = landed.copy.request
                    self._take(landed, gatherings[request.key], stream.release, wanted.get(request))
                if stream.is_whole:
                    on_landed()
                self._run_ready(gatherings)
        finally:
            self._tally.wait_s += stream.wait_s
            self._tally.moved_bytes.update(stream.moved_bytes)
            self._tally.device_bytes.update(stream.device_bytes)
        if not stream.is_whole:
            self._go_on(gatherings, stream, on_landed)

    def _go_on(
        self, gatherings: dict[ExpertKey, Gathering], stream: Stream, on_landed: Callable[[], None]
    ) -> None:
        """Go on without the factors that are due; codes that are due too are asked for alone,
        since they may be held up by factors in the same fetch."""
        codes, due = [], stream.copies_due
        self._device.late.leave(stream)
        for copy in due:
            if copy.request.kind == "codes":
                codes.append(copy)
            else:
                self._go_without(copy.request, gatherings)
        if not codes:
            on_landed()
        self._run_ready(gatherings)
        with self._device.streamer.start(codes) as again:
            self._await(gatherings, again, on_landed)

    def _go_without(self, request: RecordRequest, gatherings: dict[ExpertKey, Gathering]) -> None:
        message = "the factors of %s are late: nothing in %s s"
        told = request.key, self._device.late.patience_s
        self._device.told.warn(("late", request.key), message, *told)
        gatherings[request.key].num_due -= 1

    def _run_ready(self, gatherings: dict[ExpertKey, Gathering]) -> None:
        """Compute every expert that is whole, and give its bytes back."""
        ready = [gathering for gathering in gatherings.values() if gathering.num_due == 0]
        self._compute(ready)
        for gathering in ready:
            for request, release in gathering.landed:
                release(request)
            # Its bytes are no longer counted, so nothing may keep them on the device.
            del gatherings[gathering.work.key]

    def _take(
        self,
        landed: Landed,
        gathering: Gathering,
        release: Release,
        wanted: RecordRequest | None = None,
    ) -> None:
        """Put one record, or its absence, where it belongs; `wanted` may be a part of it."""
        request = landed.copy.request
        gathering.num_due -= 1
        record, error = self._parse(landed)
        if record is None:
            release(request)
            self._miss(request, gathering.work, error)
            return
        if isinstance(record, ExpertCodes):
            gathering.codes = record
        else:
            gathering.factors = cut(record, wanted or request)
        if self._device.cache.put_pinned(request, record, landed.copy.device_bytes):
            self._pinned.append(request)
            release(request)
        else:
            gathering.landed.append((request, release))

    def _parse(self, landed: Landed) -> tuple[Record | None, StoreError | None]:
        if landed.data is None:
            return None, landed.error
        try:
            return self._device.math.parse(landed.copy.request, landed.data), None
        except StoreError as error:
            return None, error

    def _miss(self, request: RecordRequest, work: ExpertWork, error: StoreError | None) -> None:
        assert error is not None, f"{request} neither landed nor failed"
        name = (request.kind, request.key)
        self._device.told.warn(name, "the %s of %s could not be had: %s", *name, error)
        if request.kind == "codes":
            rows = {*self.failed.get(work.key, ()), *work.token_rows}
            self.failed[work.key] = tuple(sorted(rows))
            self.causes.append(error)

    def _compute(self, gatherings: Sequence[Gathering]) -> None:
        """Run experts whose records are here, at once; not worth it once any expert has failed."""
        if self.failed or not gatherings:
            return
        rows = [row for gathering in gatherings for row in gathering.work.token_rows]
        # Not waiting lets the host launch the next experts; pageable sources are staged at once.
        rows_P = torch.tensor(rows).to(self._hidden_SH.device, non_blocking=True)
        hidden_PH = self._hidden_SH[rows_P]
        calls, start = [], 0
        for gathering in gatherings:
            work, codes, factors = gathering.work, gathering.codes, gathering.factors
            assert codes is not None, f"{work.key} has neither codes nor a failure"
            end = start + len(work.token_rows)
            is_mixed = factors is not None and not all(work.restored)
            restored_P = torch.tensor(work.restored) if is_mixed else None
            calls.append(ExpertCall(hidden_PH[start:end], codes, factors, restored_P))
            start = end
        outputs = self._device.math.run(calls)
        for gathering, output_PH in zip(gatherings, outputs, strict=True):
            self.parts.append(Part(gathering.work, output_PH))
            self.count_pairs(gathering.work, has_factors=gathering.factors is not None)

    def count_pairs(self, work: ExpertWork, *, has_factors: bool) -> None:
        """Count the pairs of an expert that was run; its restored ones are degraded if its factors
        could not be had."""
        num_restored = work.num_restored
        self._tally.low_bit_pairs += len(work.token_rows) - num_restored
        if has_factors or not num_restored:
            self._tally.restored_pairs += num_restored
            return
        self._tally.degraded_pairs += num_restored
        pairs = zip(work.token_rows, work.restored, strict=True)
        self.degraded_rows.update(row for row, restored in pairs if restored)

    def _pin(self, request: RecordRequest) -> Record:
        record = self._device.cache.pin(request)
        self._pinned.append(request)
        return cut(record, request) if isinstance(record, Compensator) else record

    def _count_copy(self, copy: PlannedCopy) -> None:
        self._tally.planned_bytes[copy.request.kind] += copy.num_bytes
        self._tally.cache_misses[copy.request.kind] += 1


_Wanted = dict[RecordRequest, RecordRequest]  # by what was fetched, the part the plan wants
_Records = dict[tuple[ExpertKey, RecordKind], Record]
