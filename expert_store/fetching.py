"""One fetch over several copies: calls under way, hedges, failover, a deadline; first answer wins.

Knows no transport: who asks a copy, the clock and the listing of copies are passed in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from expert_store.errors import (
    CorruptRecordError,
    ExpertUnavailableError,
    StoreError,
    without_frames,
)
from expert_store.failover import Attempts, Batch, Copy
from expert_store.health import CopyHealth

RETRY_PAUSE_S = 0.1
"""Between two rounds over all copies, when none of them answered."""


class CopyLostError(ExpertUnavailableError):
    """A copy did not answer; unlike one that answers that it does not have the record."""


class Call:
    """One call under way. Who asks hands `on_cancel` what ends it early."""

    def __init__(self, batch: Batch, began_s: float, *, is_hedge: bool) -> None:
        self.batch, self.began_s, self.is_hedge = batch, began_s, is_hedge
        self.is_cancelled = False
        self._cancel: Callable[[], object] | None = None
        self._lock = threading.Lock()

    def on_cancel(self, cancel: Callable[[], object]) -> None:
        with self._lock:
            self._cancel = cancel
            is_late = self.is_cancelled
        if is_late:
            cancel()

    def cancel(self) -> None:
        with self._lock:
            self.is_cancelled = True
            cancel = self._cancel
        if cancel is not None:
            cancel()


Ask = Callable[[Call, float], list[torch.Tensor]]
"""Asks one copy within so many seconds. Raises CorruptRecordError or ExpertUnavailableError when
the copy refuses, CopyLostError when it does not answer."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    call: Call
    records: list[torch.Tensor] | None
    error: BaseException | None


class Fetch:
    """Runs one fetch to its end, on the calling thread; calls to copies are on `pool`'s.

    `copies(refresh)` lists the copies, anew when told so; `is_closed` says whether the source was.
    """

    def __init__(
        self,
        attempts: Attempts,
        copies: Callable[[bool], Sequence[Copy]],
        ask: Ask,
        *,
        health: CopyHealth,
        pool: Executor,
        clock: Callable[[], float],
        is_closed: Callable[[], bool],
    ) -> None:
        self._attempts, self._copies, self._ask = attempts, copies, ask
        self._health, self._pool = health, pool
        self._clock, self._is_closed = clock, is_closed
        self._under_way: list[Call] = []
        self._hung: set[Call] = set()
        self._hedged: set[Call] = set()
        self._outcomes: SimpleQueue[_Outcome] = SimpleQueue()

    def run(self, deadline_s: float) -> list[torch.Tensor]:
        """The records. Raises CorruptRecordError or ExpertUnavailableError."""
        deadline = self._clock() + deadline_s
        refresh = False
        try:
            while (results := self._attempts.results) is None:
                if self._is_closed():
                    raise ExpertUnavailableError("the source was closed while a fetch was waiting")
                if self._clock() >= deadline:
                    raise self._attempts.failure(deadline_s)
                self._start(self._attempts.plan(self._copies(refresh)), deadline)
                refresh = not self._under_way
                found = self._wait(min(deadline, self._next_check()))
                if found is not None:
                    self._take(found)
                elif not self._under_way:
                    self._attempts.forgive()
                self._check_late(deadline)
            return results
        finally:
            for call in self._under_way:
                call.cancel()

    def _start(self, batches: Sequence[Batch], deadline: float, *, is_hedge: bool = False) -> None:
        left_s = max(0.001, deadline - self._clock())
        for batch in batches:
            call = Call(batch, self._clock(), is_hedge=is_hedge)
            self._health.count("calls")
            self._attempts.began(batch)
            self._under_way.append(call)
            if len(batches) == 1 and len(self._under_way) == 1 and batch.is_only_hope:
                self._run(call, left_s)  # nothing else can happen meanwhile: save the thread
                continue
            try:
                self._pool.submit(self._run, call, left_s)
            except RuntimeError as error:  # the pool's own word for its source being closed
                raise ExpertUnavailableError("the source is closed") from error

    def _run(self, call: Call, left_s: float) -> None:
        try:
            self._outcomes.put(_Outcome(call, self._ask(call, left_s), None))
        except StoreError as error:
            # Kept by this fetch, which its frames keep: a circle around all records of the fetch.
            self._outcomes.put(_Outcome(call, None, without_frames(error)))
        except BaseException as error:  # noqa: BLE001 - raised again on the thread that waits
            self._outcomes.put(_Outcome(call, None, error))

    def _wait(self, until: float) -> _Outcome | None:
        try:
            return self._outcomes.get(timeout=max(0.0, until - self._clock()))
        except Empty:
            return None

    def _next_check(self) -> float:
        """When some call becomes late, or what has no copy is looked for again."""
        times = [self._clock() + RETRY_PAUSE_S]
        for call in self._under_way:
            for seen, after_s in (
                (self._hedged, self._health.hedge_after_s),
                (self._hung, lambda _, size: self._health.hang_after_s(size)),
            ):
                if call not in seen:
                    times.append(call.began_s + after_s(call.batch.address, call.batch.num_bytes))
        return min(times)

    def _take(self, found: _Outcome) -> None:
        call, batch, error = found.call, found.call.batch, found.error
        if call not in self._under_way:
            return  # it was cancelled: another copy was quicker
        self._under_way.remove(call)
        self._attempts.ended(batch)
        if isinstance(error, CopyLostError):
            self._attempts.lost(batch, error)
            self._health.failed(batch.address)
            self._health.count("failed_over")
        elif isinstance(error, CorruptRecordError | ExpertUnavailableError):
            self._attempts.refused(batch, error)
            self._health.count("failed_over")
            if isinstance(error, CorruptRecordError):
                self._health.count("corrupt")
        elif error is not None:
            raise error
        else:
            assert found.records is not None, "an outcome has records or an error"
            self._health.answered(batch.address, batch.num_bytes, self._age_s(call))
            self._attempts.answered(batch, found.records)
            self._overtake(call)

    def _overtake(self, winner: Call) -> None:
        """End the calls whose records are all here now."""
        for call in [c for c in self._under_way if not self._attempts.is_needed(c.batch)]:
            self._under_way.remove(call)
            self._attempts.ended(call.batch)
            call.cancel()
            if winner.is_hedge and not call.is_hedge:
                self._health.count("hedges_won")
                if call not in self._hung:  # else it rests already
                    size = call.batch.num_bytes
                    self._health.overtaken(call.batch.address, size, self._age_s(call))

    def _check_late(self, deadline: float) -> None:
        for call in list(self._under_way):
            address, size, age_s = call.batch.address, call.batch.num_bytes, self._age_s(call)
            is_hung = age_s >= self._health.hang_after_s(size) and call not in self._hung
            is_late = age_s >= self._health.hedge_after_s(address, size)
            if not (is_hung or (is_late and call not in self._hedged)):
                continue
            first_time = call not in self._hedged
            self._hedged.add(call)
            if is_hung:
                self._hung.add(call)
            others = self._attempts.plan_besides(call.batch, self._copies(False))
            if not others or not (is_hung or (first_time and self._health.may_hedge())):
                continue
            self._health.count("hung" if is_hung else "hedged")
            if is_hung:
                self._health.failed(address)
            self._start(others, deadline, is_hedge=True)

    def _age_s(self, call: Call) -> float:
        return self._clock() - call.began_s


def lost(error: object) -> CopyLostError:
    """The error of a copy that did not answer, with the transport's words."""
    return CopyLostError(str(error))
