"""Goal: what was served can be replayed: a line for each answer, in a form that tune reads.

Method: hand-made answers over a hand-made clock, and the reader of `cluster/tune/trace_files.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import cluster.request_trace
from cluster.request_trace import RecordingWorker
from cluster.tune.trace_files import read_trace
from gpu_worker.messages import (
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ModelDescription,
    Piece,
)
from gpu_worker.sequence import SamplingParams

SECRET = "nobody shall read this"
REQUEST = GenerateRequest("r", SamplingParams(), SECRET)
ANSWER = (Piece("a"), Piece("b"), Finished("stop", 7, 2, degraded=False))


class Worker:
    def __init__(self, *answers: tuple[Event, ...]) -> None:
        self.answers = list(answers)
        self.closed = 0

    async def describe(self) -> ModelDescription:
        return ModelDescription("m", "mixtral", 10, 0)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        try:
            for event in self.answers.pop(0):
                yield event
        finally:
            self.closed += 1


def recording(worker: Worker, folder: Path) -> RecordingWorker:
    times = iter(range(1_700_000_000, 1_800_000_000))
    return RecordingWorker(worker, folder, "a/b:c", clock=lambda: float(next(times)))


async def all_events(worker: RecordingWorker) -> list[Event]:
    return [event async for event in worker.generate(REQUEST)]


def test_a_line_for_each_whole_answer_and_none_of_its_text(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    worker = recording(Worker(ANSWER, (Failed("queue_full", "no"),), ANSWER), folder)
    for answer in (ANSWER, (Failed("queue_full", "no"),), ANSWER):
        assert asyncio.run(all_events(worker)) == list(answer)
    assert asyncio.run(worker.describe()).name == "m"
    (path,) = folder.iterdir()
    assert path.name == "requests-a-b-c.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {
        "arrival_s": 1.7e9,
        "prompt_tokens": 7,
        "answer_tokens": 2,
        "ttft_s": 1.0,
        "seconds": 3.0,
    }
    assert SECRET not in path.read_text()
    trace = read_trace(folder)
    assert [(r.arrival_s, r.prompt_tokens) for r in trace.requests] == [(0.0, 7), (6.0, 7)]


def test_who_leaves_ends_the_answer(tmp_path: Path) -> None:
    inner = Worker(ANSWER)

    async def leave() -> None:
        events = recording(inner, tmp_path).generate(REQUEST)
        assert await anext(events) == Piece("a")
        await events.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert inner.closed == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_costs_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    worker = recording(Worker(ANSWER, ANSWER), tmp_path / "file")
    for _ in range(2):
        assert asyncio.run(all_events(worker)) == list(ANSWER)
    assert caplog.text.count("no more requests are recorded") == 1


def test_a_full_file_ends_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.request_trace, "MAX_BYTES", 150)
    worker = recording(Worker(*[ANSWER] * 5), tmp_path)
    for _ in range(5):
        assert asyncio.run(all_events(worker)) == list(ANSWER)
    (path,) = tmp_path.iterdir()
    assert len(path.read_text().splitlines()) == 2
