"""Stores that can be made again, kept in the cache folder: the bundled model's, and bf16 baselines.

Knows which model each is made of; how is `expert_store/compress.py`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from cluster.environment import cache_folder, default_store
from expert_store.config import CompressionConfig
from expert_store.errors import StoreFormatError
from expert_store.format import is_store, load_manifest
from models import MIXTRAL_MINI

if TYPE_CHECKING:
    from expert_store.compress import Progress

logger = logging.getLogger(__name__)

BUNDLED = CompressionConfig(recipe="paper")
"""Of the bundled model's store: what the product began with, and what the demo's table shows."""
Report: TypeAlias = "Callable[[Progress], None]"


def folder(text: str) -> Path:
    """A command's STORE. Raises ValueError for an empty one, which Path would take as "."."""
    if not text:
        raise ValueError("STORE: got an empty path, expected the folder of a store")
    return Path(text)


def bundled_store(report: Report | None = None) -> Path:
    """The store of the bundled model with the paper's recipe, made on first use (seconds)."""
    return _ensure(MIXTRAL_MINI, default_store(), BUNDLED, report)


def compressed_store(model: Path, config: CompressionConfig, report: Report | None = None) -> Path:
    """A store of any checkpoint folder; made on first use, and when files or config change."""
    name = f"{model.resolve().name}-{config.recipe}-{_digest(model, repr(config))}"
    return _ensure(model, cache_folder() / "stores" / name, config, report)


def original_store(model: Path, report: Report | None = None) -> Path:
    """A store of the checkpoint's own bfloat16 experts, so that its bytes are counted alike.

    As large as the checkpoint. Made on first use, and again when the checkpoint's files change.
    """
    name = f"{model.resolve().name}-original-{_digest(model)}"
    config = CompressionConfig(recipe="original")
    return _ensure(model, cache_folder() / "stores" / name, config, report)


def _digest(model: Path, *more: str) -> str:
    """Of where a checkpoint lies and its files' sizes and times, in 12 digits."""
    files = sorted(path for path in model.iterdir() if path.is_file())
    told = [str(model.resolve()), *(f"{f.name} {_stamp(f)}" for f in files), *more]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _ensure(model: Path, store: Path, config: CompressionConfig, report: Report | None) -> Path:
    """`store`, made if it is not there or of a format that this version does not read."""
    if is_store(store):
        try:
            load_manifest(store)
            return store
        except StoreFormatError as error:
            logger.warning("making the store again: %s", error)
    # The compressor brings transformers: seconds that a store which is there need not wait for.
    from expert_store.compress import compress

    store.parent.mkdir(parents=True, exist_ok=True)
    curves = cache_folder() / "curves"
    compress(model, store, config, progress=report, force=True, curves=curves)
    return store
