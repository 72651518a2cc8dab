"""The safetensors shards of a checkpoint folder: which there are, and their tensors, not read yet.

Knows no family and no expert.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from expert_store.errors import CheckpointError, StoreFormatError
from expert_store.files import TensorEntry, read_header, read_tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the checkpoint, not read yet."""

    path: Path
    entry: TensorEntry

    def read(self, row: int | None = None) -> torch.Tensor:
        try:
            return read_tensor(self.path, self.entry, row)
        except StoreFormatError as error:
            raise CheckpointError(str(error)) from error


def open_shards(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name. CheckpointError for missing or broken shards."""
    tensors: dict[str, StoredTensor] = {}
    for shard in _shard_paths(path):
        try:
            header = read_header(shard)
        except StoreFormatError as error:
            raise CheckpointError(str(error)) from error
        for name, entry in header.items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is in two shards; remove one")
            tensors[name] = StoredTensor(shard, entry)
    return tensors


def _shard_paths(path: Path) -> list[Path]:
    if (path / INDEX_FILE).is_file():
        try:
            names = sorted(set(json.loads((path / INDEX_FILE).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / INDEX_FILE}: malformed: {error}") from error
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise CheckpointError(
                    f"{path}: shard {name!r} of {INDEX_FILE} is missing; download it again"
                )
        return [path / name for name in names]
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if shards := sorted(path.glob("*.safetensors")):
        return shards
    raise CheckpointError(
        f"{path}: no *.safetensors; other weight files (*.bin, *.pt) are not read: convert them "
        "with transformers' save_pretrained"
    )
