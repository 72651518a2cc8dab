"""Keeps a store that is spread over the memory nodes: what each holds, and its actors.

When nodes come, go or are drained, or the heat has shifted, the records are placed anew: first the
actors that must hold more are started, then those they take over from are stopped.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.backoff import Backoff
from cluster.expert_heat import ExpertHeat
from cluster.keeper import Keeper
from cluster.placement import Node, Placed, PlacementError
from cluster.segment_placement import place_segments
from cluster.segments import MemoryNode, NodeSegment, Segments
from cluster.snapshot import TierStatus
from cluster.spread import SpreadRules, held, keys_for, keys_of
from cluster.tier_actors import Found, Launcher, Running, TierStartError
from expert_store.holder import HolderStatus
from gpu_worker.messages import ExpertUses

logger = logging.getLogger(__name__)

REPLACE_INTERVAL_S = 300.0
"""How often the heat is looked at. Every change restarts the actors of the nodes it changes."""
SHUN_S = 60.0
"""A node on which an actor did not start is left out for so long."""
LINGER_S = 5.0
"""Workers learn of a move by their next report; until then they ask the actors from before."""


@dataclass(slots=True)
class _Cell:
    """The actors of one node, and what they hold."""

    node: Node
    segment: NodeSegment
    keeper: Keeper
    serial: int


class SpreadKeeper:
    """The tier actors of a store of which every node holds a part. Used by one event loop.

    `generation` counts the changes of who runs where, from `first_generation` on.
    """

    def __init__(
        self,
        launcher: Launcher,
        rules: SpreadRules,
        *,
        start_timeout_s: float,
        clock: Callable[[], float],
        first_generation: int = 0,
    ) -> None:
        self._launcher, self._rules = launcher, rules
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._every = frozenset(size.key for size in rules.sizes)
        self._found: Sequence[Found] = ()
        self._heat = ExpertHeat((size.key for size in rules.sizes), clock)
        self._cells: dict[str, _Cell] = {}
        self._leaving: list[tuple[float, _Cell]] = []
        self._serials = itertools.count()
        self._draining: set[str] = set()
        self._shunned: dict[str, float] = {}  # until when
        self._segments = Segments()
        self._placed_on: tuple[MemoryNode, ...] = ()
        self._move: asyncio.Task[None] | None = None
        self._problem: str | None = None
        self._retries = Backoff(clock)
        self._place_at = 0.0  # for the heat's sake
        self._seen: tuple[tuple[int, int], ...] = ()
        self.generation = first_generation

    @property
    def segments(self) -> Segments:
        """What every node holds now, and what the last move took."""
        return self._segments

    def running(self) -> tuple[Running, ...]:
        """The actors that have answered and were not given up."""
        return tuple(r for cell in self._cells.values() for r in cell.keeper.running())

    def statuses(self) -> tuple[TierStatus, ...]:
        """How each actor was in the last round; a placement that fails is told as one of them."""
        found = [s for cell in self._cells.values() for s in cell.keeper.statuses()]
        if self._problem is not None:
            found.append(TierStatus("placement", "store", "", problem=self._problem))
        return tuple(found)

    def add_uses(self, uses: Iterable[ExpertUses]) -> None:
        """What a worker asked of the tier: heat for the next placement."""
        self._heat.add(uses)

    def drain(self, node_id: str) -> None:
        """Let a node's records be held elsewhere from now on, then stop its actors."""
        self._draining.add(node_id)

    def is_drained(self, node_id: str) -> bool:
        """Whether nothing runs on a node that is to leave."""
        running = [*self._cells.values(), *(cell for _, cell in self._leaving)]
        return all(cell.node.node_id != node_id for cell in running)

    async def start(self) -> None:
        """Place and start all, and wait until each answers.

        Raises PlacementError or SegmentError at once, TierStartError when one fails.
        """
        nodes = {node.node_id: node for node in await self._launcher.nodes()}
        places = self._rules.memory_nodes(nodes.values())
        self._rules.check_runners(places, nodes.values())
        self._found = await self._launcher.find()
        segments = held(self._found, self._rules, places)
        await self._go(nodes, places, segments or await self._place(places))
        self._found = ()  # from now on what runs is ours already
        self._count_changes()

    async def tend(self) -> None:
        """One round over all actors; begins a move where nodes or heat have changed."""
        await asyncio.gather(*(cell.keeper.tend() for cell in self._cells.values()))
        if self._move is not None and self._move.done():
            self._move = None
        if self._move is None and self._retries.is_due:
            await self._look()
        due = [cell for at, cell in self._leaving if self._clock() >= at]
        self._leaving = [(at, cell) for at, cell in self._leaving if self._clock() < at]
        await asyncio.gather(*(cell.keeper.close() for cell in due))
        self._count_changes()

    async def close(self) -> None:
        """Stop all."""
        if self._move is not None:
            self._move.cancel()
            await asyncio.gather(self._move, return_exceptions=True)
        cells = [*self._cells.values(), *(cell for _, cell in self._leaving)]
        self._cells, self._leaving = {}, []
        await asyncio.gather(*(cell.keeper.close() for cell in cells))

    async def _look(self) -> None:
        """Begin a move if the nodes are not those that were placed on, or it is time for heat."""
        nodes = {node.node_id: node for node in await self._launcher.nodes()}
        self._draining &= nodes.keys()
        self._shunned = {n: until for n, until in self._shunned.items() if self._clock() < until}
        left_out = self._draining | self._shunned.keys()
        staying = [node for name, node in nodes.items() if name not in left_out]
        try:
            places = self._rules.memory_nodes(staying)
            if places == self._placed_on and self._clock() < self._place_at:
                self._problem = None
                return
            segments = await self._place(places)
        except ValueError as error:  # PlacementError, SegmentError: told, and tried again
            self._failed(str(error))
            return
        if segments.nodes == self._segments.nodes:
            self._placed_on, self._problem = places, None
            return
        self._move = asyncio.create_task(self._try(nodes, places, segments))

    async def _place(self, places: Sequence[MemoryNode]) -> Segments:
        self._place_at = self._clock() + REPLACE_INTERVAL_S
        # Seconds for a large store: not on the event loop.
        return await asyncio.to_thread(
            place_segments,
            self._rules.sizes,
            places,
            rules=self._rules.segments,
            heat=self._heat.current(),
            before=self._segments,
        )

    async def _try(
        self, nodes: Mapping[str, Node], places: tuple[MemoryNode, ...], segments: Segments
    ) -> None:
        try:
            await self._go(nodes, places, segments)
        except Exception as error:  # noqa: BLE001 - told in statuses, and tried again
            self._failed(str(error) or type(error).__name__)

    async def _go(
        self, nodes: Mapping[str, Node], places: tuple[MemoryNode, ...], segments: Segments
    ) -> None:
        """Start what is new, and once all of it answers stop what it replaces."""
        movement = segments.movement
        logger.info(
            "placing the store on %d nodes: %d bytes move, the least is %d, and %d of hot experts",
            len(places),
            movement.moved_bytes,
            movement.least_bytes,
            movement.hot_bytes,
        )
        cells: dict[str, _Cell] = {}
        for node_id, segment in segments.nodes.items():
            kept = self._cells.get(node_id)
            if kept is not None and kept.segment == segment:
                cells[node_id] = kept
            elif segment.codes:
                cells[node_id] = self._cell(nodes[node_id], segment)
        new = [cell for cell in cells.values() if cell is not self._cells.get(cell.node.node_id)]
        try:
            await asyncio.gather(*(self._open(cell) for cell in new))
        except BaseException:
            await asyncio.gather(*(cell.keeper.close() for cell in new))
            raise
        gone = [cell for name, cell in self._cells.items() if cells.get(name) is not cell]
        self._leaving += [(self._clock() + LINGER_S, cell) for cell in gone]
        self._cells, self._segments, self._placed_on = cells, segments, places
        self._problem = None
        self._retries.succeeded()

    async def _open(self, cell: _Cell) -> None:
        try:
            await cell.keeper.start()
        except (TierStartError, PlacementError) as error:
            self._shunned[cell.node.node_id] = self._clock() + SHUN_S
            raise TierStartError(str(error)) from error

    def _cell(self, node: Node, segment: NodeSegment) -> _Cell:
        keeper = Keeper(
            _Pinned(self._launcher, node.node_id, segment, self._living(node, segment)),
            self._rules.needs(node.node_id, segment),
            start_timeout_s=self._start_timeout_s,
            clock=self._clock,
        )
        return _Cell(node, segment, keeper, next(self._serials))

    def _living(self, node: Node, segment: NodeSegment) -> list[Found]:
        return [
            each
            for each in self._found
            if each.status.listing.node_id == node.node_id
            and keys_of(each, self._every) == keys_for(each.name, segment)
        ]

    def _failed(self, problem: str) -> None:
        self._retries.failed()
        if problem != self._problem:
            logger.warning("the store cannot be placed anew: %s; trying again", problem)
        self._problem = problem

    def _count_changes(self) -> None:
        seen = tuple((cell.serial, cell.keeper.generation) for cell in self._cells.values())
        self.generation += seen != self._seen
        self._seen = seen


class _Pinned:
    """A launcher for one node's actors: nowhere else, and each with its experts. `living` are those
    that run there already.
    """

    def __init__(
        self, launcher: Launcher, node_id: str, segment: NodeSegment, living: Sequence[Found]
    ) -> None:
        self._launcher, self._node_id, self._segment = launcher, node_id, segment
        self._living = living

    async def nodes(self) -> Sequence[Node]:
        return [node for node in await self._launcher.nodes() if node.node_id == self._node_id]

    async def find(self) -> Sequence[Found]:
        return self._living

    async def start(self, placed: Placed) -> Any:
        keys = keys_for(placed.need.name, self._segment)
        return await self._launcher.start(replace(placed, keys=keys))

    async def ask(self, handle: Any) -> HolderStatus:
        return await self._launcher.ask(handle)

    async def stop(self, handle: Any) -> None:
        await self._launcher.stop(handle)
