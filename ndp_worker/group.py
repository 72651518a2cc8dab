"""Several near-data workers as one: each expert goes to a worker that holds it, or to the next
one when that is lost.

Owns the splitting and the joining of batches. Knows no transport.

Legend: T tokens, P (expert, token) pairs, H hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from expert_store.errors import ExpertUnavailableError, StoreError
from expert_store.types import ExpertKey, ExpertOutputs, ExpertTokens


class Worker(Protocol):
    """One worker: an `NdpClient`."""

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]: ...

    @property
    def bytes_moved(self) -> tuple[int, int]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Member:
    """A worker and the experts it holds; `keys` None means every expert of the store."""

    worker: Worker
    keys: frozenset[ExpertKey] | None = None

    def holds(self, key: ExpertKey) -> bool:
        return self.keys is None or key in self.keys


class NearDataGroup:
    """Sends each expert of a batch to one of the workers that hold it; load spreads by expert.

    A worker that has lost an expert's compensator runs its restored tokens no more if another can.
    Closing it closes the workers. Raises ValueError without members.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        if not members:
            raise ValueError("members: got none, expected at least one near-data worker")
        self._members = tuple(members)
        self._degrading: set[tuple[int, ExpertKey]] = set()  # member, whose factors it has lost

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes (sent, received) of all workers together."""
        moved = [member.worker.bytes_moved for member in self._members]
        return sum(sent for sent, _ in moved), sum(received for _, received in moved)

    @property
    def num_workers(self) -> int:
        """Workers, whether they hold all experts or some."""
        return len(self._members)

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        """As `NdpClient.submit`; the future fails when no worker is left for some expert."""
        return _GroupCall(self._members, self._degrading, hidden_TH, tuple(work)).start()

    def close(self) -> None:
        for member in self._members:
            member.worker.close()


class _GroupCall:
    """One batch over several workers: what came, who is out, the future of the whole."""

    def __init__(
        self,
        members: tuple[Member, ...],
        degrading: set[tuple[int, ExpertKey]],
        hidden_TH: torch.Tensor,
        work: tuple[ExpertTokens, ...],
    ) -> None:
        self._members = members
        self._degrading = degrading
        self._hidden_TH = hidden_TH
        self._work = work
        self._parts: list[torch.Tensor | None] = [None] * len(work)
        self._degraded: set[int] = set()
        self._lost: set[int] = set()
        self._future: Future[ExpertOutputs] = Future()
        self._future.set_running_or_notify_cancel()
        self._lock = threading.Lock()

    def start(self) -> Future[ExpertOutputs]:
        if not self._work:
            empty = self._hidden_TH.new_empty(0, self._hidden_TH.shape[-1], device="cpu")
            self._future.set_result(ExpertOutputs(empty))
            return self._future
        try:
            self._send(range(len(self._work)))
        except StoreError as error:
            self._fail(error)
        return self._future

    def _send(self, items: Sequence[int]) -> None:
        batches: dict[int, list[int]] = {}
        for item in items:
            batches.setdefault(self._choose(self._work[item]), []).append(item)
        for member, batch in batches.items():
            part = self._members[member].worker.submit(
                self._hidden_TH, [self._work[item] for item in batch]
            )
            part.add_done_callback(partial(self._receive, member, batch))

    def _choose(self, item: ExpertTokens) -> int:
        key = item.key
        holders = [i for i, member in enumerate(self._members) if member.holds(key)]
        alive = [i for i in holders if i not in self._lost]
        if not alive:
            raise ExpertUnavailableError(
                f"no near-data worker is left for {key}: {len(holders)} of {len(self._members)} "
                "hold it and none answered"
            )
        if item.restored:
            alive = [i for i in alive if (i, key) not in self._degrading] or alive
        return alive[(key.layer + key.expert) % len(alive)]

    def _receive(self, member: int, batch: list[int], done: Future[ExpertOutputs]) -> None:
        error = done.exception()
        try:
            if error is None:
                self._join(member, batch, done.result())
            elif isinstance(error, StoreError):
                with self._lock:
                    self._lost.add(member)
                self._send(batch)
            else:
                self._fail(error)
        except Exception as failure:  # noqa: BLE001 - raised again on the thread that waits
            failure.__cause__ = error
            self._fail(failure)

    def _join(self, member: int, batch: list[int], outputs: ExpertOutputs) -> None:
        counts = [len(self._work[item].token_rows) for item in batch]
        degraded = [batch[place] for place in outputs.degraded]
        with self._lock:
            for item, part in zip(batch, outputs.output_PH.split(counts), strict=True):
                self._parts[item] = part
            self._degraded.update(degraded)
            self._degrading.update((member, self._work[item].key) for item in degraded)
            parts = [part for part in self._parts if part is not None]
            is_whole = len(parts) == len(self._parts) and not self._future.done()
        if is_whole:
            self._future.set_result(ExpertOutputs(torch.cat(parts), tuple(sorted(self._degraded))))

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if not self._future.done():
                self._future.set_exception(error)
