"""Puts a worker together in one process: model, experts, tokenizer, engine.

What it is given (the source, the near-data client) stays the caller's to close.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.experts import StoreExperts
from gpu_worker.model import ModelRunner, load_model
from gpu_worker.protocols import ExpertSource, NearData

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


def open_model(
    store: Path, source: ExpertSource, near_data: NearData | None, config: WorkerConfig
) -> OpenModel:
    """The model in `store` with its experts from `source` and, by the config's policy, near data.

    Raises ValueError when the config does not fit, StoreFormatError when the store is not whole.
    """
    config = config.resolve(source.manifest)
    logger.info("worker config: %s", config)
    experts = StoreExperts(source, config, near_data)
    try:
        runner = load_model(store, source.manifest, config, experts)
        return OpenModel(runner, load_tokenizer(store), config, experts.close)
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
) -> Engine:
    """An engine over `open_model`. Its `close` leaves `source` and `near_data` open."""
    opened = open_model(store, source, near_data, config)
    assert opened.config.max_context is not None, "resolved configs have a context"
    return Engine(
        opened.runner,
        opened.tokenizer,
        max_sequences=opened.config.max_sequences,
        max_context=opened.config.max_context,
        prefill_chunk=opened.config.prefill_chunk,
        max_waiting=max_waiting,
        on_close=opened.close,
    )


def load_tokenizer(store: Path) -> PreTrainedTokenizerBase | None:
    """The store's tokenizer; None when the store has no tokenizer files."""
    if not any((store / name).is_file() for name in TOKENIZER_FILES):
        logger.warning(
            "%s has no tokenizer: prompts must be token ids, answers have no text", store
        )
        return None
    tokenizer = AutoTokenizer.from_pretrained(store, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerBase), type(tokenizer)
    return tokenizer
