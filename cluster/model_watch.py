"""What model is served, kept fresh without a request ever waiting for it.

A rollout may change the version, and with --force the name. Knows no route and no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from cluster.openai_errors import ApiError
from gpu_worker.messages import ModelDescription

logger = logging.getLogger(__name__)

FRESH_S = 2.0
"""An answer that is older is asked for again; meanwhile it still counts."""


class ModelWatch:
    """The last description of the model, asked for in the background. `clock` gives seconds."""

    def __init__(
        self,
        describe: Callable[[], Awaitable[ModelDescription]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._describe = describe
        self._clock = clock
        self._known: ModelDescription | None = None
        self._known_s = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> ModelDescription:
        """The model. Only the first call waits, and raises ApiError 503 when nobody answers."""
        if self._known is None:
            self._learn(await self._describe())
        elif self._clock() - self._known_s > FRESH_S and self._asking is None:
            self._asking = asyncio.create_task(self._refresh())
        assert self._known is not None
        return self._known

    async def _refresh(self) -> None:
        try:
            self._learn(await self._describe())
        except ApiError as error:
            logger.info("the model last known stays: %s", error)
            self._known_s = self._clock()
        finally:
            self._asking = None

    def _learn(self, model: ModelDescription) -> None:
        self._known, self._known_s = model, self._clock()
