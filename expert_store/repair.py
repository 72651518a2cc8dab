"""Repairs a segment's quarantined records from other copies, from a thread of its own.

Knows no transport: a source over the other copies is passed in.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from expert_store.errors import StoreError
from expert_store.segment import Segment, locate
from expert_store.types import RecordRequest

logger = logging.getLogger(__name__)

MAX_REPAIRED = 4096
"""Records kept in memory at most: a segment damaged worse than that is to be restored."""
MAX_REPAIRED_BYTES = 2 * 2**30
"""Memory that they take at most, on top of what the node was sized for."""


class OtherCopies(Protocol):
    """A source that asks every copy but this one."""

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]: ...

    def close(self) -> None: ...


class Repairer:
    """Looks for quarantined records every `interval_s` until closed; closes the source too."""

    def __init__(
        self,
        segment: Segment,
        others: OtherCopies,
        *,
        interval_s: float = 1.0,
        max_bytes: int = MAX_REPAIRED_BYTES,
    ) -> None:
        self._segment, self._others = segment, others
        self._interval_s, self._max_bytes = interval_s, max_bytes
        self._failed: set[RecordRequest] = set()  # told already
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="repairer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._others.close()
        self._thread.join()

    def repair_all(self) -> int:
        """Repair what can be; how many records were."""
        done = 0
        for key, kind in sorted(self._segment.quarantined):
            request = RecordRequest(key, kind)
            size = locate(self._segment.manifest, request).num_bytes
            full = self._segment.num_repaired >= MAX_REPAIRED
            full |= self._segment.repaired_bytes + size > self._max_bytes
            if full or self._stopped.is_set():
                break
            try:
                (data,) = self._others.fetch([request])
                self._segment.repair(request, data)
                done += 1
                self._failed.discard(request)
            except StoreError as error:
                if request not in self._failed:
                    logger.warning("the %s of %s cannot be repaired yet: %s", kind, key, error)
                self._failed.add(request)
        return done

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self.repair_all()
