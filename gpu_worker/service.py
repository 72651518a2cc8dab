"""Runs an Engine on a thread of its own and answers requests of one asyncio loop.

Knows text and requests, no Ray and no HTTP. The engine is touched by its thread alone; a request
that its reader leaves is cancelled before the next step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from gpu_worker import failures
from gpu_worker.channel import Channel
from gpu_worker.counters import StepCounters
from gpu_worker.engine import Engine, StepOutput, TokenEvent
from gpu_worker.messages import (
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ModelDescription,
    Piece,
    WorkerStats,
)
from gpu_worker.outage import OutageLog
from gpu_worker.prompt import PromptTooLongError, encode_prompt, longest_token_bytes
from gpu_worker.scheduler import QueueFullError
from gpu_worker.sequence import Sequence

logger = logging.getLogger(__name__)

MAX_STEP_S = 300.0
"""A step that takes longer is taken for hung by `check_health`."""


class EngineService:
    """One engine, many concurrent requests. Owns and closes the engine.

    `clock` gives seconds: how long steps take, whether one hangs, how long compensators were gone.
    """

    def __init__(
        self,
        engine: Engine,
        description: ModelDescription,
        *,
        replica: str = "local",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._description = description
        self._replica = replica
        self._clock = clock
        self._encoding = threading.Lock()
        self._max_prompt_bytes = engine.max_context * longest_token_bytes(engine.tokenizer)
        self._num_requests = 0
        # Shared with the engine's thread, under this lock.
        self._wake = threading.Condition()
        self._arriving: list[tuple[Sequence, Channel]] = []
        self._leaving: list[str] = []
        self._stopped = False
        # Written by the engine's thread alone.
        self._live: dict[str, tuple[Sequence, Channel]] = {}
        self._counters = StepCounters()
        self._finished: Counter[str] = Counter()
        self._degraded_requests = 0
        self._outage = OutageLog(replica, clock)
        self._steps = self._computed_tokens = self._output_tokens = self._governed_tokens = 0
        self._crash: BaseException | None = None
        self._busy_since: float | None = None
        self._busy_s = 0.0
        self._stats = self._snapshot()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def describe(self) -> ModelDescription:
        return self._description

    async def stats(self) -> WorkerStats:
        """As of the end of the last step."""
        return self._stats

    def load(self) -> WorkerStats:
        """`stats` for callers without an event loop."""
        return self._stats

    @property
    def num_arriving(self) -> int:
        """Requests that the engine will be told of before its next step."""
        return len(self._arriving)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The answer's pieces, then exactly one Finished or Failed; nothing is raised for those.

        Leaving the iteration (closing it, or cancelling its task) ends the request in the engine.
        """
        try:
            prompt_ids = await asyncio.to_thread(self._encode, request)
            self._num_requests += 1
            request_id = f"{self._num_requests}:{request.request_id}"
            sequence = Sequence(request_id, prompt_ids, request.params)
        except PromptTooLongError as error:
            failed = failures.invalid(error, "context_length")
            yield failures.for_sender(failed, request)
            return
        except ValueError as error:
            yield failures.for_sender(failures.invalid(error), request)
            return
        channel = Channel()
        self._arrive(sequence, channel)
        ended, version = False, self._description.version
        try:
            while not ended:
                event = await channel.get()
                ended = not isinstance(event, Piece)
                yield self._told(event, request, version)
                version = None  # the first event says it for all
        finally:
            if not ended:
                self._leave(request_id)

    def check_health(self) -> None:
        """Raises RuntimeError when the engine's thread has died or hangs in a step."""
        if self._crash is not None or not self._thread.is_alive():
            raise RuntimeError(f"the engine's thread has died: {self._crash!r}")
        since = self._busy_since
        if since is not None and self._clock() - since > MAX_STEP_S:
            raise RuntimeError(f"a step has been running for more than {MAX_STEP_S:g} s")

    def close(self) -> None:
        """Fail what is live, stop the thread, close the engine. Waits for the step that runs."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def _encode(self, request: GenerateRequest) -> tuple[int, ...]:
        # One at a time: tokenizers are not promised to be thread-safe.
        with self._encoding:
            return encode_prompt(self._engine.tokenizer, request, max_bytes=self._max_prompt_bytes)

    def _told(self, event: Event, request: GenerateRequest, version: str | None) -> Event:
        """The event as this request is told of it."""
        if not isinstance(event, Failed):
            return replace(event, version=version) if version else event
        if event is failures.DIED:
            event = failures.died(request.attempt)
        if event.kind in ("stopped", "unavailable", "internal"):
            told = (request.request_id, request.attempt, event.kind, event.message)
            logger.warning("request %s, attempt %d: %s: %s", *told)
        return failures.for_sender(event, request)

    def _arrive(self, sequence: Sequence, channel: Channel) -> None:
        with self._wake:
            if self._stopped:
                channel.put(failures.stopped())
                return
            self._arriving.append((sequence, channel))
            self._wake.notify()

    def _leave(self, request_id: str) -> None:
        with self._wake:
            self._leaving.append(request_id)
            self._wake.notify()

    # From here on: the engine's thread.

    def _run(self) -> None:
        try:
            while self._next_turn():
                pass
        except BaseException as error:
            logger.exception("the engine's thread dies; its requests fail")
            self._crash = error
        finally:
            with self._wake:
                self._stopped = True
                arriving, self._arriving = self._arriving, []
            live, self._live = self._live, {}
            for _, channel in arriving:
                channel.put(failures.stopped())
            for _, channel in live.values():
                channel.put(failures.stopped() if self._crash is None else failures.DIED)
            self._engine.close()

    def _next_turn(self) -> bool:
        """Let in who came, let out who left, make one step; False when told to stop."""
        with self._wake:
            while not (self._arriving or self._leaving or self._engine.has_work or self._stopped):
                self._wake.wait()
            if self._stopped:
                return False
            arriving, self._arriving = self._arriving, []
            leaving, self._leaving = self._leaving, []
        self._busy_since = self._clock()
        for sequence, channel in arriving:
            self._admit(sequence, channel)
        for request_id in leaving:
            if (event := self._engine.cancel(request_id)) is not None:
                self._deliver(event)
        if self._engine.has_work:
            started_s = self._clock()
            output = self._engine.step()
            self._busy_s += self._clock() - started_s
            self._update(output)
        if not self._engine.has_work:
            self._engine.check_integrity()
        self._busy_since = None
        self._stats = self._snapshot()
        return True

    def _admit(self, sequence: Sequence, channel: Channel) -> None:
        try:
            self._engine.add(sequence)
        except QueueFullError as error:
            channel.put(self._counted(Failed("queue_full", str(error))))
        except ValueError as error:
            wanted = len(sequence.prompt_ids) + (sequence.params.max_tokens or 1)
            too_long = wanted > self._engine.max_context
            failed = failures.invalid(error, "context_length" if too_long else "invalid")
            channel.put(self._counted(failed))
        else:
            self._live[sequence.request_id] = (sequence, channel)

    def _update(self, output: StepOutput) -> None:
        self._counters += output.counters
        self._steps += 1
        self._computed_tokens += output.num_tokens
        self._governed_tokens += output.governed_tokens
        self._outage.stepped(output.counters.degraded_pairs)
        # Before the events: who has seen an answer's end finds it counted.
        self._stats = self._snapshot()
        for event in output.events:
            self._deliver(event)

    def _deliver(self, event: TokenEvent) -> None:
        sequence, channel = self._live[event.request_id]
        self._output_tokens += event.token_id is not None
        if event.text:
            channel.put(Piece(event.text, event.degraded))
        if event.finish_reason is None:
            return
        del self._live[event.request_id]
        if event.error is not None:
            channel.put(self._counted(failures.of_engine(event.error)))
            return
        self._finished[event.finish_reason] += 1
        self._degraded_requests += event.degraded
        self._stats = self._snapshot()
        channel.put(
            Finished(
                event.finish_reason,
                len(sequence.prompt_ids),
                event.num_output_tokens,
                event.degraded,
                event.quality,
            )
        )

    def _counted(self, failed: Failed) -> Failed:
        self._finished[failed.kind] += 1
        self._stats = self._snapshot()
        return failed

    def _snapshot(self) -> WorkerStats:
        scheduler, governor = self._engine.scheduler, self._engine.governor
        return WorkerStats(
            replica=self._replica,
            running_sequences=scheduler.num_running,
            waiting_sequences=scheduler.num_waiting,
            waiting_tokens=scheduler.num_waiting_tokens,
            steps=self._steps,
            computed_tokens=self._computed_tokens,
            output_tokens=self._output_tokens,
            counters=self._counters.as_dict(),
            finished=dict(self._finished),
            governed_tokens=self._governed_tokens,
            knobs={} if governor is None else governor.knobs,
            degraded_requests=self._degraded_requests,
            version=self._description.version,
            busy_s=self._busy_s,
        )
