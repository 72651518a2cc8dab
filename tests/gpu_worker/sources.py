"""Sources and near-data workers for the GPU worker's tests: they count, fail, shuffle, or compute.

All wrap a Segment over a store made by hand, so records are real; nothing sleeps.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from expert_store.errors import ExpertUnavailableError, StoreError
from expert_store.types import ExpertKey, ExpertOutputs, ExpertTokens, Manifest, RecordRequest
from gpu_worker.protocols import ExpertSource
from gpu_worker.record_sizes import PlannedCopy
from gpu_worker.streamer import Stream, Streamer
from kernels import ops
from ndp_worker.executor import Executor


class CountingSource:
    """Passes reads on, counts their bytes by kind, and keeps every call."""

    def __init__(self, inner: ExpertSource) -> None:
        self.inner = inner
        self.calls: list[tuple[RecordRequest, ...]] = []
        self.bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        return self.inner.manifest

    @property
    def tier(self) -> str:
        return "test"

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        with self._lock:
            self.calls.append(tuple(requests))
        self.before(requests)
        datas = self.inner.fetch(requests)
        with self._lock:
            for request, data in zip(requests, datas, strict=True):
                self.bytes[request.kind] += data.numel()
        return datas

    def before(self, requests: Sequence[RecordRequest]) -> None:
        """What a subclass does to a read before it happens."""

    def close(self) -> None:
        self.inner.close()


class LossySource(CountingSource):
    """Has lost some records for good."""

    def __init__(self, inner: ExpertSource, lost: Sequence[RecordRequest]) -> None:
        super().__init__(inner)
        self.lost = set(lost)

    def before(self, requests: Sequence[RecordRequest]) -> None:
        gone = [request for request in requests if request in self.lost]
        if gone:
            raise ExpertUnavailableError(f"{gone[0].kind} of {gone[0].key}: no copy (test)")


class FailingSource(CountingSource):
    """Fails its n-th call, counted from 0, and no other."""

    def __init__(self, inner: ExpertSource, fail_call: int, error: Exception) -> None:
        super().__init__(inner)
        self._fail_call = fail_call
        self._error = error
        self._num_calls = 0
        self.failed = False

    def before(self, requests: Sequence[RecordRequest]) -> None:
        with self._lock:
            mine, self._num_calls = self._num_calls, self._num_calls + 1
        if mine == self._fail_call:
            self.failed = True
            raise self._error


class ShuffledSource(CountingSource):
    """Lets the fetches of each `start` end in a seeded random order, whatever order they began in.

    Needs one fetch per expert and a thread for each of them.
    """

    def __init__(self, inner: ExpertSource, seed: int) -> None:
        super().__init__(inner)
        self._random = random.Random(seed)
        self._turn: dict[ExpertKey, tuple[threading.Event, threading.Event]] = {}
        self.landed: list[ExpertKey] = []

    def attach(self, streamer: Streamer) -> None:
        """Learn of each batch of copies before the streamer starts it."""
        start = streamer.start

        def shuffled(copies: Sequence[PlannedCopy]) -> Stream:
            keys = list(dict.fromkeys(copy.request.key for copy in copies))
            self._random.shuffle(keys)
            done = [threading.Event() for _ in range(len(keys) + 1)]
            done[0].set()
            self._turn = {key: (done[i], done[i + 1]) for i, key in enumerate(keys)}
            return start(copies)

        streamer.start = shuffled  # type: ignore[method-assign]

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        (key,) = {request.key for request in requests}
        before, mine = self._turn[key]
        assert before.wait(timeout=30), f"{key} waited for a fetch that never came"
        datas = super().fetch(requests)
        self.landed.append(key)
        mine.set()
        return datas


class InProcessNearData:
    """A near-data worker's executor in the own process; counts bytes as a wire would."""

    def __init__(self, source: ExpertSource, backend: ops.Backend = "cpu_int8") -> None:
        self._executor = Executor(source, backend=backend)
        self._sent = self._received = 0
        self.num_pairs = 0
        self.error: StoreError | None = None

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        future: Future[ExpertOutputs] = Future()
        if self.error is not None:
            future.set_exception(self.error)
            return future
        outputs = self._executor.run(hidden_TH, work)
        output_PH = outputs.output_PH
        self.num_pairs += output_PH.shape[0]
        self._sent += hidden_TH.numel() * hidden_TH.element_size()
        self._received += output_PH.numel() * output_PH.element_size()
        future.set_result(outputs)
        return future

    @property
    def bytes_moved(self) -> tuple[int, int]:
        return self._sent, self._received

    def close(self) -> None:
        """Nothing is open."""
