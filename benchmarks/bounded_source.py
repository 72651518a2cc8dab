"""A source behind a link of so many bytes a second, which can be changed while it runs.

Real time: a fetch sleeps until its bytes would have come, one after the other whoever asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from expert_store.types import Manifest, RecordRequest
from gpu_worker.protocols import ExpertSource


class BoundedSource:
    """An ExpertSource as `inner`, but no faster than `bytes_per_s`, and `call_s` more a fetch."""

    def __init__(self, inner: ExpertSource, *, bytes_per_s: float, call_s: float) -> None:
        self._inner = inner
        self._call_s = call_s
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    @property
    def manifest(self) -> Manifest:
        return self._inner.manifest

    @property
    def tier(self) -> str:
        return self._inner.tier

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        asked_s = time.monotonic()
        datas = self._inner.fetch(requests)
        num_bytes = sum(data.numel() for data in datas)
        with self._lock:
            begins_s = max(asked_s, self._free_at_s)
            self._free_at_s = begins_s + num_bytes / self.bytes_per_s
            comes_s = self._free_at_s + self._call_s
        time.sleep(max(0.0, comes_s - time.monotonic()))
        return datas

    def close(self) -> None:
        self._inner.close()
