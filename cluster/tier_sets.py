"""The tiers of several stores at once: a Keeper for each store that workers use.

A new version of a store rolls in while the old one drains: both are kept here for that time.
Knows no Ray; how a Keeper is made and the clock are passed in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Protocol

from cluster.backoff import Backoff
from cluster.snapshot import TierStatus
from cluster.tier_actors import (
    Running,
)
from expert_store.errors import StoreError
from gpu_worker.messages import ExpertUses

logger = logging.getLogger(__name__)

UNUSED_S = 60.0
"""A store that no worker has reported for so long has no request left that could need it."""
LOADING_S = 900.0
"""A worker that has asked for a store reports for the first time once its model is loaded."""
MAX_STORES = 8


class TooManyStoresError(StoreError):
    """More stores are asked for than are served at once."""


class TierKeeper(Protocol):
    """The tiers of one store: a `Keeper`, or a `SpreadKeeper`."""

    @property
    def generation(self) -> int: ...

    def running(self) -> tuple[Running, ...]: ...

    def statuses(self) -> tuple[TierStatus, ...]: ...

    def add_uses(self, uses: Iterable[ExpertUses]) -> None: ...

    def drain(self, node_id: str) -> None: ...

    def is_drained(self, node_id: str) -> bool: ...

    async def start(self) -> None: ...

    async def tend(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class _Set:
    """The tiers of one store. `starting` gives their keeper once they answer."""

    starting: asyncio.Task[TierKeeper]
    needed_until: float


class TierSets:
    """Which stores have tiers, since when nobody uses them. Used by one event loop.

    The configured store's tiers are always wanted; those of another store from when a worker asks
    for it until `UNUSED_S` after the last report of one. `clock` gives seconds.
    """

    def __init__(
        self,
        make_keeper: Callable[[str], Awaitable[TierKeeper]],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._make_keeper = make_keeper
        self._clock = clock
        self._sets: dict[str, _Set] = {}
        self._retries: dict[str, Backoff] = {}  # of stores whose tiers did not start
        self._draining: set[str] = set()
        self.configured: str | None = None

    @property
    def keepers(self) -> Mapping[str, TierKeeper]:
        """Of the stores whose tiers answered once and are kept, in the order of their starts."""
        return {
            store: kept.starting.result()
            for store, kept in self._sets.items()
            if kept.starting.done() and not kept.starting.cancelled()
        }

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
        elif store not in self._sets and len(self._sets) < MAX_STORES:
            self._begin(store)  # else `tend` does, once there is room

    async def get(self, store: str) -> TierKeeper:
        """The keeper of a store's tiers, started if it was not; waits until they answer.

        Raises PlacementError, TierStartError or TooManyStoresError.
        """
        kept = self._sets.get(store) or self._begin(store)
        kept.needed_until = max(kept.needed_until, self._clock() + LOADING_S)
        # Another asker may wait for the same start: it must outlive this one.
        return await asyncio.shield(kept.starting)

    def used(self, store: str) -> TierKeeper | None:
        """A worker uses the store now. None while its tiers are not there: they are started."""
        kept = self._sets.get(store)
        if kept is None:
            if self._may_retry(store):
                self._begin(store)
            return None
        # A worker that reports has loaded its model: what it was given for that ends here.
        kept.needed_until = self._clock() + UNUSED_S
        return self.keepers.get(store)

    def drain(self, node_id: str) -> None:
        """Let every store's actors on a node run elsewhere, then stop there."""
        self._draining.add(node_id)
        for keeper in self.keepers.values():
            keeper.drain(node_id)

    def is_drained(self, node_id: str) -> bool:
        """Whether no store's actor runs on the node any more."""
        return all(keeper.is_drained(node_id) for keeper in self.keepers.values())

    def statuses(self) -> tuple[TierStatus, ...]:
        """Of all tiers; those of a store that is not the configured one say so in their names."""
        return tuple(
            status if store == self.configured else _of_store(status, store)
            for store, keeper in self.keepers.items()
            for status in keeper.statuses()
        )

    async def tend(self) -> None:
        """One round: look after all tiers, stop those of stores that nobody uses any more."""
        keepers = self.keepers
        await asyncio.gather(*(keeper.tend() for keeper in keepers.values()))
        wanted = self.configured
        if wanted is not None and wanted not in self._sets and self._may_retry(wanted):
            self._begin(wanted)
        now = self._clock()
        for store, keeper in keepers.items():
            if store != self.configured and now >= self._sets[store].needed_until:
                logger.info("stopping the tiers of %s: no worker uses it any more", store)
                del self._sets[store]
                await keeper.close()

    async def close(self) -> None:
        """Stop all tiers, those that are starting too."""
        keepers, sets = self.keepers, self._sets
        self._sets, self.configured = {}, None
        for each in sets.values():
            each.starting.cancel()
        await asyncio.gather(*(each.starting for each in sets.values()), return_exceptions=True)
        await asyncio.gather(*(keeper.close() for keeper in keepers.values()))

    def _begin(self, store: str) -> _Set:
        if len(self._sets) >= MAX_STORES:
            raise TooManyStoresError(
                f"cannot serve {store}: {len(self._sets)} stores are served already, the most; "
                f"they are {', '.join(sorted(self._sets))}. Wait until the workers of one have "
                f"gone for {UNUSED_S:g} s"
            )
        starting = asyncio.create_task(self._start(store))
        starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        kept = _Set(starting, self._clock() + LOADING_S)
        self._sets[store] = kept
        return kept

    async def _start(self, store: str) -> TierKeeper:
        try:
            keeper = await self._make_keeper(store)
            try:
                await keeper.start()
            except BaseException:
                await keeper.close()
                raise
        except Exception as error:  # not kept, raised again: whoever asked is told
            self._sets.pop(store, None)
            self._retries.setdefault(store, Backoff(self._clock)).failed()
            logger.warning("the tiers of %s did not start: %s", store, error)
            raise
        self._retries.pop(store, None)
        for node_id in self._draining:
            keeper.drain(node_id)
        logger.info("the tiers of %s answer", store)
        return keeper

    def _may_retry(self, store: str) -> bool:
        retries = self._retries.get(store)
        return len(self._sets) < MAX_STORES and (retries is None or retries.is_due)


def _of_store(status: TierStatus, store: str) -> TierStatus:
    return replace(status, name=f"{status.name}@{PurePath(store).name}")
