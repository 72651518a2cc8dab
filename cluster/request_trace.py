"""Records when requests came and how long they were, for `moetier tune`: never what they said.

A layer over whatever answers requests; a line of JSON for each that was answered whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

from gpu_worker.messages import Event, Finished, GenerateRequest, ModelDescription

logger = logging.getLogger(__name__)

MAX_BYTES = 256 << 20
"""Of one file, about two million requests; then recording ends and serving goes on."""


class Answering(Protocol):
    """Whoever answers requests."""

    async def describe(self) -> ModelDescription: ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]: ...


class RecordingWorker:
    """Passes everything on, and writes `folder`/requests-REPLICA.jsonl beside it.

    A line has arrival_s (seconds since 1970), prompt_tokens, answer_tokens, ttft_s, seconds. What
    was refused or failed leaves none. A file that cannot be written ends recording, nothing else.
    """

    def __init__(
        self,
        worker: Answering,
        folder: Path,
        replica: str,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._worker = worker
        self._path = folder / f"requests-{re.sub(r'[^A-Za-z0-9_.-]', '-', replica)}.jsonl"
        self._clock = clock
        self._num_bytes = 0
        self._is_recording = True

    async def describe(self) -> ModelDescription:
        return await self._worker.describe()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """As the worker's own."""
        arrival_s = self._clock()
        first_s: float | None = None
        events: Any = self._worker.generate(request)
        async with contextlib.aclosing(events):
            async for event in events:
                now_s = self._clock()
                first_s = now_s if first_s is None else first_s
                if isinstance(event, Finished):
                    self._write(arrival_s, first_s - arrival_s, now_s - arrival_s, event)
                yield event

    def _write(self, arrival_s: float, ttft_s: float, seconds: float, event: Finished) -> None:
        if not self._is_recording:
            return
        fields = {
            "arrival_s": round(arrival_s, 4),
            "prompt_tokens": event.num_prompt_tokens,
            "answer_tokens": event.num_output_tokens,
            "ttft_s": round(ttft_s, 4),
            "seconds": round(seconds, 4),
        }
        line = json.dumps(fields) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            logger.warning("no more requests are recorded: %s", error)
            self._is_recording = False
        self._num_bytes += len(line)
        if self._num_bytes > MAX_BYTES:
            logger.warning("%s is full; no more requests are recorded", self._path)
            self._is_recording = False
