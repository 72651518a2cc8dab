"""Measures the cells of a study: the original's pass over each text, then a pass for each cell.

The experts of a cell go through encoder, worker and decoder as a store of that codec would have
them; all others stay the original's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from cluster.eval_model import OpenVariant
from cluster.eval_rows import EvalRow, RowFile, measures
from cluster.judge import PREFILL_BATCH, Judge
from cluster.references import References, reference_key
from cluster.study_cells import Cell, StudySettings, Treatment
from cluster.study_source import Encoder
from cluster.texts import EvalText
from expert_store.types import ExpertKey, Manifest
from gpu_worker.experts import StoreExperts
from gpu_worker.injection import Injection
from gpu_worker.model import ModelRunner, StepExperts, bind_experts
from gpu_worker.noise import NoisyWindows
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.reference import Comparison, Reference
from gpu_worker.replay import RoutingTrace, recorded, uncached_bytes, weights_per_token
from gpu_worker.scoring import Score, score_windows

STUDY_VERSION = 1
"""Of what is measured and how: rows that another version kept are measured again."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A text's windows [W, T + 1] and what the original makes of them."""

    text: EvalText
    windows_WT: torch.Tensor
    reference: Reference
    row: EvalRow
    tokens: Mapping[int, Sequence[int]]  # layer -> routed tokens of each expert


class Bench:
    """One original model and the cells that are measured on it.

    `rows` are kept and not measured again; the records of one treatment at a time are in memory.
    """

    def __init__(
        self,
        original: OpenVariant,
        settings: StudySettings,
        references: References,
        rows: RowFile | None = None,
    ) -> None:
        self._original = original
        self._settings = settings
        self._references = references
        self._judge = Judge(original.source.store, references)
        self._kept = rows
        self._encoder: tuple[Treatment, Encoder] | None = None

    def passage(self, text: EvalText, windows_WT: torch.Tensor) -> Passage:
        """The original's pass over windows of a text: distributions, losses and routing."""
        start_s, original = time.perf_counter(), self._original
        judged = self._judge.judge(original, windows_WT)
        dtype = original.model.config.torch_dtype
        reference = self._references.find(
            reference_key(original.manifest.version, windows_WT, dtype)
        )
        assert reference is not None, f"the judge made no reference for {text.name}"
        exact = Judged(judged.score, (0.0,) * len(windows_WT), (1.0,) * len(windows_WT))
        row = self._row("original", text, exact, judged.trace, original.manifest, start_s)
        tokens = tokens_of(judged.trace, original.manifest)
        return Passage(text, windows_WT, reference, row, tokens)

    def row(self, cell: Cell, passage: Passage) -> EvalRow:
        """What the cell costs on one text: read, or measured and kept."""
        key = self._key(cell, passage)
        row = None if self._kept is None else self._kept.get(key)
        if row is None:
            row = self._measured(cell, passage)
            if self._kept is not None:
                self._kept.add(key, row)
        return replace(row, experts=str(cell), text=passage.text.name)

    def coded_bits(self, cell: Cell, row: EvalRow) -> float | None:
        """Bits per weight of the cell's experts, from the bytes of all experts; None for noise."""
        if cell.treatment.method == "noise":
            return None
        manifest = self._original.manifest
        whole = {key: info.codes.num_bytes for key, info in manifest.experts.items()}
        coded = _keys(cell)
        rest = sum(whole.values()) - sum(whole[key] for key in coded)
        shape = manifest.model.expert
        return 8 * (row.stored_bytes - rest) / (len(coded) * 3 * shape.hidden * shape.ffn)

    def _key(self, cell: Cell, passage: Passage) -> dict[str, Any]:
        settings = self._settings
        return {
            "study_version": STUDY_VERSION,
            "store": self._original.manifest.version,
            "treatment": dataclasses.asdict(cell.treatment),
            "targets": {str(layer): sorted(cell.targets[layer]) for layer in sorted(cell.targets)},
            "text": [passage.text.name, hashlib.sha256(passage.text.text.encode()).hexdigest()],
            "windows": list(passage.windows_WT.shape),
            "seed": settings.seed if cell.treatment.method == "noise" else None,
            "device": str(self._original.model.config.device),
        }

    def _measured(self, cell: Cell, passage: Passage) -> EvalRow:
        start_s = time.perf_counter()
        comparison = Comparison(passage.reference)
        with self._experts(cell) as (experts, manifest, batch):
            runner = ModelRunner(self._original.model.runner.model, experts)
            with recorded(runner) as recorder:
                score = score_windows(
                    runner, passage.windows_WT, batch=batch, observers=[comparison]
                )
        judged = Judged(score, comparison.window_kl, comparison.window_agreement)
        trace = recorder.trace(passage.windows_WT.shape[1] - 1)
        return self._row(str(cell), passage.text, judged, trace, manifest, start_s)

    @contextmanager
    def _experts(self, cell: Cell) -> Iterator[tuple[StepExperts, Manifest, int]]:
        """The cell's experts bound to the model, the manifest that they have, windows at once."""
        original = self._original
        runner = original.model.runner
        if cell.treatment.method == "noise":
            # A window at a time: each has a draw of its own.
            injection = Injection(dict(cell.targets), cell.treatment.energy)
            noisy = NoisyWindows(runner.experts, injection, self._settings.seed)
            with _bound(runner, noisy):
                yield noisy, original.manifest, 1
            return
        source = self._encoder_of(cell.treatment).source(_keys(cell))
        coded = StoreExperts(source, original.model.config)
        try:
            with _bound(runner, coded):
                yield coded, source.manifest, PREFILL_BATCH
        finally:
            coded.close()

    def _encoder_of(self, treatment: Treatment) -> Encoder:
        if self._encoder is None or self._encoder[0] != treatment:
            assert treatment.method != "noise", "noise has no records"
            encoder = Encoder(self._original.source, treatment.method, treatment.bound)
            self._encoder = treatment, encoder
        return self._encoder[1]

    def _row(
        self,
        name: str,
        text: EvalText,
        judged: Judged,
        trace: RoutingTrace,
        manifest: Manifest,
        start_s: float,
    ) -> EvalRow:
        sizes, config = RecordSizes.of(manifest), self._original.model.config
        moved = uncached_bytes(trace, config.pair_policy(manifest), sizes)
        return EvalRow(
            experts=name,
            text=text.name,
            **measures(judged.score.window_nats, judged.window_kl, judged.window_agreement),
            more_nats=None,
            more_nats_error=None,
            bits_per_weight_moved=8 * moved / weights_per_token(manifest),
            stored_bytes=sum(sizes.codes.values()),
            traffic=(),
            degraded_pairs=0,
            restored_share=0.0,
            skipped_share=0.0,
            seconds=time.perf_counter() - start_s,
        )


@dataclass(frozen=True, slots=True)
class Judged:
    """A pass and how far it is from the original, window by window."""

    score: Score
    window_kl: tuple[float, ...]
    window_agreement: tuple[float, ...]


def tokens_of(trace: RoutingTrace, manifest: Manifest) -> dict[int, list[int]]:
    """Routed tokens of each expert, by layer."""
    found = {}
    for layer, one in trace.layers.items():
        ids = one.topk_ids_WTK.flatten().to(torch.int64)
        found[layer] = ids.bincount(minlength=manifest.model.num_experts[layer]).tolist()
    return found


def _keys(cell: Cell) -> list[ExpertKey]:
    return [ExpertKey(layer, e) for layer, some in cell.targets.items() for e in sorted(some)]


@contextmanager
def _bound(runner: ModelRunner, experts: StepExperts) -> Iterator[None]:
    bind_experts(runner.model, experts)
    try:
        yield
    finally:
        bind_experts(runner.model, runner.experts)
