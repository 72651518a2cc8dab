"""A store with some dense tensors replaced: made whole beside the old one, then put in its place.

Files that stay are hard links, so that a rewrite costs the dense files alone. Knows no router.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from expert_store.errors import StoreFormatError
from expert_store.files import Chunk, Disk, TensorEntry, read_bytes, read_header
from expert_store.format import MANIFEST_FILE, content_version, load_manifest, save_manifest
from expert_store.staging import PARTIAL
from expert_store.types import Manifest

_COPY_CHUNK = 8 << 20


def dense_entries(store: Path, manifest: Manifest) -> dict[str, tuple[str, TensorEntry]]:
    """Every dense tensor's file and place, by name. Raises StoreFormatError."""
    return {
        name: (file, entry)
        for file in manifest.dense_files
        for name, entry in read_header(store / file).items()
    }


def rewrite_dense(
    store: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    recipe_name: str,
    disk: Disk | None = None,
) -> Manifest:
    """Replace dense tensors by name, with the shape and type that they have, and note it as the
    recipe's name. Returns the new manifest, whose version is another.

    Until the new store is whole the old one is untouched; then two renames put it in its place (a
    crash between them leaves the old one as `.NAME.before`, which the next call puts back). Who has
    the old one's files open goes on with them. Raises ValueError for a tensor that the store does
    not have or of another shape or type, StoreWriteError when the disk is full.
    """
    disk = disk or Disk()
    store = store.resolve()
    new, old = (store.with_name(f".{store.name}.{end}") for end in ("rewriting", "before"))
    if old.is_dir() and not store.exists():
        os.rename(old, store)
    manifest = load_manifest(store)
    changed = _by_file(store, manifest, tensors)
    shutil.rmtree(new, ignore_errors=True)
    try:
        made = _written(store, new, manifest, changed, recipe_name, disk)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _swap(store, new, old, disk)
    return made


def _by_file(
    store: Path, manifest: Manifest, tensors: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Checked tensors by file."""
    entries, found = dense_entries(store, manifest), dict[str, dict[str, torch.Tensor]]()
    for name, tensor in tensors.items():
        if name not in entries:
            raise ValueError(f"tensors: {name!r} is no dense tensor of {store}")
        file, entry = entries[name]
        size = tensor.numel() * tensor.element_size()
        if tuple(tensor.shape) != entry.shape or size != entry.num_bytes:
            raise ValueError(
                f"tensors: {name!r} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{entry.dtype} {list(entry.shape)}"
            )
        found.setdefault(file, {})[name] = tensor.detach().cpu().contiguous()
    return found


def _written(
    store: Path,
    new: Path,
    manifest: Manifest,
    changed: Mapping[str, Mapping[str, torch.Tensor]],
    recipe_name: str,
    disk: Disk,
) -> Manifest:
    try:
        _link_tree(store, new, leave_out={*changed, "config.json", MANIFEST_FILE, PARTIAL})
    except OSError as error:
        raise disk.write_error(new, error, 0) from error
    hashes = {
        file: disk.write_atomic(
            new / file, (store / file).stat().st_size, _chunks(store / file, tensors)
        )
        for file, tensors in changed.items()
    }
    config = json.loads((store / "config.json").read_text(encoding="utf-8"))
    config.get("quantization_config", {})["recipe"] = recipe_name
    text = (json.dumps(config, indent=2) + "\n").encode()
    side = {"config.json": disk.write_atomic(new / "config.json", len(text), [text])}
    made = replace(
        manifest,
        recipe=replace(manifest.recipe, name=recipe_name),
        dense_files={**manifest.dense_files, **hashes},
        side_files={**manifest.side_files, **side},
    )
    made = replace(made, version=content_version(made))
    save_manifest(new, made, disk)
    return made


def _link_tree(source: Path, target: Path, *, leave_out: set[str]) -> None:
    """Hard links, or copies where the disk has none."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.name in leave_out:
            continue
        if path.is_dir():
            _link_tree(path, target / path.name, leave_out=set())
        else:
            try:
                os.link(path, target / path.name)
            except OSError:
                shutil.copy2(path, target / path.name)


def _chunks(file: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Chunk]:
    """The file's bytes with those of the tensors in their places."""
    at, size = 0, file.stat().st_size
    places = sorted((entry.start, name) for name, entry in read_header(file).items())
    for start, name in places:
        if name in tensors:
            yield from _range(file, at, start)
            data = tensors[name].reshape(-1).view(torch.uint8)
            yield memoryview(data.numpy())
            at = start + data.numel()
    if at > size:
        raise StoreFormatError(f"{file}: ends before its tensors do; run `moetier verify`")
    yield from _range(file, at, size)


def _range(file: Path, start: int, end: int) -> Iterator[Chunk]:
    while start < end:
        part = min(_COPY_CHUNK, end - start)
        yield memoryview(read_bytes(file, start, part).numpy())
        start += part


def _swap(store: Path, new: Path, old: Path, disk: Disk) -> None:
    """The new store in the place of the old one, which is then deleted."""
    try:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(store, old)
        try:
            os.rename(new, store)
        except OSError:
            os.rename(old, store)
            raise
        disk.sync_folders([store.parent])
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise disk.write_error(store, error, 0) from error
    shutil.rmtree(old, ignore_errors=True)
