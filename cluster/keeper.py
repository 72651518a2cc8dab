"""Keeps the tier actors running: starts them where placed, asks how they are, replaces them.

Knows no Ray: what starts and asks actors is a `Launcher`; the clock is passed in. A process that
dies is restarted by Ray behind the same handle; this finds a new place when that is not enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from cluster.backoff import Backoff
from cluster.kept_actor import KeptActor
from cluster.placement import Need, Node, Placed, PlacementError, place
from cluster.snapshot import TierStatus
from cluster.tier_actors import Found, Launcher, Running, TierLost, TierStartError
from expert_store.holder import HolderStatus
from gpu_worker.messages import ExpertUses

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0
SHARE_S = 10.0
"""Between two looks at whether actors of a kind share a node though another one is free."""
LEAVE_S = 10.0
"""An actor that is one too many serves on for so long: by then the workers know, and are done."""


class Keeper:
    """The tier actors of one cluster. Used by one event loop.

    An actor that is silent for `start_timeout_s` is replaced; replacements that fail are tried
    again after 0.5, 1, 2 ... 30 s. `generation` counts the changes of who runs and where,
    from `first_generation` on.
    """

    def __init__(
        self,
        launcher: Launcher,
        needs: Sequence[Need],
        *,
        start_timeout_s: float,
        clock: Callable[[], float],
        first_generation: int = 0,
    ) -> None:
        self._launcher = launcher
        self._kept = [KeptActor(need, Backoff(clock)) for need in needs]
        self._nodes: frozenset[str] | None = None  # while something waits to be tried again
        self._leaving: list[tuple[float, Any]] = []  # when to stop an actor that is one too many
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._draining: set[str] = set()
        self._share_at = 0.0
        self.generation = first_generation

    def running(self) -> tuple[Running, ...]:
        """The actors that have answered and were not given up."""
        return tuple(each for kept in self._kept if (each := kept.running) is not None)

    def statuses(self) -> tuple[TierStatus, ...]:
        """How each actor was in the last round."""
        return tuple(kept.told for kept in self._kept)

    def add_uses(self, uses: Iterable[ExpertUses]) -> None:
        """What a worker asked of the tier: nothing to do here, every actor holds all."""

    def drain(self, node_id: str) -> None:
        """Let the actors of a node run elsewhere from now on, then stop there."""
        self._draining.add(node_id)

    def is_drained(self, node_id: str) -> bool:
        """Whether no actor runs on a node that is to leave."""
        return all(kept.node is None or kept.node.node_id != node_id for kept in self._kept)

    def num_of(self, section: str) -> int:
        """How many actors of a section should run."""
        return sum(kept.need.section == section for kept in self._kept)

    def resize(self, section: str, num: int) -> None:
        """From now on `num` actors of a section that has some; the next rounds see to it.

        Of those too many the ones that do not answer go first, then the last.
        """
        kept = [each for each in self._kept if each.need.section == section]
        if not kept or num < 1:
            raise ValueError(f"resize: got {num} of {section}, which has {len(kept)}")
        names = {each.need.name for each in kept}
        free = (name for i in count() if (name := f"{section}-{i}") not in names)
        for _ in range(num - len(kept)):
            need = replace(kept[0].need, name=next(free))
            self._kept.append(KeptActor(need, Backoff(self._clock)))
        kept.sort(key=lambda each: (each.problem is not None, each.need.name), reverse=True)
        for each in kept[: max(0, len(kept) - num)]:
            self._kept.remove(each)
            self.generation += 1
            logger.info("%s is one too many", each.need.name)
            successor = None if each.successor is None else each.successor.handle
            for handle in (each.handle, successor):
                if handle is not None:
                    self._leaving.append((self._clock() + LEAVE_S, handle))

    async def start(self) -> None:
        """Adopt those that run already, place and start the others, and wait until each answers.

        Raises PlacementError at once, TierStartError when one fails or needs too long.
        """
        nodes = await self._launcher.nodes()
        self._adopt(await self._launcher.find(), nodes)
        new = [kept for kept in self._kept if kept.handle is None]
        placed = place([kept.need for kept in new], nodes, self._homes())
        for kept, where in zip(new, placed, strict=True):
            await self._launch(kept, where)
        try:
            await asyncio.gather(*(self._first_answer(kept) for kept in new))
        except TierStartError:
            await self.close()
            raise

    async def tend(self) -> None:
        """One round over all actors."""
        await self._look_for_room()
        await self._part()
        await asyncio.gather(*(self._tend(kept) for kept in self._kept))
        now = self._clock()
        done = [handle for at, handle in self._leaving if at <= now]
        self._leaving = [each for each in self._leaving if each[0] > now]
        await asyncio.gather(*(self._launcher.stop(handle) for handle in done))

    async def close(self) -> None:
        """Stop all."""
        successors = [kept.successor for kept in self._kept if kept.successor is not None]
        all_kept = (*self._kept, *successors)
        handles = [kept.handle for kept in all_kept if kept.handle is not None]
        handles += [handle for _, handle in self._leaving]
        self._leaving = []
        for kept in self._kept:
            kept.handle, kept.successor, kept.problem = None, None, "stopped"
        await asyncio.gather(*(self._launcher.stop(handle) for handle in handles))

    async def _look_for_room(self) -> None:
        """What could not be placed is tried at once when nodes have come or gone."""
        waiting = [kept for kept in self._kept if not kept.retries.is_due]
        before, self._nodes = self._nodes, None
        if waiting:
            self._nodes = frozenset(node.node_id for node in await self._launcher.nodes())
            for kept in waiting if before is not None and self._nodes != before else []:
                kept.retries.hurry()

    async def _part(self) -> None:
        """Two copies on one node are lost together: one of them moves once another node is free,
        for instance when one that was lost is back."""
        homes = Counter(self._homes())
        if self._clock() < self._share_at or max(homes.values(), default=0) < 2:
            return
        self._share_at = self._clock() + SHARE_S
        for kept in reversed(self._kept):
            section = kept.need.section
            if kept.node is None or kept.problem or homes[section, kept.node.node_id] < 2:
                continue
            with contextlib.suppress(PlacementError):
                where = await self._place(kept)
                if not homes[section, where.node.node_id]:
                    kept.is_to_move = True
                    return

    def _adopt(self, found: Sequence[Found], nodes: Sequence[Node]) -> None:
        homes = {node.node_id: node for node in nodes}
        by_name = {each.name: each for each in found}
        for kept in self._kept:
            each = by_name.get(kept.need.name)
            node = None if each is None else homes.get(each.status.listing.node_id)
            if each is not None and node is not None:
                logger.info("%s runs already on %s", kept.need.name, node.address)
                kept.handle, kept.node = each.handle, node
                self._answered(kept, each.status)

    async def _first_answer(self, kept: KeptActor) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                self._answered(kept, await self._launcher.ask(kept.handle))
        except (TierLost, TimeoutError) as error:
            assert kept.node is not None
            cause = str(error) or f"no answer within {self._start_timeout_s:g} s"
            raise TierStartError(
                f"{kept.need.name} did not start on {kept.node.address}: {cause}"
            ) from error

    async def _tend(self, kept: KeptActor) -> None:
        if kept.handle is None:
            if kept.retries.is_due:
                await self._replace(kept)
            return
        if kept.node is not None and (kept.is_to_move or kept.node.node_id in self._draining):
            await self._move(kept)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                status = await self._launcher.ask(kept.handle)
        except TimeoutError:
            await self._silent(kept, f"no answer within {ASK_TIMEOUT_S:g} s", is_final=False)
        except TierLost as error:
            await self._silent(kept, str(error), is_final=error.is_final)
        else:
            self._answered(kept, status)

    async def _replace(self, kept: KeptActor) -> None:
        try:
            where = await self._place(kept)
        except PlacementError as error:
            self._failed(kept, str(error))
            return
        await self._launch(kept, where)

    async def _place(self, kept: KeptActor) -> Placed:
        """A node for one, away from the others of its section. Raises PlacementError."""
        nodes = [n for n in await self._launcher.nodes() if n.node_id not in self._draining]
        (where,) = place([kept.need], nodes, self._homes(but=kept))
        return where

    def _homes(self, but: KeptActor | None = None) -> list[tuple[str, str]]:
        """Section and node of each that has been started."""
        return [
            (kept.need.section, kept.node.node_id)
            for kept in self._kept
            if kept is not but and kept.node is not None and kept.handle is not None
        ]

    async def _move(self, kept: KeptActor) -> None:
        """Off a node that is drained or shared: the one elsewhere answers before this one stops."""
        if kept.successor is None:
            if not kept.retries.is_due:
                return
            try:
                where = await self._place(kept)
            except PlacementError as error:
                self._cannot_move(kept, str(error))
                return
            kept.successor = KeptActor(kept.need, Backoff(self._clock))
            await self._launch(kept.successor, where)
        successor = kept.successor
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                status = await self._launcher.ask(successor.handle)
        except (TierLost, TimeoutError) as error:
            assert successor.silent_since is not None, "it has never answered"
            late = self._clock() - successor.silent_since >= self._start_timeout_s
            if late or (isinstance(error, TierLost) and error.is_final):
                kept.successor = None
                self._cannot_move(kept, str(error) or "no answer")
                await self._launcher.stop(successor.handle)
            return
        before, kept.handle, kept.node = kept.handle, successor.handle, successor.node
        kept.successor, kept.is_to_move = None, False
        self._answered(kept, status)
        await self._launcher.stop(before)

    def _cannot_move(self, kept: KeptActor, problem: str) -> None:
        seconds, kept.is_to_move = kept.retries.failed(), False
        logger.warning(
            "%s cannot leave its node: %s; trying again in %g s", kept.need.name, problem, seconds
        )

    async def _launch(self, kept: KeptActor, where: Placed) -> None:
        kept.handle = await self._launcher.start(where)
        kept.node, kept.problem, kept.silent_since = where.node, "starting", self._clock()
        logger.info("starting %s on %s", kept.need.name, where.node.address)

    def _answered(self, kept: KeptActor, status: HolderStatus) -> None:
        if status != kept.status:
            self.generation += 1
            if kept.status is not None:
                kept.restarts += 1
            kept.retries.succeeded()
            logger.info("%s answers: %s", kept.need.name, status)
        kept.status, kept.problem, kept.silent_since = status, None, None

    async def _silent(self, kept: KeptActor, problem: str, *, is_final: bool) -> None:
        if kept.problem is None:
            logger.warning("%s: %s", kept.need.name, problem)
        kept.problem = problem
        now = self._clock()
        kept.silent_since = now if kept.silent_since is None else kept.silent_since
        if is_final or now - kept.silent_since >= self._start_timeout_s:
            handle, kept.handle = kept.handle, None
            self.generation += 1
            self._failed(kept, problem)
            await self._launcher.stop(handle)

    def _failed(self, kept: KeptActor, problem: str) -> None:
        kept.problem = problem
        seconds = kept.retries.failed()
        logger.warning("%s: %s; trying again in %g s", kept.need.name, problem, seconds)
