"""What a step needs from outside: a source of expert records, and somebody who runs experts near
them.

The composition root passes in what satisfies these; this room does not know who they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

import torch

from expert_store.health import ReadingStatistics
from expert_store.types import ExpertOutputs, ExpertTokens, Manifest, RecordRequest


class ExpertSource(Protocol):
    """Reads records from a tier. Thread-safe; blocks; bounded by its own deadline."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def tier(self) -> str:
        """Where the bytes come from, for the counters: "disk", "object_store" or "grpc"."""
        ...

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        """The records' bytes in request order, each a flat uint8 CPU tensor (maybe a read-only
        view).

        Raises ExpertUnavailableError, CorruptRecordError or StoreFormatError, never returns less.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class WireCounted(Protocol):
    """What a source can be besides: one whose records cross a wire that it counts."""

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes (sent, received) on the wire since the start; compressed ones as they were."""
        ...


@runtime_checkable
class CopiesCounted(Protocol):
    """What a source can be besides: one that reads from several copies and counts how that goes."""

    @property
    def statistics(self) -> ReadingStatistics: ...


class NearData(Protocol):
    """Runs experts where their bytes are, restored where asked. Thread-safe; does not block."""

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        """Start one layer's batch: its outputs in the order of `work`.

        dtype is that of `hidden_TH`, device CPU. The future raises a StoreError when the worker is
        lost.
        """
        ...

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes (sent, received) on the wire since the start, counted by the transport."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class CountsWorkers(Protocol):
    """What a NearData can be besides: several workers, over which a layer's experts spread."""

    @property
    def num_workers(self) -> int: ...
