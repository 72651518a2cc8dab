"""A link of so many bytes per second in one process: records and activations wait for it.

What a validation of the plan runs over: it bounds what the machine's own memory would not.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch

from expert_store.segment import Segment
from expert_store.types import ExpertOutputs, ExpertTokens, Manifest, RecordRequest
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpClient, NdpServer

CALL_S = 5e-4
"""A request and its answer over the bounded link, without their bytes."""
UNBOUNDED = 1e18
"""Bytes per second of a link that takes no time."""


class BoundedLink:
    """So many bytes per second, first come, first served; who waits sleeps."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def carry(self, num_bytes: float, delay_s: float) -> None:
        """Returns when they are over: `delay_s` of waiting besides, half of it before."""
        with self._lock:
            begin_s = max(time.monotonic() + delay_s / 2, self._free_s)
            self._free_s = begin_s + num_bytes / self._bytes_per_s
            end_s = self._free_s + delay_s / 2
        time.sleep(max(0.0, end_s - time.monotonic()))


class BoundedSource:
    """A segment behind a link."""

    tier = "bounded link"

    def __init__(self, inner: Segment, link: BoundedLink) -> None:
        self._inner, self._link = inner, link

    @property
    def manifest(self) -> Manifest:
        return self._inner.manifest

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        datas = self._inner.fetch(requests)
        self._link.carry(sum(data.numel() for data in datas), CALL_S)
        return datas

    def close(self) -> None:
        """The segment is its owner's."""


class BoundedNearData:
    """A near-data client whose activations cross a link: there on one way, back on the records'."""

    def __init__(self, inner: NdpClient, there: BoundedLink, back: BoundedLink) -> None:
        self._inner, self._there, self._back = inner, there, back
        self._pool = ThreadPoolExecutor(4)

    @property
    def bytes_moved(self) -> tuple[int, int]:
        return self._inner.bytes_moved

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        return self._pool.submit(self._run, hidden_TH, tuple(work))

    def _run(self, hidden_TH: torch.Tensor, work: tuple[ExpertTokens, ...]) -> ExpertOutputs:
        self._there.carry(hidden_TH.numel() * hidden_TH.itemsize, CALL_S / 2)
        outputs = self._inner.submit(hidden_TH, work).result()
        self._back.carry(outputs.output_PH.numel() * hidden_TH.itemsize, CALL_S / 2)
        return outputs

    def close(self) -> None:
        self._pool.shutdown()


@dataclass(frozen=True, slots=True)
class Tier:
    """Where a run's experts come from."""

    source: BoundedSource
    near_data: BoundedNearData


@contextmanager
def tier_over(segment: Segment, bytes_per_s: float) -> Iterator[Tier]:
    """A source and a near-data worker behind one link."""
    there, back = BoundedLink(bytes_per_s), BoundedLink(bytes_per_s)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moetier-"))
        server = NdpServer(Executor(segment), [f"unix:{folder}/near"])
        stack.enter_context(closing(server))
        version = segment.manifest.version
        client = NdpClient(server.addresses, version=version, deadline_s=60.0)
        stack.enter_context(closing(client))
        near_data = BoundedNearData(client, there, back)
        stack.enter_context(closing(near_data))
        yield Tier(BoundedSource(segment, back), near_data)
