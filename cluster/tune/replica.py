"""One GPU worker in simulated time: the scheduler's rules, with fitted times for its steps.

As `gpu_worker/scheduler.py`: slots, prompts in chunks one at a time, a decode step between chunks.
Decode steps that change nothing are taken many at once, so that a trace of hours runs in seconds;
a test compares it with the scheduler itself, step by step.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

from cluster.autoscaling_rules import ServiceTimes, Worker
from cluster.tune.trace import Request


@dataclass(slots=True)
class Served:
    """What became of one request; times in seconds of the trace, None where it did not happen."""

    request: Request
    first_s: float | None = None
    end_s: float | None = None
    lost: bool = False  # refused, or cut by a worker that ended

    @property
    def ttft_s(self) -> float:
        return math.inf if self.first_s is None else self.first_s - self.request.arrival_s

    @property
    def per_token_s(self) -> float:
        """Mean seconds between its tokens after the first; 0 where there was only that."""
        if self.first_s is None or self.end_s is None:
            return math.inf
        later = self.request.answer_tokens - 1
        return (self.end_s - self.first_s) / later if later else 0.0


class Replica:
    """A worker from `ready_s` on. `advance` moves it in time; nothing else does.

    Public counts are what the real worker reports: sequences, tokens, and totals since its start.
    """

    def __init__(self, name: int, ready_s: float, service: ServiceTimes, worker: Worker) -> None:
        self.name = name
        self.ready_s = ready_s
        self.is_draining = False
        self.steps = self.prompt_tokens = self.answer_tokens = self.accepted = 0
        self.busy_s = 0.0
        self.waiting_tokens = 0
        self._service = service
        self._worker = worker
        self._waiting: deque[Served] = deque()
        self._prefill: deque[Served] = deque()
        self._left: dict[int, int] = {}  # prompt tokens that are due, by id of Served
        self._running: list[tuple[int, int, Served]] = []  # heap by the decode step that ends it
        self._decoded = 0  # decode steps so far
        self._begun = 0  # sequences that came to run; keeps the heap's order among equals
        self._last_was_prefill = False
        self._step_end_s: float | None = None  # of the step that runs
        self._step_tokens: int | None = None  # of its prompt chunk; None is a decode step
        self._step_s = 0.0

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._prefill) + len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_ongoing(self) -> int:
        return self.num_running + self.num_waiting

    def accept(self, served: Served, now_s: float) -> None:
        """A request comes. The caller has advanced this replica to `now_s`."""
        self.accepted += 1
        self._waiting.append(served)
        self._left[id(served)] = served.request.prompt_tokens
        self.waiting_tokens += served.request.prompt_tokens
        if self._step_end_s is None:
            self._begin(now_s)

    def advance(self, now_s: float) -> None:
        """Let all steps end that end by `now_s`."""
        while self._step_end_s is not None and self._step_end_s <= now_s:
            self._end_steps(now_s)

    def abandon(self) -> list[Served]:
        """End now; those that were here are lost."""
        left = [*self._waiting, *self._prefill, *(served for _, _, served in self._running)]
        for served in left:
            served.lost = True
        self._waiting.clear()
        self._prefill.clear()
        self._running.clear()
        self._left.clear()
        self.waiting_tokens, self._step_end_s = 0, None
        return left

    def _begin(self, now_s: float) -> None:
        """Start the next step, if there is something to do: `Scheduler.schedule`."""
        while self._waiting and self.num_running < self._worker.slots:
            self._prefill.append(self._waiting.popleft())
        prefill_now = bool(self._prefill) and not (self._last_was_prefill and self._running)
        self._last_was_prefill = prefill_now
        if prefill_now:
            left = self._left[id(self._prefill[0])]
            self._step_tokens = min(left, self._worker.prefill_chunk)
            self._step_s = self._service.prefill_s(self._step_tokens)
        elif self._running:
            self._step_tokens = None
            self._step_s = self._service.decode_s(len(self._running))
        else:
            self._step_end_s = None
            return
        self._step_end_s = now_s + self._step_s

    def _end_steps(self, until_s: float) -> None:
        """End the step that runs, and those after it that are like it and end by `until_s`."""
        end_s = self._step_end_s
        assert end_s is not None
        num = 1
        if self._step_tokens is None:
            free = len(self._running) < self._worker.slots
            if not self._prefill and not (self._waiting and free):
                alike = self._running[0][0] - self._decoded
                # A breath more, so that rounding does not make an end of the last one be missed.
                num = max(1, min(alike, 1 + int((until_s - end_s) / self._step_s + 1e-9)))
                end_s += (num - 1) * self._step_s
            self._decoded += num
            self.answer_tokens += num * len(self._running)
            while self._running and self._running[0][0] <= self._decoded:
                heapq.heappop(self._running)[2].end_s = end_s
        else:
            self._computed(self._step_tokens, end_s)
        self.steps += num
        self.busy_s += num * self._step_s
        self._begin(end_s)

    def _computed(self, num_tokens: int, end_s: float) -> None:
        """A chunk of the first prompt is done; with the last one comes the first token."""
        head = self._prefill[0]
        self._left[id(head)] -= num_tokens
        self.prompt_tokens += num_tokens
        self.waiting_tokens -= num_tokens
        if self._left[id(head)]:
            return
        del self._left[id(head)]
        self._prefill.popleft()
        head.first_s = end_s
        self.answer_tokens += 1
        if head.request.answer_tokens == 1:
            head.end_s = end_s
            return
        last = self._decoded + head.request.answer_tokens - 1
        self._begun += 1
        heapq.heappush(self._running, (last, self._begun, head))
