"""Finds a segment's damaged records and repairs them from other copies, from a thread of its own.

Knows no transport: a source over the other copies is passed in.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from expert_store.errors import ExpertUnavailableError, StoreError
from expert_store.segment import Segment, locate
from expert_store.types import RecordRequest

logger = logging.getLogger(__name__)

MAX_REPAIRED = 4096
"""Records kept in memory at most: a segment damaged worse than that is to be restored."""
MAX_REPAIRED_BYTES = 2 * 2**30
"""Memory that they take at most, on top of what the node was sized for."""
MAX_PAUSE_S = 60.0


class OtherCopies(Protocol):
    """A source that asks every copy but this one."""

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]: ...

    def close(self) -> None: ...


class Repairer:
    """Looks for quarantined records every `interval_s` until closed; closes the source too.

    It hashes `scrub_bytes_per_s` of all records anew, over and over, so that damage is found which
    came after the first read; 0 leaves that out. Records that no other copy can give are tried
    again after 5, 10, ... `MAX_PAUSE_S`.
    """

    def __init__(
        self,
        segment: Segment,
        others: OtherCopies,
        *,
        interval_s: float = 1.0,
        max_bytes: int = MAX_REPAIRED_BYTES,
        scrub_bytes_per_s: float = 0.0,
    ) -> None:
        self._segment, self._others = segment, others
        self._interval_s, self._max_bytes = interval_s, max_bytes
        self._scrub_bytes = scrub_bytes_per_s * interval_s  # a turn
        self._owed_bytes = 0.0
        self._next = _over_and_over(segment)
        self._failed: set[RecordRequest] = set()  # told already
        self._is_full = False
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
        damaged = [RecordRequest(key, kind) for key, kind in sorted(self._segment.quarantined)]
        for request in sorted(damaged, key=self._failed.__contains__):  # the new ones first
            if self._stopped.is_set():
                break
            size = locate(self._segment.manifest, request).num_bytes
            if self._tell_if_full(size):
                break
            try:
                (data,) = self._others.fetch([request])
                self._segment.repair(request, data)
                done += 1
                self._failed.discard(request)
            except StoreError as error:
                if request not in self._failed and not self._stopped.is_set():
                    logger.warning(
                        "the %s of %s cannot be repaired yet: %s", request.kind, request.key, error
                    )
                self._failed.add(request)
        return done

    def scrub(self) -> None:
        """Hash the records whose turn it is."""
        self._owed_bytes += self._scrub_bytes
        while self._owed_bytes > 0 and not self._stopped.is_set():
            request = next(self._next, None)
            if request is None:
                return
            self._segment.recheck(request)
            self._owed_bytes -= locate(self._segment.manifest, request).num_bytes

    def _tell_if_full(self, size: int) -> bool:
        was_full = self._is_full
        self._is_full = (
            self._segment.num_repaired >= MAX_REPAIRED
            or self._segment.repaired_bytes + size > self._max_bytes
        )
        if self._is_full and not was_full:
            logger.error(
                "%s is damaged in too many places to be repaired in memory (%d records, %d bytes): "
                "restore it",
                self._segment.store,
                self._segment.num_repaired,
                self._segment.repaired_bytes,
            )
        return self._is_full

    def _run(self) -> None:
        pause_s = left_s = 0.0  # until records that could not be repaired are tried again
        while not self._stopped.wait(self._interval_s):
            left_s -= self._interval_s
            try:
                self.scrub()
            except ExpertUnavailableError:
                return  # the segment was closed
            damaged = {RecordRequest(key, kind) for key, kind in self._segment.quarantined}
            if damaged - self._failed or (damaged and left_s <= 0):
                pause_s = 0.0 if self.repair_all() else min(MAX_PAUSE_S, pause_s + 5.0)
                left_s = pause_s


def _over_and_over(segment: Segment) -> Iterator[RecordRequest]:
    """All records of a segment, without end; none of one that has none."""
    infos = segment.manifest.experts
    requests = [
        RecordRequest(key, kind)
        for key in sorted(segment.keys)
        for kind in ("codes", "factors")
        if kind == "codes" or infos[key].factors is not None
    ]
    return itertools.cycle(requests)
