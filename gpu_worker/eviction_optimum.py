"""What a cache that knew the future would have found: Belady's optimum, for policies to be held to.

Bytes that are found are what counts. A record's bytes are all asked for together, and what comes
need not be kept, so if records could be kept in part, the best choice is known: keep, byte by byte,
what is asked for again soonest (Belady's MIN, 1966, with bypass, over bytes). No policy that keeps
whole records finds more: that is the bound. With whole records of different sizes the best choice
is NP-hard to find (Berger, Beckmann, Harchol-Balter, 2018); the same rule over whole records is a
choice that could be made: the optimum lies between the two. Where all records are of one size and
the budget a multiple of it they are the same, and exact.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from expert_store.types import RecordRequest
from gpu_worker.expert_cache import CacheBudgets
from gpu_worker.trace_turns import CacheCounts, CacheTally, LayerTurn, Need


def best_counts(turns: Sequence[LayerTurn], budgets: CacheBudgets, *, in_part: bool) -> CacheCounts:
    """What keeping the soonest used finds from an empty cache: in parts of records (the bound), or
    in whole records. Kinds that do not share a budget are chosen apart."""
    needs = [need for turn in turns for need in turn.needs]
    tally = CacheTally()
    for kinds, budget_bytes in budgets.pools().items():
        asked = [need for need in needs if need.request.kind in kinds]
        cache = _Clairvoyant(budget_bytes, in_part)
        for place, (need, next_use) in enumerate(zip(asked, _next_uses(asked), strict=True)):
            tally.add(need, cache.serve(need, next_use, place))
    return tally.freeze()


def _next_uses(asked: Sequence[Need]) -> list[float]:
    """For each place, the next one that asks for the same record; inf where none does."""
    uses, following = [math.inf] * len(asked), dict[RecordRequest, int]()
    for place in reversed(range(len(asked))):
        request = asked[place].request
        uses[place] = following.get(request, math.inf)
        following[request] = place
    return uses


class _Clairvoyant:
    """A cache that is told with each record when it will be asked for again."""

    def __init__(self, budget_bytes: int, in_part: bool) -> None:
        self._free_bytes = budget_bytes
        self._in_part = in_part
        self._kept: dict[RecordRequest, int] = {}  # bytes of it that are there
        self._next: dict[RecordRequest, float] = {}
        self._latest: list[tuple[float, int, RecordRequest]] = []  # heap of (-next use, place, ..)

    def serve(self, need: Need, next_use: float, place: int) -> int:
        """Bytes of the record that are there; then it is kept, or not, by its next use."""
        request = need.request
        there = self._kept.get(request, 0)
        self._next[request] = next_use
        if next_use == math.inf:
            self._free_bytes += self._kept.pop(request, 0)
        elif self._in_part:
            self._keep_part(need, there, next_use)
        elif not there:
            self._keep_whole(need, next_use)
        if request in self._kept:
            heapq.heappush(self._latest, (-next_use, place, request))
        return there

    def _keep_part(self, need: Need, there: int, next_use: float) -> None:
        missing = need.num_bytes - there
        while self._free_bytes < missing and (entry := self._pop_later(next_use)):
            other = entry[2]
            taken = min(self._kept[other], missing - self._free_bytes)
            self._free_bytes += taken
            self._kept[other] -= taken
            if self._kept[other]:
                heapq.heappush(self._latest, entry)
            else:
                del self._kept[other]
        come = min(missing, self._free_bytes)
        self._free_bytes -= come
        if there + come:
            self._kept[need.request] = there + come

    def _keep_whole(self, need: Need, next_use: float) -> None:
        later: list[tuple[float, int, RecordRequest]] = []
        later_bytes = 0
        while self._free_bytes + later_bytes < need.num_bytes:
            entry = self._pop_later(next_use)
            if entry is None:  # even without all that is used later there is no room
                for back in later:
                    heapq.heappush(self._latest, back)
                return
            later.append(entry)
            later_bytes += self._kept[entry[2]]
        for _, _, other in later:
            del self._kept[other]
        self._free_bytes += later_bytes - need.num_bytes
        self._kept[need.request] = need.num_bytes

    def _pop_later(self, next_use: float) -> tuple[float, int, RecordRequest] | None:
        """The kept record that is used last of all, taken out of the heap, if it is used later than
        `next_use`."""
        while self._latest and -self._latest[0][0] > next_use:
            entry = heapq.heappop(self._latest)
            # A record that was used meanwhile, or is gone, left its old entry behind.
            if entry[2] in self._kept and self._next[entry[2]] == -entry[0]:
                return entry
        return None
