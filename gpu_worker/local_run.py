"""The device's part of one layer's plan: uses the records that are there, awaits the others.

Resident experts are computed while copies are under way, then each expert as its records land.
Knows no router, no near data and no sequence.

Legend: S token rows, H hidden, P pairs of one expert.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from expert_store.errors import StoreError
from expert_store.types import (
    Compensator,
    ExpertCodes,
    ExpertKey,
    RecordKind,
    RecordRequest,
)
from gpu_worker.combine import Part
from gpu_worker.counters import Tally
from gpu_worker.expert_cache import ExpertCache
from gpu_worker.expert_math import ExpertCall, ExpertMath, Record
from gpu_worker.planner import DispatchPlan, ExpertWork
from gpu_worker.streamer import Landed, Stream, Streamer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceExperts:
    """What computing on the device needs, the same for every layer."""

    cache: ExpertCache
    streamer: Streamer
    math: ExpertMath


@dataclass(slots=True)
class _Gathering:
    """An expert and the records of it that are here so far."""

    work: ExpertWork
    num_due: int
    codes: ExpertCodes | None = None
    factors: Compensator | None = None
    landed: list[RecordRequest] = field(default_factory=list)


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

    def run(self, dispatch: DispatchPlan) -> None:
        """Compute what the plan has for the device. Blocks until all of it came or failed."""
        self._count(dispatch)
        device = self._device
        try:
            records = {(request.key, request.kind): self._pin(request) for request in dispatch.hits}
            with device.streamer.start(dispatch.copies) as stream:
                self._compute([_gather(work, records, num_due=0) for work in dispatch.resident])
                self._await(dispatch, records, stream)
        finally:
            device.cache.unpin(self._pinned)
            self._pinned.clear()

    def _await(self, dispatch: DispatchPlan, records: _Records, stream: Stream) -> None:
        due = Counter(copy.request.key for copy in dispatch.copies)
        gatherings = {
            work.key: _gather(work, records, num_due=due[work.key]) for work in dispatch.streamed
        }
        try:
            for arrived in stream.batches():
                for landed in arrived:
                    self._take(landed, gatherings[landed.copy.request.key], stream)
                ready = [g for g in gatherings.values() if g.num_due == 0]
                self._compute(ready)
                for gathering in ready:
                    for request in gathering.landed:
                        stream.release(request)
                    # Its bytes are no longer counted: nothing here may keep them on the device.
                    del gatherings[gathering.work.key]
                del ready
        finally:
            self._tally.wait_s += stream.wait_s
            self._tally.moved_bytes.update(stream.moved_bytes)
            self._tally.device_bytes.update(stream.device_bytes)

    def _take(self, landed: Landed, gathering: _Gathering, stream: Stream) -> None:
        """Put one record, or its absence, where it belongs."""
        request = landed.copy.request
        gathering.num_due -= 1
        record, error = self._parse(landed)
        if record is None:
            stream.release(request)
            self._miss(request, gathering.work, error)
            return
        if isinstance(record, ExpertCodes):
            gathering.codes = record
        else:
            gathering.factors = record
        if self._device.cache.put_pinned(request, record, landed.copy.device_bytes):
            self._pinned.append(request)
            stream.release(request)
        else:
            gathering.landed.append(request)

    def _parse(self, landed: Landed) -> tuple[Record | None, StoreError | None]:
        if landed.data is None:
            return None, landed.error
        try:
            return self._device.math.parse(landed.copy.request, landed.data), None
        except StoreError as error:
            return None, error

    def _miss(self, request: RecordRequest, work: ExpertWork, error: StoreError | None) -> None:
        assert error is not None, f"{request} neither landed nor failed"
        logger.warning("the %s of %s could not be had: %s", request.kind, request.key, error)
        if request.kind == "codes":
            rows = {*self.failed.get(work.key, ()), *work.token_rows}
            self.failed[work.key] = tuple(sorted(rows))
            self.causes.append(error)

    def _compute(self, gatherings: Sequence[_Gathering]) -> None:
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
            restored_P = torch.tensor(work.restored) if factors is not None else None
            calls.append(ExpertCall(hidden_PH[start:end], codes, factors, restored_P))
            start = end
        outputs = self._device.math.run(calls)
        for gathering, output_PH in zip(gatherings, outputs, strict=True):
            self.parts.append(Part(gathering.work, output_PH))
            self.count_pairs(gathering.work, has_factors=gathering.factors is not None)

    def count_pairs(self, work: ExpertWork, *, has_factors: bool) -> None:
        """Count the pairs of an expert that was run; its restored ones are degraded if its factors
        could not be had."""
        self._tally.low_bit_pairs += len(work.token_rows) - work.num_restored
        if has_factors:
            self._tally.restored_pairs += work.num_restored
            return
        self._tally.degraded_pairs += work.num_restored
        pairs = zip(work.token_rows, work.restored, strict=True)
        self.degraded_rows.update(row for row, restored in pairs if restored)

    def _pin(self, request: RecordRequest) -> Record:
        record = self._device.cache.pin(request)
        self._pinned.append(request)
        if isinstance(record, Compensator) and request.num_blocks is not None:
            # More blocks may be here than the plan wants; results never depend on what was cached.
            return record.prefix(request.num_blocks)
        return record

    def _count(self, dispatch: DispatchPlan) -> None:
        for copy in dispatch.copies:
            self._tally.planned_bytes[copy.request.kind] += copy.num_bytes
            self._tally.cache_misses[copy.request.kind] += 1
        for request in dispatch.hits:
            self._tally.cache_hits[request.kind] += 1


_Records = dict[tuple[ExpertKey, RecordKind], Record]


def _gather(work: ExpertWork, records: _Records, *, num_due: int) -> _Gathering:
    gathering = _Gathering(work, num_due)
    codes = records.get((work.key, "codes"))
    factors = records.get((work.key, "factors"))
    if isinstance(codes, ExpertCodes):
        gathering.codes = codes
    if isinstance(factors, Compensator):
        gathering.factors = factors
    return gathering
