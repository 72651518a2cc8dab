"""Goal: no request waits for the model's description but the first, and a rollout is noticed.

Method: a describer of this process and a fake clock.
"""

from __future__ import annotations

import asyncio

import pytest

from cluster.model_watch import FRESH_S, ModelWatch
from cluster.openai_errors import ApiError
from gpu_worker.messages import ModelDescription


class Describer:
    """Answers with the version it is told, or not at all; counts."""

    def __init__(self) -> None:
        self.version: str | None = "one"
        self.num_asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def describe(self) -> ModelDescription:
        self.num_asked += 1
        await self.gate.wait()
        if self.version is None:
            raise ApiError(503, "nobody")
        return ModelDescription("mini", "mixtral", 5, 6, self.version)


def test_what_is_old_is_given_at_once_and_asked_for_again() -> None:
    async def scenario() -> None:
        now_s = 0.0
        describer = Describer()
        watch = ModelWatch(describer.describe, lambda: now_s)
        assert (await watch.get()).version == "one"
        describer.version = "two"
        assert (await watch.get()).version == "one"
        assert describer.num_asked == 1, "still fresh"
        now_s = FRESH_S + 1
        describer.gate.clear()
        for _ in range(3):
            assert (await watch.get()).version == "one", "nobody waits"
        await asyncio.sleep(0)
        assert describer.num_asked == 2, "asked once"
        describer.gate.set()
        await asyncio.sleep(0.01)
        assert (await watch.get()).version == "two"

    asyncio.run(scenario())


def test_the_last_one_known_stays_while_nobody_answers() -> None:
    async def scenario() -> None:
        now_s = 0.0
        describer = Describer()
        describer.version = None
        watch = ModelWatch(describer.describe, lambda: now_s)
        with pytest.raises(ApiError):
            await watch.get()
        describer.version = "one"
        await watch.get()
        describer.version = None
        for moment_s in (10.0, 20.0):
            now_s = moment_s
            assert (await watch.get()).version == "one"
            await asyncio.sleep(0.01)
        assert describer.num_asked == 4

    asyncio.run(scenario())
