"""Goal: dense tensors of a store are replaced whole or not at all, and nothing else changes.

Method: a tiny store; every write fails once, and a crash between the two renames.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

import pytest
import torch
from transformers import AutoModelForCausalLM

import gpu_worker.model  # noqa: F401  registers what config.json of a store names
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.errors import StoreWriteError
from expert_store.files import Disk, read_tensor
from expert_store.format import load_manifest
from expert_store.rewrite import dense_entries, rewrite_dense
from expert_store.verify import verify
from tests.tiny_checkpoints import write_tiny_checkpoint

NAME = "model.layers.1.block_sparse_moe.gate.weight"


class FailingDisk(Disk):
    """The n-th file cannot be opened."""

    def __init__(self, fail_at: int) -> None:
        self.fail_at, self.count = fail_at, 0

    def open(self, path: Path) -> IO[bytes]:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().open(path)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model")
    compress(model, tmp_path / "store", CompressionConfig(recipe="static"), jobs=1)
    return tmp_path / "store"


def dense(store: Path) -> dict[str, torch.Tensor]:
    manifest = load_manifest(store)
    return {
        name: read_tensor(store / file, entry)
        for name, (file, entry) in dense_entries(store, manifest).items()
    }


def test_one_tensor_changes_and_nothing_else(store: Path) -> None:
    old, tensors = load_manifest(store), dense(store)
    codes = store / next(iter(old.experts.values())).codes.file
    inode = codes.stat().st_ino
    new_EH = torch.randn(4, 64).to(torch.bfloat16)
    made = rewrite_dense(store, {NAME: new_EH}, recipe_name="static-recalibrated")
    assert made == load_manifest(store)
    assert made.version != old.version
    assert made.recipe.name == "static-recalibrated"
    assert made.experts == old.experts
    assert not verify(store).damage
    assert codes.stat().st_ino == inode, "records are not copied"
    found = dense(store)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], new_EH if name == NAME else tensor)
    assert sorted(path.name for path in store.parent.iterdir()) == ["model", "store"]
    model = AutoModelForCausalLM.from_pretrained(store, local_files_only=True)
    assert torch.equal(model.model.layers[1].mlp.gate.weight.to(torch.bfloat16), new_EH)


def test_a_write_that_fails_leaves_the_old_store(store: Path) -> None:
    old = load_manifest(store)
    tensor = torch.zeros(4, 64, dtype=torch.bfloat16)
    for fail_at in range(1, 20):
        disk = FailingDisk(fail_at)
        try:
            rewrite_dense(store, {NAME: tensor}, recipe_name="new", disk=disk)
        except StoreWriteError:
            assert load_manifest(store) == old
            assert not verify(store).damage
            assert sorted(path.name for path in store.parent.iterdir()) == ["model", "store"]
        else:
            break
    assert fail_at == 4, "a dense file, config.json and the manifest"
    assert load_manifest(store).recipe.name == "new"


def test_a_rename_that_fails_puts_the_old_store_back(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, real = load_manifest(store), os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name.endswith(".rewriting"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StoreWriteError):
        rewrite_dense(store, {NAME: torch.zeros(4, 64).bfloat16()}, recipe_name="new")
    assert load_manifest(store) == old
    assert sorted(path.name for path in store.parent.iterdir()) == ["model", "store"]


def test_a_crash_between_the_renames_is_mended_by_the_next_call(store: Path) -> None:
    os.rename(store, store.with_name(".store.before"))
    made = rewrite_dense(store, {NAME: torch.zeros(4, 64).bfloat16()}, recipe_name="new")
    assert load_manifest(store) == made
    assert not verify(store).damage
    assert sorted(path.name for path in store.parent.iterdir()) == ["model", "store"]


def test_tensors_that_do_not_fit_are_refused(store: Path) -> None:
    old = load_manifest(store)
    for name, tensor, problem in (
        ("no.such.weight", torch.zeros(4, 64).bfloat16(), "no dense tensor"),
        (NAME, torch.zeros(64, 4).bfloat16(), r"expected BF16 \[4, 64\]"),
        (NAME, torch.zeros(4, 64), r"expected BF16 \[4, 64\]"),
    ):
        with pytest.raises(ValueError, match=problem):
            rewrite_dense(store, {name: tensor}, recipe_name="new")
    assert load_manifest(store) == old
