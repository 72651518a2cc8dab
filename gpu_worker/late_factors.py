"""Factors that a layer did not wait for: kept for later steps when they come after all.

Owns at most one stream that was left; while it is not whole, no other factors are asked for, so
that one hanging copy costs one wait, and not one for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from expert_store.errors import StoreError
from expert_store.types import Compensator
from gpu_worker.counters import Tally
from gpu_worker.expert_cache import ExpertCache
from gpu_worker.expert_math import ExpertMath
from gpu_worker.record_sizes import PlannedCopy
from gpu_worker.stream import Landed, Stream
from gpu_worker.streamer import Streamer

SLOWEST_BYTES_PER_S = 25e6
"""A record is not late while a link of 0.2 Gbit/s would still be bringing what is under way."""


class LateFactors:
    """`patience_s`: seconds without any record landing that a layer waits for factors, on top of
    what their bytes take; None waits for as long as the source does. One thread only."""

    def __init__(
        self,
        streamer: Streamer,
        cache: ExpertCache,
        math: ExpertMath,
        patience_s: float | None,
    ) -> None:
        self._streamer, self._cache, self._math = streamer, cache, math
        # Without threads a fetch has ended before anybody can wait for it.
        self.patience_s = patience_s if streamer.has_threads else None
        self._stream: Stream | None = None

    def patience_of(self, due: Sequence[PlannedCopy]) -> float | None:
        """Seconds to wait for the next of these; None where only codes are due, or where factors
        are late already and no second stream can be left."""
        has_factors = any(copy.request.kind == "factors" for copy in due)
        if self.patience_s is None or self._stream is not None or not has_factors:
            return None
        return self.patience_s + sum(copy.num_bytes for copy in due) / SLOWEST_BYTES_PER_S

    def askable(self, copies: Sequence[PlannedCopy]) -> Sequence[PlannedCopy]:
        """The copies without those of factors, while earlier factors are late."""
        if self._stream is None:
            return copies
        return [copy for copy in copies if copy.request.kind == "codes"]

    def leave(self, stream: Stream) -> None:
        """Wait for this stream no longer; what it counted was taken down before."""
        assert self._stream is None, "factors of an earlier layer are still late"
        self._streamer.leave(stream)
        self._stream = stream

    def settle(self, tally: Tally) -> None:
        """Take what came since, between steps: nothing may be pinned, planned or fetched ahead."""
        stream = self._stream
        if stream is None:
            return
        for landed in stream.landed():
            self._keep(landed)
            stream.release(landed.copy.request)
        tally.moved_bytes.update(stream.moved_bytes)
        tally.device_bytes.update(stream.device_bytes)
        stream.moved_bytes.clear()
        stream.device_bytes.clear()
        if stream.is_whole:
            self._stream = None

    def _keep(self, landed: Landed) -> None:
        """Keep factors if there is room. Codes that came late were fetched again meanwhile."""
        request = landed.copy.request
        there = self._cache.of_layer(request.key.layer)
        if landed.data is None or any(held.covers(request) for held in there):
            return
        try:
            record = self._math.parse(request, landed.data)
        except StoreError:
            return  # a layer that needs it asks again, and then its error is told
        is_factors = isinstance(record, Compensator)
        if is_factors and self._cache.put_pinned(request, record, landed.copy.device_bytes):
            self._cache.unpin([request])
