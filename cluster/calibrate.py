"""A calibration from texts: reads them with the original model and writes what its experts saw.

Everything in this process, out of a store of the model's own bfloat16 experts. Knows no command.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.stores import Report, original_store
from cluster.texts import EvalText
from expert_store.calibration import Calibration, save_calibration
from expert_store.checkpoint import Checkpoint
from expert_store.segment import Segment
from expert_store.statistics import (
    CalibratedModel,
    CalibrationInfo,
    LayerStatistics,
    MomentForms,
    Sensitivity,
    TextInfo,
)
from expert_store.types import Manifest, ModelInfo
from gpu_worker.build import load_tokenizer, open_model
from gpu_worker.calibrate import collect
from gpu_worker.config import WorkerConfig
from gpu_worker.scoring import cut_windows

Progress = Callable[[int, int], None]
"""Told the tokens that are done since the last call, and all of them."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How much is read. Raises ValueError naming field, value and what is allowed.

    tokens are shared among the texts, in windows; seed places windows and draws the words whose
    gradients are taken. With `alike` every token counts the same in what an expert sees; without,
    by what an error there costs.
    """

    tokens: int = 16_384
    window_tokens: int = 256
    seed: int = 0
    alike: bool = False

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("window_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True, slots=True)
class _Windows:
    """Token windows [W, T] of all texts, and how many tokens each text gave."""

    ids_WT: torch.Tensor
    texts: tuple[TextInfo, ...]


def calibrate(
    model: Path,
    folder: Path,
    texts: Sequence[EvalText],
    settings: CalibrationSettings | None = None,
    *,
    report: Report | None = None,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Read the texts with the checkpoint in `model` and write a calibration into `folder`.

    Texts with less than was asked give what they have. Raises ValueError for a folder that is not
    new or empty, for texts of less than one window and for a model without a tokenizer;
    CheckpointError for an unusable checkpoint, StoreWriteError for a full disk.
    """
    settings = settings or CalibrationSettings()
    check_new(folder)
    checked = Checkpoint(model).model_info
    windows = _windows(model, checked, texts, settings)
    folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is known at once
    store = original_store(model, report)
    source = Segment(store)
    try:
        statistics = _collected(store, source, windows.ids_WT, settings, progress)
        info = _info(source.manifest, windows, settings, statistics)
    finally:
        source.close()
    return save_calibration(folder, info, {layer: one.tensors for layer, one in statistics.items()})


def check_new(folder: Path) -> None:
    """ValueError unless the folder is new or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(
            f"OUT: {folder} is there already and not an empty folder; choose another, or delete it"
        )


def _collected(
    store: Path,
    source: Segment,
    windows_WT: torch.Tensor,
    settings: CalibrationSettings,
    progress: Progress,
) -> dict[int, LayerStatistics]:
    opened = open_model(store, source, None, WorkerConfig())
    try:
        return collect(
            opened.runner,
            source,
            windows_WT,
            seed=settings.seed,
            alike=settings.alike,
            progress=lambda done: progress(done, windows_WT.numel()),
        )
    finally:
        opened.close()


def _windows(
    model: Path, info: ModelInfo, texts: Sequence[EvalText], settings: CalibrationSettings
) -> _Windows:
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ValueError(f"{model}: has no tokenizer files, so it can read no text")
    width = min(settings.window_tokens, info.max_positions)
    # verbose: the whole text is longer than the model's context, which is no reason to warn.
    ids = [
        tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts
    ]
    shares = allot([len(one) // width for one in ids], -(-settings.tokens // width))
    if not any(shares):
        raise ValueError(
            f"--text: {sum(map(len, ids))} tokens in {len(texts)} texts are too few: a window "
            f"needs {width} tokens of one text; give more text"
        )
    cut = [
        cut_windows(one, num_windows=share, window_tokens=width - 1, seed=settings.seed)
        for one, share in zip(ids, shares, strict=True)
        if share
    ]
    told = tuple(
        TextInfo(text.name, share * width, hashlib.sha256(text.text.encode()).hexdigest())
        for text, share in zip(texts, shares, strict=True)
    )
    return _Windows(torch.cat(cut), told)


def allot(capacities: Sequence[int], total: int) -> list[int]:
    """Shares of `total`, as equal as capacities allow; all of them when they do not reach it."""
    shares = [0] * len(capacities)
    by_size = sorted(range(len(capacities)), key=capacities.__getitem__)
    for place, index in enumerate(by_size):
        shares[index] = min(capacities[index], -(-total // (len(by_size) - place)))
        total -= shares[index]
    return shares


def _info(
    manifest: Manifest,
    windows: _Windows,
    settings: CalibrationSettings,
    statistics: dict[int, LayerStatistics],
) -> CalibrationInfo:
    return CalibrationInfo(
        model=CalibratedModel.of(manifest.model),
        texts=windows.texts,
        asked_tokens=settings.tokens,
        num_tokens=windows.ids_WT.numel(),
        window_tokens=windows.ids_WT.shape[1],
        seed=settings.seed,
        forms=MomentForms.of(manifest.model),
        alike=settings.alike,
        tables={layer: one.table for layer, one in statistics.items()},
        sensitivity=Sensitivity(
            windows.ids_WT.numel(), {layer: one.nats for layer, one in statistics.items()}
        ),
    )
