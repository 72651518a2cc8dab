"""The tiers of several stores at once: a Keeper for each store that workers use.

A new version of a store rolls in while the old one drains: both are kept here for that time.
Knows no Ray; how a Keeper is made and the clock are passed in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePath

from cluster.keeper import FIRST_BACKOFF_S, MAX_BACKOFF_S, Keeper
from cluster.snapshot import TierStatus
from expert_store.errors import StoreError

logger = logging.getLogger(__name__)

UNUSED_S = 60.0
"""A store that no worker has reported for so long has no request left that could need it."""
LOADING_S = 900.0
"""A worker that has asked for a store reports for the first time once its model is loaded."""
MAX_STORES = 8


class TooManyStoresError(StoreError):
    """More stores are asked for than are served at once."""


@dataclass(slots=True)
class _Set:
    """The tiers of one store. `starting` is done once they answer."""

    keeper: Keeper
    starting: asyncio.Task[None]
    needed_until: float


@dataclass(slots=True)
class _Failure:
    """How often a store's tiers did not start, and when that may be tried unasked again."""

    count: int
    retry_at: float


class TierSets:
    """Which stores have tiers, since when nobody uses them. Used by one event loop.

    The configured store's tiers are always wanted; those of another store from when a worker asks
    for it until `UNUSED_S` after the last report of one. `clock` gives seconds.
    """

    def __init__(self, make_keeper: Callable[[str], Keeper], *, clock: Callable[[], float]) -> None:
        self._make_keeper = make_keeper
        self._clock = clock
        self._sets: dict[str, _Set] = {}
        self._failures: dict[str, _Failure] = {}
        self.configured: str | None = None

    @property
    def stores(self) -> tuple[str, ...]:
        """The stores whose tiers answered once and are kept, in the order of their starts."""
        return tuple(store for store, each in self._sets.items() if _is_started(each))

    async def configure(self, store: str) -> None:
        """From now on `store` is the one that is always wanted.

        The first time it waits until the tiers answer, and raises as `Keeper.start`. Later it only
        begins: the store before goes on being served, and whoever asks for the new one is told.
        """
        is_first = self.configured is None
        self.configured = store
        if is_first:
            try:
                await self.get(store)
            except BaseException:
                self.configured = None
                raise
        elif store not in self._sets:
            self._begin(store)

    async def get(self, store: str) -> Keeper:
        """The keeper of a store's tiers, started if it was not; waits until they answer.

        Raises PlacementError, TierStartError or TooManyStoresError.
        """
        kept = self._sets.get(store) or self._begin(store)
        kept.needed_until = max(kept.needed_until, self._clock() + LOADING_S)
        # Another asker may wait for the same start: it must outlive this one.
        await asyncio.shield(kept.starting)
        return kept.keeper

    def used(self, store: str) -> Keeper | None:
        """A worker uses the store now. None while its tiers are not there: they are started."""
        kept = self._sets.get(store)
        if kept is None:
            if self._may_retry(store):
                self._begin(store)
            return None
        if not _is_started(kept):
            return None
        # A worker that reports has loaded its model: what it was given for that ends here.
        kept.needed_until = self._clock() + UNUSED_S
        return kept.keeper

    def statuses(self) -> tuple[TierStatus, ...]:
        """Of all tiers; those of a store that is not the configured one say so in their names."""
        return tuple(
            status if store == self.configured else _of_store(status, store)
            for store, kept in self._sets.items()
            for status in kept.keeper.statuses()
        )

    async def tend(self) -> None:
        """One round: look after all tiers, stop those of stores that nobody uses any more."""
        started = {store: kept for store, kept in self._sets.items() if _is_started(kept)}
        await asyncio.gather(*(kept.keeper.tend() for kept in started.values()))
        wanted = self.configured
        if wanted is not None and wanted not in self._sets and self._may_retry(wanted):
            self._begin(wanted)
        now = self._clock()
        for store, kept in started.items():
            if store != self.configured and now >= kept.needed_until:
                logger.info("stopping the tiers of %s: no worker uses it any more", store)
                del self._sets[store]
                await kept.keeper.close()

    async def close(self) -> None:
        """Stop all tiers, those that are starting too."""
        kept, self._sets, self.configured = list(self._sets.values()), {}, None
        for each in kept:
            each.starting.cancel()
        await asyncio.gather(*(each.starting for each in kept), return_exceptions=True)
        await asyncio.gather(*(each.keeper.close() for each in kept))

    def _begin(self, store: str) -> _Set:
        if len(self._sets) >= MAX_STORES:
            raise TooManyStoresError(
                f"cannot serve {store}: {len(self._sets)} stores are served already, the most; "
                f"they are {', '.join(sorted(self._sets))}. Wait until the workers of one have "
                f"gone for {UNUSED_S:g} s"
            )
        keeper = self._make_keeper(store)
        starting = asyncio.create_task(self._start(store, keeper))
        starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        kept = _Set(keeper, starting, self._clock() + LOADING_S)
        self._sets[store] = kept
        return kept

    async def _start(self, store: str, keeper: Keeper) -> None:
        try:
            await keeper.start()
        except Exception as error:  # not kept, raised again: whoever asked is told
            self._sets.pop(store, None)
            count = self._failures[store].count if store in self._failures else 0
            backoff_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**count)
            self._failures[store] = _Failure(count + 1, self._clock() + backoff_s)
            logger.warning("the tiers of %s did not start: %s", store, error)
            raise
        self._failures.pop(store, None)
        logger.info("the tiers of %s answer", store)

    def _may_retry(self, store: str) -> bool:
        failure = self._failures.get(store)
        has_room = len(self._sets) < MAX_STORES
        return has_room and (failure is None or self._clock() >= failure.retry_at)


def _is_started(kept: _Set) -> bool:
    return kept.starting.done() and not kept.starting.cancelled()


def _of_store(status: TierStatus, store: str) -> TierStatus:
    return replace(status, name=f"{status.name}@{PurePath(store).name}")
