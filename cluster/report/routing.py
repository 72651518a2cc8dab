"""Router skew of a model on a text, from a scoring pass over a few windows of it."""

from __future__ import annotations

from pathlib import Path

import torch

from cluster.eval_model import opened
from cluster.eval_settings import EvalSettings, Variant
from cluster.report.store_sections import LayerSkew, skew_of_traces
from cluster.texts import EvalText
from gpu_worker.replay import recorded
from gpu_worker.scoring import cut_windows, score_windows

MAX_WINDOWS = 8
"""Two thousand tokens tell how uneven a router is."""


def skew_of_store(store: Path, text: EvalText, settings: EvalSettings) -> list[LayerSkew]:
    """Raises ValueError for a store without a tokenizer or a text that is too short."""
    with opened(Variant("router", store)) as ready:
        if ready.model.tokenizer is None:
            raise ValueError(f"{store}: no tokenizer, so no text can be read with it")
        ids = ready.model.tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
        windows_WT: torch.Tensor = cut_windows(
            ids,
            num_windows=min(MAX_WINDOWS, settings.windows),
            window_tokens=settings.window_tokens,
            seed=settings.seed,
        )
        with recorded(ready.model.runner) as recorder:
            score_windows(ready.model.runner, windows_WT, batch=1)
        trace = recorder.trace(settings.window_tokens)
        return skew_of_traces(trace.layers, ready.manifest.model.num_experts)
