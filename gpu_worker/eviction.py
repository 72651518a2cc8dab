"""What the expert cache keeps a record by: policies as pure arithmetic on one number per record.

That number is the record's mark. It only rises, and only with a use, so that a cache may keep marks
in heaps and look at a record again only when it reaches the top. Knows no bytes and no budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from expert_store.types import RecordKind

CachePolicy = Literal["lfu", "score", "layer_lru", "lru"]
"""Which records stay on the device.

- lfu: those most used, a use counting half after `HALF_LIFE` turns of its layer.
- score: the same, but a use counts the router weight that its tokens gave the expert.
- layer_lru: those used in the latest turns of their own layer.
- lru: those used last. A step goes through the layers in a circle, and what it needs next is always
  what was used longest ago: in a cache a little too small nothing is ever found.

On the mean over recorded traces lfu comes nearest to Belady's bound: benchmarks/results/cache.md.
"""

Name = tuple[int, int, RecordKind]
"""(layer, expert, kind): a record, whatever its length."""

HALF_LIFE = 16.0
"""Turns of its layer after which a use counts half; 4 and 64 find less (same page)."""
ADMIT_OVER = 1.2
"""How many times as much as those it would evict a record must be used, to be kept."""
LEAST_SCORE = 1e-6


class EvictionPolicy(Protocol):
    """Of two records the one is kept whose mark is the larger number of turns after its clock."""

    @property
    def margin(self) -> float:
        """How much larger (in turns) the mark of a record that comes must be than those it evicts,
        for it to be kept at all."""
        ...

    @property
    def wants_scores(self) -> bool:
        """Whether `mark` looks at the score."""
        ...

    @property
    def counts_uses(self) -> bool:
        """Whether time is the number of uses of all records, and not the turns of a layer."""
        ...

    def mark(self, before: float | None, now: int, score: float) -> float:
        """A record's mark after a use at `now`; `before` is its mark until then. `score` is the
        router weight that the use's tokens gave its expert, as shares of their tokens' weight."""
        ...


@dataclass(frozen=True, slots=True)
class Recency:
    """The time of the last use: LRU. Whatever comes is kept."""

    counts_uses: bool
    margin: float = 0.0
    wants_scores: bool = False

    def mark(self, before: float | None, now: int, score: float) -> float:
        return float(now)


@dataclass(frozen=True, slots=True)
class Frequency:
    """Uses, each of which halves in `half_life` turns: LFU with ageing.

    A sum of uses is kept as the turn at which a single use would have been worth as much:
    now + half_life x log2(sum). All marks then age alike, by the clock alone, and none overflows.
    """

    half_life: float = HALF_LIFE
    admit_over: float = ADMIT_OVER
    wants_scores: bool = False
    counts_uses: bool = False

    @property
    def margin(self) -> float:
        return self.half_life * math.log2(self.admit_over)

    def mark(self, before: float | None, now: int, score: float) -> float:
        worth = float(now)
        if self.wants_scores:
            worth += self.half_life * math.log2(max(score, LEAST_SCORE))
        if before is None:
            return worth
        apart = abs(before - worth) / self.half_life
        # Beyond the 60th halving the smaller one is lost to rounding anyway.
        sum_over_max = math.log2(1.0 + 2.0**-apart) if apart < 60.0 else 0.0
        return max(before, worth) + self.half_life * sum_over_max


def eviction_policy(name: CachePolicy) -> EvictionPolicy:
    """The policy of that name. Raises ValueError for another name."""
    if name not in get_args(CachePolicy):
        raise ValueError(
            f"cache_policy: got {name!r}, expected one of {', '.join(get_args(CachePolicy))}"
        )
    if name in ("lru", "layer_lru"):
        return Recency(counts_uses=name == "lru")
    return Frequency(wants_scores=name == "score")
