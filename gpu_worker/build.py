"""Puts a worker together in one process: model, experts, tokenizer, engine.

What it is given (the source, the near-data client) stays the caller's to close.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from expert_store.errors import StoreFormatError
from expert_store.verify import check_files
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.experts import StoreExperts
from gpu_worker.governor import Governor
from gpu_worker.model import ModelRunner, load_model
from gpu_worker.protocols import ExpertSource, NearData
from gpu_worker.router_guess import RouterGuess

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
MAX_WAITING = 32


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A store's model, ready to run, with what it was opened with."""

    runner: ModelRunner
    tokenizer: PreTrainedTokenizerBase | None  # None when the store has none
    config: WorkerConfig  # resolved
    close: Callable[[], None]  # ends the threads that fetch experts
    governor: Governor | None  # where a latency target is set


def open_model(
    store: Path,
    source: ExpertSource,
    near_data: NearData | None,
    config: WorkerConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> OpenModel:
    """The model in `store` with its experts from `source` and, by the config's policy, near data.

    Raises ValueError when the config does not fit, StoreFormatError when the store is not whole,
    CorruptRecordError when one of its dense or side files was changed.
    """
    asked_context = config.max_context
    config = config.resolve(source.manifest)
    check_files(store, source.manifest)
    experts = StoreExperts(source, config, near_data, clock=clock)
    try:
        runner = load_model(store, source.manifest, config, experts)
        experts.predict_with(RouterGuess.of(runner.model, source.manifest.model.top_k))
        context = usable_context(runner.model.config, config.max_context, asked_context)
        config = replace(config, max_context=context)
        logger.info("worker config: %s", config)
        return OpenModel(
            runner, load_tokenizer(store), config, experts.close, experts.costing.governor
        )
    except BaseException:
        experts.close()
        raise


def build_engine(
    store: Path,
    source: ExpertSource,
    near_data: NearData | None,
    config: WorkerConfig,
    *,
    max_waiting: int = MAX_WAITING,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """An engine over `open_model`. Its `close` leaves `source` and `near_data` open."""
    opened = open_model(store, source, near_data, config, clock=clock)
    assert opened.config.max_context is not None, "resolved configs have a context"
    return Engine(
        opened.runner,
        opened.tokenizer,
        max_sequences=opened.config.max_sequences,
        max_context=opened.config.max_context,
        prefill_chunk=opened.config.prefill_chunk,
        max_waiting=max_waiting,
        on_close=opened.close,
        governor=opened.governor,
        clock=clock,
    )


def usable_context(model: PretrainedConfig, resolved: int | None, asked: int | None) -> int:
    """The context in which a position's rotation is the same for every sequence.

    "longrope" models (Phi-3.5-MoE) rotate all positions of a step another way once any is past the
    original context: keys that are cached, and other sequences, would be wrong.
    Raises ValueError when more than that was asked for.
    """
    assert resolved is not None, "resolved configs have a context"
    rope = getattr(model, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") != "longrope" or limit is None or resolved <= limit:
        return resolved
    if asked is not None:
        raise ValueError(
            f"max_context: got {asked}, but this model's longrope changes all positions past "
            f"{limit}, which keys of running sequences do not survive; use at most {limit}"
        )
    logger.warning(
        "context cut from %d to %d tokens: longrope beyond is not served", resolved, limit
    )
    return int(limit)


def load_tokenizer(store: Path) -> PreTrainedTokenizerBase | None:
    """The store's tokenizer; None when the store has no tokenizer files.

    Raises StoreFormatError when the files that there are make no tokenizer.
    """
    if not any((store / name).is_file() for name in TOKENIZER_FILES):
        logger.warning(
            "%s has no tokenizer: prompts must be token ids, answers have no text", store
        )
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(store, local_files_only=True)
    except Exception as error:  # a damaged file ends in whatever the parser met first
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise StoreFormatError(
            f"{store}: the tokenizer's files cannot be read ({cause}); copy them again from the "
            "model, or compress it again with --force"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase), type(tokenizer)
    return tokenizer
