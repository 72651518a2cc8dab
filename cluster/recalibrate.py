"""Recalibrates the routers of a store, and says what that changed on text that was not fitted on.

How a router is fitted is `gpu_worker/recalibrate.py`, how it is written `expert_store/rewrite.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.eval_model import OpenVariant, opened
from cluster.eval_rows import measures, paired_difference
from cluster.eval_settings import Variant
from cluster.judge import Judge, Judged
from cluster.references import References
from cluster.texts import EvalText
from expert_store.errors import StoreFormatError
from expert_store.rewrite import dense_entries, rewrite_dense
from expert_store.types import Manifest
from gpu_worker.recalibrate import (
    Agreement,
    Order,
    RouterFit,
    agreement,
    mean_agreement,
    recalibrate,
)
from gpu_worker.replay import RoutingTrace
from gpu_worker.scoring import cut_windows

SUFFIX = "-recalibrated"
"""What a recipe's name ends with once the routers are not the checkpoint's any more."""


@dataclass(frozen=True, slots=True)
class RecalibrationSettings:
    """How much is read. Raises ValueError naming field, value and what is allowed."""

    tokens: int = 16_384  # fitted on and held out, shared among the texts
    eval_windows: int = 16  # of each evaluation text
    window_tokens: int = 256
    order: Order = "together"

    def __post_init__(self) -> None:
        for name in ("tokens", "eval_windows", "window_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, slots=True)
class Quality:
    """A store's fields of `measures` on the evaluation texts, and how its tokens are routed."""

    measures: dict[str, Any]
    layers: dict[int, Agreement]

    @property
    def routing(self) -> Agreement:
        return mean_agreement(self.layers)


@dataclass(frozen=True, slots=True)
class Recalibration:
    """The fits and what they changed; `manifest` is the new store's, None when not written."""

    fits: tuple[RouterFit, ...]
    before: Quality
    after: Quality
    manifest: Manifest | None

    def change(self, name: str) -> tuple[float, float | None]:
        """Of a measure by window ("window_nats", "window_kl", "window_agreement"): mean of after
        less before, and the standard error of that paired difference."""
        return paired_difference(self.after.measures[name], self.before.measures[name])


def recalibrate_store(
    store: Path,
    original: Path,
    texts: Sequence[EvalText],
    eval_texts: Sequence[EvalText],
    settings: RecalibrationSettings | None = None,
    *,
    write: bool = True,
    references: References | None = None,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> Recalibration:
    """Fit the routers of `store` to those of `original`, a store of the same model's own weights.

    Raises ValueError for another model's original, another family's router or too little text,
    StoreError for either store or a full disk; the store is then as it was.
    """
    settings = settings or RecalibrationSettings()
    with (
        opened(Variant("original", original)) as truth,
        opened(Variant("store", store)) as quantized,
    ):
        fitted = _windows(quantized, texts, settings, -(-settings.tokens // settings.window_tokens))
        unseen = _windows(quantized, eval_texts, settings, settings.eval_windows * len(eval_texts))
        result = recalibrate_windows(
            truth, quantized, fitted, unseen, settings, references=references, progress=progress
        )
        manifest = quantized.manifest
    if not write or not any(fit.moved for fit in result.fits):
        return result
    return Recalibration(
        result.fits, result.before, result.after, write_routers(store, manifest, result.fits)
    )


def recalibrate_windows(
    truth: OpenVariant,
    quantized: OpenVariant,
    fitted_WT: torch.Tensor,
    unseen_WT: torch.Tensor,
    settings: RecalibrationSettings,
    *,
    references: References | None = None,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> Recalibration:
    """Fit on some windows [W, T + 1] and judge on others; the routers in memory are the new ones
    afterwards, the store is untouched."""
    mine, theirs = quantized.manifest.model, truth.manifest.model
    if (mine.num_experts, mine.expert) != (theirs.num_experts, theirs.expert):
        raise ValueError(f"original: {theirs.name} is not the model that the store is made of")
    judge = Judge(truth.source.store, references)
    told = judge.judge(truth, unseen_WT)
    before = _quality(judge.judge(quantized, unseen_WT), told.trace)
    entries = dense_entries(quantized.source.store, quantized.manifest)
    names = router_names(quantized.manifest, {n: entry.shape for n, (_, entry) in entries.items()})
    stored = {entries[name][1].dtype for name in names.values()}
    fits = recalibrate(
        truth.model.runner,
        quantized.model.runner,
        fitted_WT,
        dtype=torch.float32 if stored == {"F32"} else torch.bfloat16,
        order=settings.order,
        progress=progress,
    )
    after = _quality(judge.judge(quantized, unseen_WT), told.trace)
    return Recalibration(tuple(fits), before, after, None)


def write_routers(store: Path, manifest: Manifest, fits: Sequence[RouterFit]) -> Manifest:
    """Put fitted routers into the store's dense files. The old store stays until the new is whole.

    Raises StoreWriteError, StoreFormatError when the store has no such tensors.
    """
    entries = dense_entries(store, manifest)
    names = router_names(manifest, {name: entry.shape for name, (_, entry) in entries.items()})
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensors = {}
    for fit in fits:
        name = names[fit.layer]
        tensors[name] = fit.weight_EH.to(dtypes[entries[name][1].dtype])
    recipe = manifest.recipe.name.removesuffix(SUFFIX) + SUFFIX
    return rewrite_dense(store, tensors, recipe_name=recipe)


def router_names(manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> dict[int, str]:
    """The name of each layer's router in the dense files, which keep the checkpoint's names.

    Raises StoreFormatError when a layer has none, or several that could be it.
    """
    found = {}
    for layer, num_experts in manifest.model.num_experts.items():
        name = re.compile(rf"(?:.*\.)?layers\.{layer}\..*\.gate\.weight")
        shape = (num_experts, manifest.model.expert.hidden)
        fitting = [key for key in shapes if name.fullmatch(key) and shapes[key] == shape]
        if len(fitting) != 1:
            raise StoreFormatError(
                f"layer {layer}: expected one dense tensor *.gate.weight {list(shape)}, found "
                f"{fitting}"
            )
        found[layer] = fitting[0]
    return found


def _quality(judged: Judged, truth: RoutingTrace) -> Quality:
    found = measures(judged.score.window_nats, judged.window_kl, judged.window_agreement)
    return Quality(found, agreement(truth, judged.trace))


def _windows(
    variant: OpenVariant,
    texts: Sequence[EvalText],
    settings: RecalibrationSettings,
    total: int,
) -> torch.Tensor:
    """[W, T + 1] windows, as many of each text."""
    tokenizer = variant.model.tokenizer
    if tokenizer is None:
        raise ValueError("this store has no tokenizer, so no text can be read with it")
    width = min(settings.window_tokens, variant.manifest.model.max_positions)
    parts = []
    for text in texts:
        # verbose: the whole text is longer than the model's context, which is no reason to warn.
        ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
        count = -(-total // len(texts))
        try:
            parts.append(cut_windows(ids, num_windows=count, window_tokens=width))
        except ValueError as error:
            raise ValueError(f"{text.name}: {error}") from error
    return torch.cat(parts)
