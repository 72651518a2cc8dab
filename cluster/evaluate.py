"""Perplexity of a store on texts, with the expert bytes it moves per token. One process, no Ray.

Every kind of experts, the original bf16 included, is a store and goes through the same code, so
that its bytes are counted by the same transport.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.table import counted
from cluster.texts import EvalText, built_in_text
from expert_store.format import load_manifest
from expert_store.segment import Segment
from expert_store.types import Manifest
from gpu_worker.build import OpenModel, open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.protocols import NearData
from gpu_worker.scoring import Score, cut_windows, score_decode, score_windows
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpClient, NdpServer

PREFILL_BATCH = 4
NEAR_DATA_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """What is measured. Raises ValueError naming field, value and what is allowed.

    - windows of window_tokens predicted tokens each give the perplexity;
    - batch sequences decode decode_tokens each, one token a step; bytes per token are counted
      there, after warm_up steps, with a cache of cache_percent of the store's codes bytes;
    - seed None takes windows from fixed places of a text, else from random ones.
    """

    windows: int = 32
    window_tokens: int = 256
    decode_tokens: int = 40
    warm_up: int = 8
    batch: int = 4
    cache_percent: float = 25.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("windows", "window_tokens", "decode_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not 0 <= self.warm_up < self.decode_tokens:
            raise ValueError(
                f"warm_up: got {self.warm_up}, expected 0 to {self.decode_tokens - 1}, less than "
                "decode_tokens"
            )
        if not (math.isfinite(self.cache_percent) and 0 <= self.cache_percent <= 1000):
            raise ValueError(f"cache_percent: got {self.cache_percent}, expected 0 to 1000")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the experts: of which store, how many restored, near data or not."""

    label: str
    store: Path
    top_n: int | None = None  # None: what the store says
    near_data: bool = False


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One variant on one text. Bytes are per decoded token; errors are standard errors."""

    experts: str
    text: str
    perplexity: float
    nats: float
    nats_error: float
    more_nats: float | None  # than the first variant on the same windows
    more_nats_error: float | None  # of the paired difference, smaller than nats_error
    moved_bytes: float  # expert records to the device
    codes_bytes: float
    factors_bytes: float
    planned_bytes: float  # what the dispatch plans asked for; equals moved_bytes
    near_data_bytes: float  # activations to and from near data
    degraded_pairs: int
    cache_bytes: int
    seconds: float
    window_nats: tuple[float, ...]


def evaluate(
    variants: Sequence[Variant], texts: Sequence[EvalText], settings: EvalSettings
) -> Iterator[EvalRow]:
    """A row per variant and text, as they are done; the first variant is the baseline.

    Raises ValueError when a text is too short or settings do not fit, StoreError for a store.
    """
    baseline: dict[str, EvalRow] = {}
    for variant in variants:
        with _opened(variant, settings) as opened:
            for text in texts:
                row = _row(variant, text, opened, settings)
                yield _against(baseline.setdefault(text.name, row), row)


DEMO_SETTINGS = EvalSettings(windows=24, decode_tokens=64, warm_up=0, batch=1, cache_percent=0)


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


def as_cells(row: EvalRow) -> dict[str, Any]:
    """One line of the table that people read."""
    more = None
    if row.more_nats is not None:
        more = f"{row.more_nats:+.4f} ± {row.more_nats_error:.4f}"
    return {
        "experts": row.experts,
        "text": row.text,
        "perplexity": f"{row.perplexity:.2f} ± {row.perplexity * row.nats_error:.2f}",
        "more nats": more,
        "expert KB/token": round(row.moved_bytes / 1000, 1),
        "near-data KB/token": round(row.near_data_bytes / 1000, 1),
        "cache MB": round(row.cache_bytes / 1e6, 1),
    }


def conditions(settings: EvalSettings) -> str:
    """What the table was measured with, in a sentence."""
    num_steps = settings.decode_tokens - settings.warm_up
    return (
        f"Perplexity over {counted(settings.windows, 'window')} of "
        f"{counted(settings.window_tokens, 'token')}; bytes moved per token over "
        f"{counted(num_steps, 'step')} of {counted(settings.batch, 'sequence')} side by side, "
        f"expert cache {settings.cache_percent:g} % of a line's own codes; "
        '"more nats" is the loss over the first line on the same windows.'
    )


@contextmanager
def _opened(variant: Variant, settings: EvalSettings) -> Iterator[OpenModel]:
    source = Segment(variant.store)
    try:
        with _near_data(variant, source) as near_data:
            config = WorkerConfig(
                top_n=variant.top_n,
                near_data="low_bit" if variant.near_data else "off",
                cache_bytes=cache_bytes(source.manifest, settings.cache_percent),
                max_sequences=settings.batch,
            )
            longest = max(settings.window_tokens, settings.decode_tokens)
            if longest > source.manifest.model.max_positions:
                raise ValueError(
                    f"window_tokens, decode_tokens: got {longest}, but "
                    f"{source.manifest.model.name} has {source.manifest.model.max_positions} "
                    "positions"
                )
            opened = open_model(variant.store, source, near_data, config)
            try:
                yield opened
            finally:
                opened.close()
    finally:
        source.close()


@contextmanager
def _near_data(variant: Variant, source: Segment) -> Iterator[NearData | None]:
    """A near-data worker in this process, called over a unix socket as a far one would be."""
    if not variant.near_data:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="moetier-") as folder:
        server = NdpServer(Executor(source), [f"unix:{folder}/near-data"])
        client = NdpClient(
            server.addresses, version=source.manifest.version, deadline_s=NEAR_DATA_DEADLINE_S
        )
        try:
            yield client
        finally:
            client.close()
            server.close()


def cache_bytes(manifest: Manifest, percent: float) -> int:
    """Device memory for `percent` of the codes of all experts: as many experts for every recipe."""
    codes = sum(info.codes.num_bytes for info in manifest.experts.values())
    return int(codes * percent / 100)


def _row(variant: Variant, text: EvalText, opened: OpenModel, settings: EvalSettings) -> EvalRow:
    start_s = time.perf_counter()
    windows, decoded = _scores(text, opened, settings)
    per_token = 1 / decoded.num_tokens
    return EvalRow(
        experts=variant.label,
        text=text.name,
        perplexity=windows.perplexity,
        nats=windows.nats,
        nats_error=windows.standard_error,
        more_nats=None,
        more_nats_error=None,
        moved_bytes=decoded.moved_bytes_per_token,
        codes_bytes=decoded.counters.moved_by_kind("codes") * per_token,
        factors_bytes=decoded.counters.moved_by_kind("factors") * per_token,
        planned_bytes=sum(decoded.counters.planned_bytes.values()) * per_token,
        near_data_bytes=decoded.near_data_bytes_per_token,
        degraded_pairs=(windows.counters + decoded.counters).degraded_pairs,
        cache_bytes=opened.config.cache_bytes,
        seconds=time.perf_counter() - start_s,
        window_nats=windows.window_nats,
    )


def _scores(text: EvalText, opened: OpenModel, settings: EvalSettings) -> tuple[Score, Score]:
    """Perplexity by windows, bytes by decode."""
    if opened.tokenizer is None:
        raise ValueError("this store has no tokenizer, so no text can be evaluated with it")
    # verbose: the whole text is longer than the model's context, which is no reason to warn.
    ids = opened.tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    try:
        windows_WT = cut_windows(
            ids,
            num_windows=settings.windows,
            window_tokens=settings.window_tokens,
            seed=settings.seed,
        )
        decode_BT = cut_windows(
            ids,
            num_windows=settings.batch,
            window_tokens=settings.decode_tokens,
            seed=settings.seed,
        )
    except ValueError as error:
        raise ValueError(f"{text.name}: {error}") from error
    by_window = score_windows(opened.runner, windows_WT, batch=PREFILL_BATCH)
    return by_window, score_decode(opened.runner, decode_BT, warm_up=settings.warm_up)


def _against(baseline: EvalRow, row: EvalRow) -> EvalRow:
    """The row with its loss over the baseline's, window by window; the baseline itself has none."""
    if row is baseline:
        return row
    pairs = zip(row.window_nats, baseline.window_nats, strict=True)
    more = [mine - theirs for mine, theirs in pairs]
    error = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else math.nan
    return replace(row, more_nats=statistics.fmean(more), more_nats_error=error)
