"""A source and a near-data client that tell a cost table how long they took.

Each passes everything on. Times are of the transport alone: who waits for it does not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from expert_store.types import ExpertTokens, Manifest, RecordRequest
from gpu_worker.cost_model import ExpertLoad
from gpu_worker.cost_table import CopyTime, CostTable
from gpu_worker.protocols import ExpertSource, NearData

MAX_PERIOD_S = 0.25
"""Fetches that never cease to overlap are still told of so often."""


class MeteredSource:
    """An ExpertSource that tells `table` what its fetches took.

    Fetches at the same time share the link, so what is timed is a period in which any was under
    way, with the bytes of all. A period with a fetch that failed says nothing of the link's speed.
    """

    def __init__(
        self, inner: ExpertSource, table: CostTable, *, clock: Callable[[], float]
    ) -> None:
        self._inner = inner
        self._table = table
        self._clock = clock
        self._lock = threading.Lock()
        self._num_open = 0
        self._begin(0.0)

    @property
    def manifest(self) -> Manifest:
        return self._inner.manifest

    @property
    def tier(self) -> str:
        return self._inner.tier

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        """As the inner source."""
        with self._lock:
            if self._num_open == 0:
                self._begin(self._clock())
            self._num_open += 1
        datas = None
        try:
            datas = self._inner.fetch(requests)
            return datas
        finally:
            self._end(datas)

    def close(self) -> None:
        self._inner.close()

    def _begin(self, now_s: float) -> None:
        self._started_s = now_s
        self._num_bytes = self._num_calls = 0
        self._failed = False

    def _end(self, datas: list[torch.Tensor] | None) -> None:
        with self._lock:
            self._num_open -= 1
            if datas is None:
                self._failed = True
            else:
                self._num_calls += 1
                self._num_bytes += sum(data.numel() for data in datas)
            now_s = self._clock()
            seconds = now_s - self._started_s
            if self._num_open and seconds < MAX_PERIOD_S:
                return
            seen = CopyTime(self._num_bytes, self._num_calls, seconds)
            is_telling = not self._failed and seconds > 0
            self._begin(now_s)
        if is_telling:
            self._table.copied(seen)


class MeteredNearData:
    """A NearData that tells `table` what its calls took, or that they were lost."""

    def __init__(
        self,
        inner: NearData,
        table: CostTable,
        *,
        load_of: Callable[[ExpertTokens], ExpertLoad],
        clock: Callable[[], float],
    ) -> None:
        self._inner = inner
        self._table = table
        self._load_of = load_of
        self._clock = clock

    def submit(self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]) -> Future[torch.Tensor]:
        """As the inner client."""
        loads = [self._load_of(part) for part in work]
        started_s = self._clock()
        future = self._inner.submit(hidden_TH, work)

        def ended(done: Future[torch.Tensor]) -> None:
            if done.exception() is None:
                self._table.ran_near(loads, self._clock() - started_s)
            else:
                self._table.lost_near()

        future.add_done_callback(ended)
        return future

    @property
    def bytes_moved(self) -> tuple[int, int]:
        return self._inner.bytes_moved

    def close(self) -> None:
        self._inner.close()
