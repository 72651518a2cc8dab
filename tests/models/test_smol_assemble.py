"""Goal: assembling gives a whole, ordinary Mixtral checkpoint or nothing.

Method: the real code on a small base; the folder is read as any checkpoint; faults on the way.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from smol_base import EXPERTS, LAYERS, fresh_deltas, tiny_base, trained_deltas
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from expert_store.checkpoint import Checkpoint
from expert_store.errors import CheckpointError, StoreWriteError
from expert_store.types import ExpertKey
from models.smol import assemble as assembling
from models.smol.assemble import assemble
from models.smol.deltas import write_deltas
from models.smol.recipe import file_sha256, is_assembled, recipe


def test_it_is_an_ordinary_mixtral_checkpoint(tmp_path: Path) -> None:
    base, layers, folder = tiny_base(), trained_deltas(), tmp_path / "models" / "smol"
    assemble(base, layers, folder, {"from": "here"})
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_local_experts, config.sliding_window) == (
        "mixtral",
        EXPERTS,
        None,
    )
    assert (config.head_dim, config.tie_word_embeddings, config.rms_norm_eps) == (16, True, 1e-5)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 5000.0
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 1

    checkpoint = Checkpoint(folder)
    assert len(checkpoint.keys) == LAYERS * EXPERTS
    expert = checkpoint.expert(ExpertKey(1, 2))
    for name in ("gate", "up", "down"):
        expected = layers[1].expert_weight(base.mlp(1, name), name, 2).bfloat16().float()
        assert torch.equal(getattr(expert, name), expected)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in file.keys()  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_tokenizer_comes_along_with_its_template(tmp_path: Path) -> None:
    base = tiny_base()
    assemble(base, fresh_deltas(), tmp_path / "smol", {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smol")
    assert tokenizer("The sea, 1234.").input_ids == base.tokenizer("The sea, 1234.").input_ids
    assert tokenizer.chat_template == base.tokenizer.chat_template
    assert tokenizer.model_max_length == 512
    told = (tmp_path / "smol" / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in told


def test_the_same_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assemble(tiny_base(), trained_deltas(), tmp_path / name, {})
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_folder_that_was_there_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "smol"
    assemble(tiny_base(), fresh_deltas(), target, {"number": 1})
    (target / "stray").write_text("of an older version")
    assemble(tiny_base(), trained_deltas(), target, {"number": 2})
    assert json.loads((target / "assembled.json").read_text()) == {"number": 2}
    assert not (target / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["smol"]


def test_a_failure_on_the_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "smol"
    assemble(tiny_base(), fresh_deltas(), target, {"number": 1})
    before = load_file(target / "model.safetensors")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assembling, "_write_tokenizer", fail)
    with pytest.raises(StoreWriteError, match="disk full"):
        assemble(tiny_base(), trained_deltas(), target, {"number": 2})
    assert json.loads((target / "assembled.json").read_text()) == {"number": 1}
    after = load_file(target / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["smol"]


def test_deltas_of_another_base_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not belong together"):
        assemble(tiny_base(), fresh_deltas()[:1], tmp_path / "smol", {})
    assert not (tmp_path / "smol").exists()


def test_a_folder_says_what_it_was_made_from(tmp_path: Path) -> None:
    deltas, target = tmp_path / "deltas.safetensors", tmp_path / "smol"
    write_deltas(deltas, fresh_deltas(), {})
    assert not is_assembled(target, deltas)
    assemble(tiny_base(), fresh_deltas(), target, recipe(deltas))
    assert is_assembled(target, deltas)
    write_deltas(deltas, trained_deltas(), {})
    assert not is_assembled(target, deltas), "newer deltas want a newer folder"
    (target / "assembled.json").write_text("{")
    assert not is_assembled(target, deltas)
    assert len(file_sha256(deltas)) == 64
