"""What expert caches find on a recorded trace: a row per budget and policy, against the optimum.

Knows no command and no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from expert_store.types import Manifest, RecordRequest
from gpu_worker.eviction import CachePolicy, eviction_policy
from gpu_worker.eviction_optimum import best_counts
from gpu_worker.expert_cache import CacheBudgets
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.trace import StepTrace
from gpu_worker.trace_turns import (
    CacheCounts,
    LayerTurn,
    check_same_model,
    replay_turns,
    turns_of,
)

BOUND, WHOLE = "belady-bound", "belady-whole"
POLICIES: tuple[str, ...] = (*get_args(CachePolicy), WHOLE, BOUND)
"""What `replay_rows` can play: the worker's policies, and two that know the future."""


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """What one policy found within one budget. Shares are of bytes, 0 to 1."""

    cache_bytes: int
    cache_share: float  # of all records' bytes on the device
    factor_share: float | None
    policy: str
    codes_found: float
    factors_found: float
    found: float
    of_bound: float  # bytes found, over what the bound finds
    codes_hits: int
    factors_hits: int
    misses: int  # records
    moved_bytes_per_token: float  # to the device


@dataclass(frozen=True, slots=True)
class Played:
    """A trace on a store: what its steps need."""

    turns: Sequence[LayerTurn]
    num_tokens: int
    store_bytes: int  # of all records on the device

    @staticmethod
    def of(trace: StepTrace, manifest: Manifest, factor_share: float = 1.0) -> Played:
        """`factor_share` is the worker's: how much of each compensator is fetched.

        Raises ValueError when the trace is of another model.
        """
        check_same_model(trace, manifest.model)
        sizes = RecordSizes.of(manifest, factor_share)
        codes = (sizes.copy_of(RecordRequest(key, "codes")).device_bytes for key in sizes.codes)
        total = sum(codes) + sum(sizes.factors.values())
        return Played(turns_of(trace, sizes), trace.num_rows, total)


def replay_rows(
    played: Played, budgets: Sequence[CacheBudgets], policies: Sequence[str] = POLICIES
) -> Iterator[ReplayRow]:
    """A row for each policy within each budget, in that order.

    Raises ValueError for an unknown policy.
    """
    if unknown := [name for name in policies if name not in POLICIES]:
        raise ValueError(f"--policies: got {unknown[0]!r}, expected some of {', '.join(POLICIES)}")
    for one in budgets:
        bound = best_counts(played.turns, one, in_part=True)
        for name in policies:
            yield _row(played, one, name, _counts(played, one, name, bound), bound)


def _counts(played: Played, budgets: CacheBudgets, name: str, bound: CacheCounts) -> CacheCounts:
    if name == BOUND:
        return bound
    if name == WHOLE:
        return best_counts(played.turns, budgets, in_part=False)
    (policy,) = (one for one in get_args(CachePolicy) if one == name)
    return replay_turns(played.turns, budgets, eviction_policy(policy))


def _row(
    played: Played, budgets: CacheBudgets, name: str, counts: CacheCounts, bound: CacheCounts
) -> ReplayRow:
    best = bound.hit_share()
    missed_bytes = sum(counts.asked_bytes.values()) - sum(counts.hit_bytes.values())
    return ReplayRow(
        cache_bytes=budgets.total_bytes,
        cache_share=budgets.total_bytes / played.store_bytes,
        factor_share=budgets.factor_share,
        policy=name,
        codes_found=counts.hit_share("codes"),
        factors_found=counts.hit_share("factors"),
        found=counts.hit_share(),
        of_bound=counts.hit_share() / best if best else 1.0,
        codes_hits=counts.hits.get("codes", 0),
        factors_hits=counts.hits.get("factors", 0),
        misses=sum(counts.asked.values()) - sum(counts.hits.values()),
        moved_bytes_per_token=missed_bytes / played.num_tokens,
    )
