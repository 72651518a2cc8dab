"""The store that the one-process system runs on: made here with hqq, carried, completed there.

What is carried leaves out the dense tensors: they are the bundled checkpoint's own, and that
travels with the tree, which has a limit of 64 MiB.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from expert_store.assemble import dense_file
from expert_store.files import Disk
from expert_store.format import is_store
from expert_store.shards import StoredTensor, open_shards
from models import MIXTRAL_MINI

INDEX = "model.safetensors.index.json"


def prepare(store: Path) -> None:
    """Compress the bundled model into `store` and take its dense files out. Needs hqq."""
    # Here and not above: on a GPU machine without hqq everything but this must run.
    from expert_store.compress import compress
    from expert_store.config import CompressionConfig

    store.parent.mkdir(parents=True, exist_ok=True)
    manifest = compress(MIXTRAL_MINI, store, CompressionConfig(recipe="paper"), force=True)
    for name in manifest.dense_files:
        (store / name).unlink()


def whole_store(store: Path) -> Path:
    """`store` itself or, when `prepare` made it, a copy beside it with its dense files put back,
    byte for byte: their checksums are in the manifest.

    Raises FileNotFoundError when there is no store, saying how to make one.
    """
    if not is_store(store):
        raise FileNotFoundError(
            f"{store} is no store: run `python -m benchmarks.gpu_check --prepare` where hqq is "
            "installed and carry that folder along, or give another with --store"
        )
    index = store / INDEX
    places = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    lacking = [file for file in sorted(set(places.values())) if not (store / file).is_file()]
    if not lacking:
        return store
    whole = store.with_name(f"{store.name}-whole")
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(store, whole)
    for file in lacking:
        names = {name for name, place in places.items() if place == file}
        Disk().write_atomic(whole / file, *dense_file(_bundled_tensors(names)))
    return whole


def _bundled_tensors(names: set[str]) -> dict[str, StoredTensor]:
    bundled = open_shards(MIXTRAL_MINI)
    if missing := names - set(bundled):
        raise ValueError(f"{MIXTRAL_MINI} lacks {len(missing)} dense tensors: {min(missing)}, ...")
    return {name: bundled[name] for name in names}
