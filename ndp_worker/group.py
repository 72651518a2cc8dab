"""Several near-data workers as one: each expert goes to a worker that holds it, or to the next
one when that is lost or late.

Owns the splitting and the joining of batches, and asks a second worker where the first is late.
Calls are idempotent (`Executor.run` is pure), so that asking two, or again, is safe: of each expert
the first answer is taken and counted, others are dropped. Knows no transport.

Legend: T tokens, P (expert, token) pairs, H hidden.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from expert_store.errors import (
    CorruptRecordError,
    ExpertUnavailableError,
    StoreError,
    without_frames,
)
from expert_store.types import ExpertKey, ExpertOutputs, ExpertTokens
from ndp_worker.health import NearDataStatistics, WorkerHealth
from ndp_worker.timers import Later, Timers


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
    """Sends each expert of a batch to one of the workers that hold it; load spreads by expert
    and by `client`, the asker's number: not every client asks the same worker for a hot expert.

    A worker that failed or hung is left alone for a while, doubled each time, and one that has lost
    an expert's compensator is not asked to restore it for a while, if another can. Closing it
    closes the workers. Raises ValueError without members.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        clock: Callable[[], float] = time.monotonic,
        later: Later | None = None,
        client: int = 0,
    ) -> None:
        if not members:
            raise ValueError("members: got none, expected at least one near-data worker")
        self._members = tuple(members)
        self._health = WorkerHealth(clock, client)
        self._later = later or Timers()

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes (sent, received) of all workers together."""
        moved = [member.worker.bytes_moved for member in self._members]
        return sum(sent for sent, _ in moved), sum(received for _, received in moved)

    @property
    def num_workers(self) -> int:
        """Workers, whether they hold all experts or some."""
        return len(self._members)

    @property
    def statistics(self) -> NearDataStatistics:
        return self._health.statistics

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        """As `NdpClient.submit`; the future fails when no worker is left for some expert."""
        call = _GroupCall(self._members, self._health, self._later, hidden_TH, tuple(work))
        return call.start()

    def close(self) -> None:
        for member in self._members:
            member.worker.close()


@dataclass(frozen=True, slots=True, eq=False)
class _Ask:
    """One call to one worker, for some items of the batch."""

    member: int
    items: tuple[int, ...]
    num_pairs: int
    began_s: float


class _GroupCall:
    """One batch over several workers: what came, who is out, the future of the whole."""

    def __init__(
        self,
        members: tuple[Member, ...],
        health: WorkerHealth,
        later: Later,
        hidden_TH: torch.Tensor,
        work: tuple[ExpertTokens, ...],
    ) -> None:
        self._members = members
        self._health = health
        self._later = later
        self._hidden_TH = hidden_TH
        self._work = work
        self._parts: list[torch.Tensor | None] = [None] * len(work)
        self._degraded: set[int] = set()
        self._lost: set[int] = set()
        self._under_way: set[_Ask] = set()
        self._future: Future[ExpertOutputs] = Future()
        self._future.set_running_or_notify_cancel()
        self._is_over = False  # the future has got, or is getting, its outcome
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

    def _send(self, items: Sequence[int], *, besides: frozenset[int] = frozenset()) -> None:
        """Ask for items, of other workers than `besides`. Raises when there is none for some."""
        batches: dict[int, list[int]] = {}
        for item in items:
            batches.setdefault(self._choose(self._work[item], besides), []).append(item)
        for member, batch in batches.items():
            self._health.count("calls")
            num_pairs = sum(len(self._work[item].token_rows) for item in batch)
            ask = _Ask(member, tuple(batch), num_pairs, self._health.clock())
            with self._lock:
                self._under_way.add(ask)
            part = self._members[member].worker.submit(
                self._hidden_TH, [self._work[item] for item in batch]
            )
            part.add_done_callback(partial(self._receive, ask))
            if not part.done():
                hedge_s = self._health.hedge_after_s(member, num_pairs)
                if not besides and hedge_s < self._health.hang_after_s(num_pairs):
                    self._later(hedge_s, _weakly(self._hedge, ask))
                self._later(self._health.hang_after_s(num_pairs), _weakly(self._give_up, ask))

    def _choose(self, item: ExpertTokens, besides: frozenset[int] = frozenset()) -> int:
        key, health = item.key, self._health
        holders = [i for i, member in enumerate(self._members) if member.holds(key)]
        alive = [i for i in holders if i not in self._lost and i not in besides]
        # One that rests is not even tried last: its experts are streamed sooner than it fails.
        alive = [i for i in alive if not health.latencies.is_resting(i)]
        if not alive:
            raise ExpertUnavailableError(
                f"no near-data worker is left for {key}: {len(holders)} of {len(self._members)} "
                "hold it and none answered"
            )
        if item.restored:
            alive = [i for i in alive if health.can_restore(i, key)] or alive
        alive = health.latencies.best(alive, len(item.token_rows))
        return alive[(key.layer + key.expert + health.client) % len(alive)]

    def _hedge(self, ask: _Ask) -> None:
        """The worker takes longer than usual: ask others too, if that is not done too often."""
        with self._lock:
            is_late = ask in self._under_way and not self._is_over
        if not is_late:
            return
        try:
            for item in ask.items:
                self._choose(self._work[item], frozenset({ask.member}))
            if self._health.extra.spend():
                self._health.count("hedged")
                self._send(ask.items, besides=frozenset({ask.member}))
        except StoreError:
            return  # nobody else holds all of them: wait on

    def _give_up(self, ask: _Ask) -> None:
        """The worker hangs: go on without it."""
        with self._lock:
            is_late = ask in self._under_way and not self._is_over
            self._under_way.discard(ask)
        if not is_late:
            return
        waited_s = self._health.clock() - ask.began_s
        self._health.count("hung")
        try:
            self._lose(
                ask, ExpertUnavailableError(f"no answer for {waited_s:.3g} s: the worker hangs")
            )
        except StoreError as error:
            self._fail(error)

    def _lose(self, ask: _Ask, error: StoreError) -> None:
        """Ask others for what is still missing. Raises with the cause when there is nobody."""
        if not isinstance(error, CorruptRecordError):  # of one expert: the others are sound
            self._health.latencies.failed(ask.member)
        with self._lock:
            self._lost.add(ask.member)
            covered = {item for other in self._under_way for item in other.items}
            missing = [i for i in ask.items if self._parts[i] is None and i not in covered]
        if missing:
            try:
                self._send(missing)
            except StoreError as failure:
                raise failure from error
            self._health.count("failed_over")

    def _receive(self, ask: _Ask, done: Future[ExpertOutputs]) -> None:
        error = done.exception()
        with self._lock:
            is_expected = ask in self._under_way
            self._under_way.discard(ask)
        try:
            if error is None:
                self._time(ask)
                self._join(ask, done.result())
            elif self._is_over or not is_expected:
                return
            elif isinstance(error, StoreError):
                self._lose(ask, error)
            else:
                self._fail(error)
        except Exception as failure:  # noqa: BLE001 - raised again on the thread that waits
            failure.__cause__ = failure.__cause__ or error
            self._fail(failure)

    def _time(self, ask: _Ask) -> None:
        self._health.extra.earn()
        seconds = self._health.clock() - ask.began_s
        self._health.latencies.answered(ask.member, ask.num_pairs, seconds)

    def _join(self, ask: _Ask, outputs: ExpertOutputs) -> None:
        counts = [len(self._work[item].token_rows) for item in ask.items]
        degraded = {ask.items[place] for place in outputs.degraded}
        if degraded:
            self._health.degraded(ask.member, [self._work[item].key for item in sorted(degraded)])
        with self._lock:
            for item, part in zip(ask.items, outputs.output_PH.split(counts), strict=True):
                if self._parts[item] is None:  # else the other of two workers was first
                    self._parts[item] = part
                    if item in degraded:
                        self._degraded.add(item)
                        self._health.count("degraded")
            parts = [part for part in self._parts if part is not None]
            is_whole = len(parts) == len(self._parts) and not self._is_over
            self._is_over = self._is_over or is_whole
        if is_whole:
            self._future.set_result(ExpertOutputs(torch.cat(parts), tuple(sorted(self._degraded))))

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            is_first, self._is_over = not self._is_over, True
        if is_first:
            # Frames would keep this call, which keeps the error, and so activations in a circle.
            is_known = isinstance(error, StoreError)
            self._future.set_exception(without_frames(error) if is_known else error)


def _weakly(method: Callable[[_Ask], None], ask: _Ask) -> Callable[[], None]:
    """Calls the method unless its call is over and gone: a time-out shall not keep activations."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive(ask)

    return call
