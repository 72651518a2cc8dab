"""Scores windows of text and holds them to the original, whose own pass is made once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.environment import cache_folder
from cluster.eval_model import OpenVariant, opened
from cluster.eval_settings import Variant
from cluster.references import References, reference_key
from expert_store.format import load_manifest
from gpu_worker.reference import Comparison, Reference, ReferenceWriter
from gpu_worker.replay import RoutingTrace, recorded
from gpu_worker.scoring import Score, WindowObserver, score_windows

PREFILL_BATCH = 4


@dataclass(frozen=True, slots=True)
class Judged:
    """A scoring pass. Without an original, `window_kl` and `window_agreement` are empty."""

    score: Score
    window_kl: tuple[float, ...]
    window_agreement: tuple[float, ...]
    trace: RoutingTrace  # where the tokens of the pass went


class Judge:
    """Judges variants against the store `original`; without one, by their loss alone.

    `references` is where the original's distributions are kept; None is the cache folder.
    """

    def __init__(self, original: Path | None, references: References | None = None) -> None:
        self._original = original
        self._manifest = None if original is None else load_manifest(original)
        self._references = references or References(cache_folder() / "references")

    @property
    def version(self) -> str | None:
        """Of the original's store."""
        return None if self._manifest is None else self._manifest.version

    def judge(self, variant: OpenVariant, windows_WT: torch.Tensor) -> Judged:
        """Score the windows [W, T + 1] with this variant.

        Raises ValueError when the original's distributions are too large to keep, StoreError when
        the original cannot be read.
        """
        if self._manifest is None:
            score, trace = _scored(variant, windows_WT, [])
            return Judged(score, (), (), trace)
        key = reference_key(self._manifest.version, windows_WT, variant.model.config.torch_dtype)
        reference = self._references.find(key)
        if reference is None:
            num_windows, width = windows_WT.shape
            shape = (num_windows, width - 1, self._manifest.model.vocab_size)
            writer = self._references.writer(key, shape)
            if self._is_original(variant):
                score, trace, _ = _made(variant, windows_WT, writer)
                # It is what others are held against: no divergence, by what the words mean.
                return Judged(score, (0.0,) * num_windows, (1.0,) * num_windows, trace)
            reference = self._of_original(windows_WT, writer)
        comparison = Comparison(reference)
        score, trace = _scored(variant, windows_WT, [comparison])
        return Judged(score, comparison.window_kl, comparison.window_agreement, trace)

    def _is_original(self, variant: OpenVariant) -> bool:
        """Whether this is the original's store, with every expert of a token run on the device."""
        config = variant.model.config
        plain = config.near_data == "off" and config.skip_below == 0
        return plain and variant.manifest.version == self.version

    def _of_original(self, windows_WT: torch.Tensor, writer: ReferenceWriter) -> Reference:
        assert self._original is not None, "only a judge with an original has a reference to make"
        with opened(Variant("original", self._original)) as original:
            return _made(original, windows_WT, writer)[2]


def _scored(
    variant: OpenVariant, windows_WT: torch.Tensor, observers: Sequence[WindowObserver]
) -> tuple[Score, RoutingTrace]:
    runner = variant.model.runner
    with recorded(runner) as recorder:
        score = score_windows(runner, windows_WT, batch=PREFILL_BATCH, observers=observers)
    return score, recorder.trace(windows_WT.shape[1] - 1)


def _made(
    variant: OpenVariant, windows_WT: torch.Tensor, writer: ReferenceWriter
) -> tuple[Score, RoutingTrace, Reference]:
    """Score, and make a reference of it."""
    try:
        score, trace = _scored(variant, windows_WT, [writer])
        return score, trace, writer.finish()
    except BaseException:
        writer.abandon()
        raise
