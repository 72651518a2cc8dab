"""Goal: a store holds exactly what its checkpoint and recipe give, for every family.

Method: tiny checkpoints; the records are decoded again and compared with the checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expert_store.checkpoint import Checkpoint
from expert_store.compress import Progress, compress
from expert_store.config import CompressionConfig
from expert_store.errors import CheckpointError, StoreWriteError
from expert_store.files import Disk
from expert_store.format import load_manifest, parse_codes, parse_factors
from expert_store.segment import Segment
from expert_store.types import PROJECTIONS, CodesForm, ExpertKey, RecordRequest
from kernels.reference import dequantize, dequantize_low_rank
from tests.tiny_checkpoints import FAMILIES, write_tiny_checkpoint

PAPER = CompressionConfig(recipe="paper", avg_rank=8)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_original_holds_the_checkpoint_exactly(family: str, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(family, tmp_path / "model", ffn=128, experts=3)
    manifest = compress(model, tmp_path / "store", CompressionConfig(recipe="original"), jobs=2)
    checkpoint, segment = Checkpoint(model), Segment(tmp_path / "store")
    shape = manifest.model.expert
    for key in checkpoint.keys:
        (data,) = segment.fetch([RecordRequest(key, "codes")])
        mlp = parse_codes(key, data, shape, CodesForm.uniform(16)).mlp
        weights = checkpoint.expert(key)
        for name in PROJECTIONS:
            assert torch.equal(dequantize(getattr(mlp, name)), getattr(weights, name))
            bias, expected = getattr(mlp, f"{name}_bias"), getattr(weights, f"{name}_bias")
            assert bias is expected is None or torch.equal(bias, expected)
        assert (manifest.experts[key].error, manifest.experts[key].factors) == (0.0, None)
    assert manifest.model == checkpoint.model_info
    dense = {
        name: tensor
        for file in manifest.dense_files
        for name, tensor in load_file(tmp_path / "store" / file).items()
    }
    assert dense.keys() == checkpoint.dense.keys()
    for name, stored in checkpoint.dense.items():
        value = stored.read()
        assert dense[name].dtype == value.dtype
        assert torch.equal(dense[name], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_paper_restores_every_family(family: str, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(family, tmp_path / "model", hidden=128, ffn=192, experts=3)
    manifest = compress(
        model, tmp_path / "store", CompressionConfig(recipe="paper", avg_rank=16), jobs=2
    )
    checkpoint, segment = Checkpoint(model), Segment(tmp_path / "store")
    shape = manifest.model.expert
    for key, info in manifest.experts.items():
        codes_data, factors_data = segment.fetch(
            [RecordRequest(key, "codes"), RecordRequest(key, "factors")]
        )
        mlp = parse_codes(key, codes_data, shape, info.form).mlp
        factors = parse_factors(key, factors_data, shape, info.repair).factors
        weights = checkpoint.expert(key)
        energy = lost = kept = 0.0
        for name in PROJECTIONS:
            weight, low_bit = getattr(weights, name), dequantize(getattr(mlp, name))
            left, right = dequantize_low_rank(getattr(factors, name))
            assert left.shape[1] == info.repair.rank(name) == 16
            energy += float(weight.square().sum())
            lost += float((weight - low_bit).square().sum())
            kept += float((weight - low_bit - left @ right).square().sum())
            bias, expected = getattr(mlp, f"{name}_bias"), getattr(weights, f"{name}_bias")
            assert bias is expected is None or torch.equal(bias, expected)
        assert info.error == pytest.approx((lost / energy) ** 0.5, rel=1e-4)
        assert info.restored_error == pytest.approx((kept / energy) ** 0.5, rel=1e-4)
        assert 0.3 < info.restored_error < info.error < 0.5
        assert info.prefix_error(len(info.repair.blocks)) == pytest.approx(
            info.restored_error, rel=1e-4
        )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_static_is_codes_alone(bits: int, tmp_path: Path) -> None:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model")
    store = tmp_path / "store"
    manifest = compress(model, store, CompressionConfig(recipe="static", bits=bits))
    assert all(info.factors is None for info in manifest.experts.values())
    assert all(info.repair.blocks == () for info in manifest.experts.values())
    assert all(info.error == info.restored_error > 0 for info in manifest.experts.values())
    assert {info.form for info in manifest.experts.values()} == {CodesForm.uniform(bits)}
    assert manifest.recipe.bits == bits
    assert not (store / "factors").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint("mixtral", folder, hidden=128, ffn=128, max_shard_size="150KB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not copied")
    return folder


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    compress(model, folder, PAPER, jobs=1)
    return folder


def test_files_of_a_store(store: Path) -> None:
    assert sorted(tree(store)) == [
        "chat_template.jinja",
        "codes/layer-00000.safetensors",
        "codes/layer-00001.safetensors",
        "config.json",
        "dense-00000.safetensors",
        "factors/layer-00000.safetensors",
        "factors/layer-00001.safetensors",
        "generation_config.json",
        "manifest.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert (store / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (store / ".partial").exists()


def test_config_says_that_it_is_ours(store: Path, model: Path) -> None:
    ours = json.loads((store / "config.json").read_text())
    assert ours.pop("quantization_config") == {
        "quant_method": "moetier",
        "format_version": 2,
        "recipe": "paper",
        "bits": 2,
        "group_size": 64,
        "factor_bits": 3,
        "top_n": 1,
    }
    assert ours == json.loads((model / "config.json").read_text())


def test_index_leads_transformers_to_the_dense_files(store: Path) -> None:
    index = json.loads((store / "model.safetensors.index.json").read_text())
    dense = load_file(store / "dense-00000.safetensors")
    assert index["weight_map"] == dict.fromkeys(dense, "dense-00000.safetensors")


def test_records_are_aligned_and_readable_by_the_library(store: Path) -> None:
    manifest = load_manifest(store)
    for info in manifest.experts.values():
        for record in (info.codes, info.factors):
            if record is None:
                continue
            assert record.offset % 64 == 0
            raw = (store / record.file).read_bytes()[record.offset :][: record.num_bytes]
            with safe_open(store / record.file, "pt") as file:
                tensor = file.get_tensor(f"expert-{info.key.expert:05d}")
            assert tensor.dtype == torch.uint8
            assert bytes(tensor.numpy()) == raw
    # Average rank 8 over 8 experts is 64 ranks: four experts of rank 16, whose cap is 16.
    assert (
        sorted(info.repair.rank("up") for info in manifest.experts.values()) == [0] * 4 + [16] * 4
    )


def test_heavy_tails_get_the_rank(store: Path) -> None:
    experts = sorted(load_manifest(store).experts.values(), key=lambda info: -info.kurtosis)
    assert [info.repair.rank("gate") for info in experts] == [16] * 4 + [0] * 4


def test_bytes_do_not_depend_on_jobs(store: Path, model: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "again", PAPER, jobs=3)
    assert tree(tmp_path / "again") == tree(store)


def test_dense_files_are_split(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_store.assemble.DENSE_FILE_BYTES", 40_000)
    monkeypatch.setattr("expert_store.assemble._COPY_CHUNK", 1000)
    manifest = compress(model, tmp_path / "store", CompressionConfig(recipe="original"))
    assert len(manifest.dense_files) > 3
    index = json.loads((tmp_path / "store" / "model.safetensors.index.json").read_text())
    checkpoint = Checkpoint(model)
    assert index["weight_map"].keys() == checkpoint.dense.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "store" / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), checkpoint.dense[name].read())


def test_progress_counts_every_expert_once_a_stage(model: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    compress(model, tmp_path / "store", PAPER, progress=seen.append, jobs=2)
    for stage in ("scan", "compress"):
        assert [p.done for p in seen if p.stage == stage] == list(range(1, 9))
    assert {p.total for p in seen} == {8}


def test_torch_threads_are_given_back(model: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    compress(model, tmp_path / "store", PAPER)
    assert torch.get_num_threads() == before


def test_a_finished_store_is_not_overwritten(store: Path, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "store"
    shutil.copytree(store, target)
    with pytest.raises(ValueError, match="holds a finished store; .* --force"):
        compress(model, target, CompressionConfig(recipe="paper", bits=3))
    assert tree(target) == tree(store)


def test_force_leaves_nothing_of_the_old_store(store: Path, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "store"
    shutil.copytree(store, target)
    (target / "notes.txt").write_text("mine")
    compress(model, target, CompressionConfig(recipe="static"), force=True)
    assert load_manifest(target).recipe.name == "static"
    left = tree(target)
    assert left.pop("notes.txt") == b"mine"
    compress(model, tmp_path / "fresh", CompressionConfig(recipe="static"))
    assert left == tree(tmp_path / "fresh")


def test_force_keeps_no_tokenizer_of_another_model(tmp_path: Path) -> None:
    """A chat template that the new model does not have would change its prompts."""
    old = write_tiny_checkpoint("mixtral", tmp_path / "old", hidden=64, ffn=64)
    for name in ("chat_template.jinja", "merges.txt", "tokenizer.json"):
        (old / name).write_text("{}")
    store = tmp_path / "store"
    compress(old, store, CompressionConfig(recipe="original"), jobs=1)
    assert (store / "chat_template.jinja").is_file()
    (store / "notes.txt").write_text("the user's own")
    new = write_tiny_checkpoint("mixtral", tmp_path / "new", hidden=64, ffn=64)
    (new / "tokenizer.json").write_text("[]")
    compress(new, store, CompressionConfig(recipe="original"), jobs=1, force=True)
    assert not (store / "chat_template.jinja").exists()
    assert not (store / "merges.txt").exists()
    assert (store / "tokenizer.json").read_text() == "[]"
    assert (store / "notes.txt").is_file()


def test_targets_that_are_not_free(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither empty nor a moetier store"):
        compress(model, model, PAPER, force=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        compress(model, file, PAPER)
    with pytest.raises(ValueError, match="jobs: got 0"):
        compress(model, tmp_path / "store", PAPER, jobs=0)


def test_a_store_is_no_checkpoint(store: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already quantised"):
        compress(store, tmp_path / "again", PAPER)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CompressionConfig(recipe="paper", avg_rank=129),
            "avg_rank: got 129, over the rank .* at most 128",
        ),
        (CompressionConfig(recipe="paper", top_n=3), "top_n: got 3, expected at most 2"),
    ],
)
def test_recipes_that_the_model_cannot_have(
    config: CompressionConfig, message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        compress(model, tmp_path / "store", config)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][5, 7:9] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layer 1 expert 2, up: .* 2 .*of 4096"):
        compress(model, tmp_path / "store", PAPER)
    assert not (tmp_path / "store").exists()  # nothing to go on from
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        compress(model, tmp_path / "empty", PAPER)
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_damaged_checkpoint_leaves_the_old_store(store: Path, tmp_path: Path) -> None:
    target = tmp_path / "store"
    shutil.copytree(store, target)
    model = write_tiny_checkpoint("mixtral", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][5, 7] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        compress(model, target, PAPER, force=True)
    assert tree(target) == tree(store)


class SmallDisk(Disk):
    def __init__(self, free: int) -> None:
        self.free = free

    def free_bytes(self, folder: Path) -> int:
        return self.free


def test_too_little_disk_is_refused_at_the_door(store: Path, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    size = sum(map(len, tree(store).values()))
    with pytest.raises(StoreWriteError, match=r"needs \d+ more bytes, 1000 are free") as caught:
        compress(model, target, PAPER, disk=SmallDisk(1000))
    assert str(target) in str(caught.value)
    assert not target.exists()
    with pytest.raises(StoreWriteError):
        compress(model, target, PAPER, disk=SmallDisk(size))
    compress(model, target, PAPER, disk=SmallDisk(2 * size + (2 << 20)))
    assert ExpertKey(0, 0) in load_manifest(target).experts
