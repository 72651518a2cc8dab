"""The settings a bandwidth governor moves between: from what the config wants to what it allows.

Pure: from the config and the manifest, made once at start, so that changing costs nothing. Knows no
time and no link; who moves, and when, is `gpu_worker/governor.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from expert_store.types import Manifest
from gpu_worker.config import WorkerConfig
from gpu_worker.expert_cache import CacheBudgets
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.restoring import PairPolicy, Restore

SHARES = (0.75, 0.5, 0.25)
"""Of the config's factor_share: the prefixes that are tried on the way down to the least."""


@dataclass(frozen=True, slots=True)
class QualitySetting:
    """One rung: what is restored and skipped, and the bytes that go with it.

    `factor_bytes` says how many bytes of factors a token is expected to need, as a share of those
    of the first rung; 1 there, 0 where nothing is restored. Where factors have a part of the device
    cache for themselves it shrinks with that, and codes get what it leaves.
    """

    top_n: int | None  # None: the config's rule restores by router mass or benefit
    factor_share: float
    skip_below: float
    factor_bytes: float
    cache: CacheBudgets
    pairs: PairPolicy
    sizes: RecordSizes

    def knobs(self) -> dict[str, float]:
        """The settings by name, for metrics."""
        top_n = {} if self.top_n is None else {"top_n": float(self.top_n)}
        knobs = {**top_n, "factor_share": self.factor_share, "skip_below": self.skip_below}
        if self.cache.factor_share is not None:
            knobs["factor_cache_share"] = self.cache.factor_share
        return knobs

    def __str__(self) -> str:
        """As a response header says it: "top_n=1; factor_share=0.5"."""
        told = self.knobs()
        told.pop("factor_cache_share", None)  # of a cache no answer depends
        if not self.skip_below:
            del told["skip_below"]
        return "; ".join(f"{name}={value:g}" for name, value in told.items())


def quality_ladder(config: WorkerConfig, manifest: Manifest) -> tuple[QualitySetting, ...]:
    """The rungs from the config's own setting (first) to the least it allows (last).

    Shorter prefixes come before smaller Top-n: what repairs most per byte is first in a compensator
    and goes last. Skipping pairs, which saves codes too, comes after all factors that may go. Each
    rung but those of skipping needs fewer bytes of factors than the one before. `config` is
    resolved.
    """
    rungs: list[QualitySetting] = []
    sizes_of: dict[float, RecordSizes] = {}
    top_k = manifest.model.top_k
    full_bytes = 0.0
    for wanted in _wanted(config, top_k):
        sizes = sizes_of.get(wanted.factor_share)
        if sizes is None:
            sizes = RecordSizes.of(manifest, wanted.factor_share)
            sizes_of[wanted.factor_share] = sizes
        num_bytes = _restored_pairs(wanted, top_k) * sum(sizes.factors.values())
        full_bytes = full_bytes or num_bytes
        factor_bytes = num_bytes / full_bytes if full_bytes else 0.0
        rung = QualitySetting(
            top_n=_top_n(wanted, top_k),
            factor_share=wanted.factor_share,
            skip_below=wanted.skip_below,
            factor_bytes=factor_bytes,
            cache=_cache(config, factor_bytes) if rungs else _cache(config, 1.0),
            pairs=wanted.pair_policy(manifest),
            sizes=sizes,
        )
        if not rungs or _is_lower(rung, rungs[-1]):
            rungs.append(rung)
    return tuple(rungs)


def _is_lower(rung: QualitySetting, above: QualitySetting) -> bool:
    if rung.skip_below > above.skip_below:
        return True
    # A prefix that holds no block restores nothing; the rung that does so says so.
    is_frank = rung.factor_bytes > 0 or rung.top_n == 0 or rung.factor_share == 0
    return is_frank and rung.factor_bytes < above.factor_bytes


def _wanted(config: WorkerConfig, top_k: int) -> Iterator[WorkerConfig]:
    """The rungs' configs, also those that turn out to save nothing."""
    yield config
    least = config
    for share in (*(share * config.factor_share for share in SHARES), config.min_factor_share):
        if max(config.min_factor_share, 1e-9) <= share < least.factor_share:
            least = replace(config, factor_share=share)
            yield least
    most = _top_n(config, top_k)
    # A rule of router mass or benefit has no smaller Top-n, only none at all.
    smaller = [0] if most is None else range(most - 1, config.min_top_n - 1, -1)
    for top_n in smaller:
        if top_n >= config.min_top_n:
            restore: Restore = "random" if config.restore == "random" else "top_n"
            least = replace(least, restore=restore, top_n=top_n)
            yield least
    if config.min_factor_share == 0:
        least = replace(least, factor_share=0.0)
        yield least
    for part in (0.5, 1.0):
        if part * config.max_skip_below > config.skip_below:
            yield replace(least, skip_below=part * config.max_skip_below)


def _cache(config: WorkerConfig, factor_bytes: float) -> CacheBudgets:
    share = config.factor_cache_share
    return CacheBudgets(config.cache_bytes, None if share is None else share * factor_bytes)


def _top_n(config: WorkerConfig, top_k: int) -> int | None:
    """How many of a token's pairs are restored; None where the router's weights decide that."""
    if config.restore in ("mass", "benefit"):
        return None
    return top_k if config.restore == "all" else config.top_n


def _restored_pairs(config: WorkerConfig, top_k: int) -> float:
    top_n = _top_n(config, top_k)
    return 1.0 if top_n is None else float(top_n)
