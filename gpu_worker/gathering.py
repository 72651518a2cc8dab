"""An expert of one layer and the records of it that are here so far.

Knows no stream and no cache: who brings a record says how its bytes are given back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from expert_store.types import Compensator, ExpertCodes, ExpertKey, RecordKind, RecordRequest
from gpu_worker.expert_math import Record
from gpu_worker.planner import ExpertWork

Release = Callable[[RecordRequest], None]
"""Gives a record's bytes back to whoever counts them as under way."""


@dataclass(slots=True)
class Gathering:
    """`num_due` records are still awaited; those in `landed` are to be given back after use."""

    work: ExpertWork
    num_due: int
    codes: ExpertCodes | None = None
    factors: Compensator | None = None
    landed: list[tuple[RecordRequest, Release]] = field(default_factory=list)


def gather(
    work: ExpertWork, records: Mapping[tuple[ExpertKey, RecordKind], Record], *, num_due: int
) -> Gathering:
    """The expert with those of its records that are on the device."""
    gathering = Gathering(work, num_due)
    codes, factors = records.get((work.key, "codes")), records.get((work.key, "factors"))
    if isinstance(codes, ExpertCodes):
        gathering.codes = codes
    if isinstance(factors, Compensator):
        gathering.factors = factors
    return gathering


def cut(factors: Compensator, request: RecordRequest) -> Compensator:
    """As many blocks as the plan wants: results never depend on how many are here."""
    return factors if request.num_blocks is None else factors.prefix(request.num_blocks)
