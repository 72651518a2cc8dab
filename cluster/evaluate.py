"""Quality of stores on texts against the expert bytes they move per token. One process, no Ray.

Every kind of experts, the original bf16 included, is a store and goes through the same code, so
that its bytes are counted by the same transport. What a row holds is `cluster/eval_rows.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cluster.eval_model import OpenVariant, opened
from cluster.eval_rows import EvalRow, RowFile, against, measures
from cluster.eval_settings import EvalSettings, Variant
from cluster.judge import Judge
from cluster.references import References
from cluster.texts import EvalText, built_in_text
from cluster.traffic import bits_per_weight_moved, measure_traffic
from expert_store.format import load_manifest
from expert_store.types import Manifest
from gpu_worker.scoring import Score, cut_windows

ROW_VERSION = 2
"""Of what is measured and how: rows that another version kept are measured again."""


def evaluate(
    variants: Sequence[Variant],
    texts: Sequence[EvalText],
    settings: EvalSettings,
    *,
    original: Path | None = None,
    rows: RowFile | None = None,
    references: References | None = None,
) -> Iterator[EvalRow]:
    """A row per variant and text, as they are done; the first variant is the baseline.

    `original` is the store whose next-token distributions the variants' are held against: it is run
    once for all of them, and its distributions are kept in `references` (None: the cache folder).
    What `rows` holds is not measured again.
    Raises ValueError when a text is too short or settings do not fit, StoreError for a store.
    """
    judge = Judge(original, references)
    baseline: dict[str, EvalRow] = {}
    for variant in variants:
        manifest = load_manifest(variant.store)
        with ExitStack() as stack:
            ready: OpenVariant | None = None
            for text in texts:
                key = row_key(variant, manifest, text, settings, judge.version)
                row = None if rows is None else rows.get(key)
                if row is None:
                    if ready is None:
                        ready = stack.enter_context(opened(variant, settings))
                    row = _measured(variant, ready, text, settings, judge)
                    if rows is not None:
                        rows.add(key, row)
                row = replace(row, experts=variant.label)
                yield against(baseline.setdefault(text.name, row), row)


DEMO_SETTINGS = EvalSettings(
    windows=24, decode_tokens=64, warm_up=0, batch=(1,), cache_percent=(0.0,)
)


def demo_rows(
    store: Path, original: Path, settings: EvalSettings = DEMO_SETTINGS
) -> Iterator[EvalRow]:
    """Original, static codes, compensators, near data: a row each on the built-in text."""
    recipe = load_manifest(store).recipe
    compensated = f"{recipe.bits:g}-bit + compensators Top-{recipe.top_n}"
    variants = [
        Variant("original bf16", original),
        Variant(f"static {recipe.bits:g}-bit", store, top_n=0),
        Variant(compensated, store, top_n=recipe.top_n),
        Variant("the same, near-data on", store, top_n=recipe.top_n, near_data=True),
    ]
    return evaluate(variants, [built_in_text()], settings)


def row_key(
    variant: Variant,
    manifest: Manifest,
    text: EvalText,
    settings: EvalSettings,
    original: str | None,
) -> Mapping[str, Any]:
    """All that a row depends on, as plain values; `original` is the version of its store."""
    return {
        "row_version": ROW_VERSION,
        "store": manifest.version,
        "policies": variant.policies(),
        "near_data": variant.near_data,
        "text": [text.name, hashlib.sha256(text.text.encode()).hexdigest()],
        "settings": dataclasses.asdict(settings),
        "original": original,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _measured(
    variant: Variant, ready: OpenVariant, text: EvalText, settings: EvalSettings, judge: Judge
) -> EvalRow:
    """Score the text, then count bytes for where its tokens went."""
    start_s = time.perf_counter()
    judged = judge.judge(ready, _windows(text, ready, settings))
    score, trace = judged.score, judged.trace
    return EvalRow(
        experts=variant.label,
        text=text.name,
        **measures(score.window_nats, judged.window_kl, judged.window_agreement),
        more_nats=None,
        more_nats_error=None,
        bits_per_weight_moved=bits_per_weight_moved(trace, ready, settings),
        stored_bytes=ready.source.num_bytes,
        traffic=measure_traffic(trace, ready, settings),
        **_pair_counts(score),
        seconds=time.perf_counter() - start_s,
    )


def _windows(text: EvalText, ready: OpenVariant, settings: EvalSettings) -> torch.Tensor:
    """[W, window_tokens + 1] token ids."""
    model = ready.manifest.model
    if settings.window_tokens > model.max_positions:
        raise ValueError(
            f"window_tokens: got {settings.window_tokens}, but {model.name} has "
            f"{model.max_positions} positions"
        )
    if ready.model.tokenizer is None:
        raise ValueError("this store has no tokenizer, so no text can be evaluated with it")
    # verbose: the whole text is longer than the model's context, which is no reason to warn.
    ids = ready.model.tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    try:
        return cut_windows(
            ids,
            num_windows=settings.windows,
            window_tokens=settings.window_tokens,
            seed=settings.seed,
        )
    except ValueError as error:
        raise ValueError(f"{text.name}: {error}") from error


def _pair_counts(score: Score) -> dict[str, Any]:
    """What became of the (token, expert) pairs of the scored tokens."""
    counters = score.counters
    pairs = counters.restored_pairs + counters.low_bit_pairs
    pairs += counters.degraded_pairs + counters.skipped_pairs
    return {
        "degraded_pairs": counters.degraded_pairs,
        "restored_share": counters.restored_pairs / pairs,
        "skipped_share": counters.skipped_pairs / pairs,
    }
