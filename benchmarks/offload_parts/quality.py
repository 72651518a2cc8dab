"""Perplexity of the contestants' stores on the held-out text, without any link; rows are kept.

What `moetier eval` measures, once for each store and policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.offload_parts.contestants import Contestant, StoreName
from cluster.environment import cache_folder
from cluster.eval_rows import EvalRow, RowFile, paired_difference, pooled
from cluster.eval_settings import EvalSettings, Variant
from cluster.evaluate import evaluate
from cluster.texts import EvalText

INTERVAL = 1.96
"""Standard errors on each side of a 95 % interval."""
Quality = tuple[StoreName, int | None, bool]
"""Store, Top-n, near data: `Contestant.quality`."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the text says of one way to answer; `more_nats` is over the original's loss."""

    perplexity: float
    more_nats: float
    more_nats_error: float
    bits_moved: float
    window_nats: tuple[float, ...]


class Judging:
    """Judges stores of one model on the same windows of the same texts."""

    def __init__(
        self, name: str, texts: Sequence[EvalText], settings: EvalSettings, original: Path
    ) -> None:
        self._texts, self._settings = texts, settings
        self._rows = RowFile(cache_folder() / "rows" / f"offload-{name}.jsonl")
        self._original = self._measure(Variant("original", original))

    def bits_moved(self, store: Path) -> float:
        """Bits per weight that a lone token moves of this store without a cache."""
        return pooled(self._measure(Variant("store", store))).bits_per_weight_moved

    def judge(self, store: Path, top_n: int | None, *, near_data: bool) -> Judgement:
        rows = self._measure(Variant("store", store, top_n=top_n, near_data=near_data))
        whole = pooled(rows, self._original)
        assert whole.more_nats is not None, "there is a baseline"
        return Judgement(
            perplexity=whole.perplexity,
            more_nats=whole.more_nats,
            more_nats_error=whole.more_nats_error or 0.0,
            bits_moved=whole.bits_per_weight_moved,
            window_nats=whole.window_nats,
        )

    def _measure(self, variant: Variant) -> list[EvalRow]:
        return list(evaluate([variant], self._texts, self._settings, rows=self._rows))


def judge_all(
    judging: Judging, contestants: Iterable[Contestant], stores: Mapping[StoreName, Path]
) -> dict[Quality, Judgement]:
    """One judgement for each quality that the contestants have."""
    found: dict[Quality, Judgement] = {}
    for item in contestants:
        store, top_n, near_data = item.quality
        if item.quality not in found:
            found[item.quality] = judging.judge(stores[store], top_n, near_data=near_data)
    return found


def difference(mine: Judgement, theirs: Judgement) -> tuple[float, float]:
    """Nats per token of mine over theirs, paired by window, and half of its 95 % interval."""
    nats, error = paired_difference(mine.window_nats, theirs.window_nats)
    return nats, INTERVAL * (error or 0.0)
