"""Goal: every family's experts are read exactly as transformers loads them, and broken checkpoints
are refused by name.

Method: a tiny random checkpoint per family in its on-hub layout; the loaded model is the truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expert_store.checkpoint import Checkpoint
from expert_store.errors import CheckpointError
from expert_store.families import experts_modules
from expert_store.types import ExpertKey
from tests.tiny_checkpoints import FAMILIES, write_tiny_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_equal_the_loaded_model(family: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(family, tmp_path, ffn=128, experts=3, max_shard_size="100KB")
    checkpoint = Checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    seen = set()
    for layer, (path, module) in experts_modules(model).items():
        assert checkpoint.model_info.moe_layers[layer] == path
        for expert in range(3):
            weights = checkpoint.expert(ExpertKey(layer, expert))
            seen.add(weights.key)
            gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
            if module.is_transposed:
                gate_up, down = gate_up.T, down.T
            if module.is_concatenated:
                gate, up = gate_up[:128], gate_up[128:]
            else:
                gate, up = gate_up[::2], gate_up[1::2]
            assert weights.gate.dtype == torch.float32
            assert torch.equal(weights.gate.bfloat16(), gate)
            assert torch.equal(weights.up.bfloat16(), up)
            assert torch.equal(weights.down.bfloat16(), down)
            if module.has_bias:
                bias = module.gate_up_proj_bias[expert]
                assert torch.equal(weights.gate_bias.bfloat16(), bias[::2])
                assert torch.equal(weights.up_bias.bfloat16(), bias[1::2])
                assert torch.equal(weights.down_bias.bfloat16(), module.down_proj_bias[expert])
            else:
                assert weights.gate_bias is weights.up_bias is weights.down_bias is None
    assert seen == set(checkpoint.keys)
    assert [weights.key for weights in checkpoint.experts()] == checkpoint.keys


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_experts_share_the_checkpoint_out(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint(family, tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    in_experts = {
        name
        for name in stored
        if ".experts." in name or "input_linear" in name or "output_linear" in name
    }
    assert checkpoint.dense.keys() == stored.keys() - in_experts
    for name, tensor in checkpoint.dense.items():
        value = tensor.read()
        assert value.dtype == stored[name].dtype
        assert torch.equal(value, stored[name])


def test_model_info(tmp_path: Path) -> None:
    info = Checkpoint(write_tiny_checkpoint("deepseek_v3", tmp_path, layers=3, ffn=128)).model_info
    assert (info.model_type, info.num_layers, info.top_k) == ("deepseek_v3", 3, 2)
    assert info.num_experts == {1: 4, 2: 4}
    assert info.moe_layers[2] == "model.layers.2.mlp.experts"
    assert (info.expert.hidden, info.expert.ffn, info.expert.has_bias) == (64, 128, False)
    assert (info.vocab_size, info.max_positions) == (128, 256)


def test_tied_embeddings_are_not_missed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint("mixtral", tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight" not in checkpoint.dense


def test_float32_and_float16_checkpoints(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16):
        folder = write_tiny_checkpoint("mixtral", tmp_path / str(dtype), dtype=dtype)
        stored = load_file(folder / "model.safetensors")
        name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
        assert torch.equal(Checkpoint(folder).expert(ExpertKey(1, 3)).gate, stored[name].float())


def test_extra_prediction_layers_are_left_out(tmp_path: Path) -> None:
    # DeepSeek-V3 publishes a 62nd layer that its own model class ignores.
    folder = write_tiny_checkpoint("deepseek_v3", tmp_path)

    def add(tensors: Tensors) -> None:
        tensors["model.layers.61.mlp.experts.0.up_proj.weight"] = torch.zeros(64, 64)
        tensors["model.layers.61.eh_proj.weight"] = torch.zeros(64, 128)

    edit_tensors(folder, add)
    checkpoint = Checkpoint(folder)
    assert not any("layers.61" in name for name in checkpoint.dense)
    assert {key.layer for key in checkpoint.keys} == {1}


def edit_tensors(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


MOE = "model.layers.1.block_sparse_moe"


def take(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def take_expert(tensors: Tensors) -> None:
    for name in ("w1", "w2", "w3"):
        del tensors[f"{MOE}.experts.2.{name}.weight"]


def add_expert(tensors: Tensors) -> None:
    for name in ("w1", "w2", "w3"):
        tensors[f"{MOE}.experts.4.{name}.weight"] = torch.zeros(64, 64)


def add_layer(tensors: Tensors) -> None:
    tensors["model.layers.5.block_sparse_moe.experts.0.w1.weight"] = torch.zeros(64, 64)


def take_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(f"{MOE}.experts.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (take_expert, "layer 1: gate_up_proj: missing expert 2: expected experts 0 to 3, got 3"),
        (take(f"{MOE}.experts.2.w3.weight"), "layer 1: gate_up_proj: missing tensor of expert 2"),
        (take(f"{MOE}.experts.2.w2.weight"), "layer 1: down_proj: missing expert 2"),
        (add_expert, "layer 1: .*: extra expert 4: expected experts 0 to 3, got 5"),
        (add_layer, "extra expert: tensor 'model.layers.5.*belongs to no MoE layer"),
        (take_layer, "layer 1: gate_up_proj: missing experts: expected 4, got none"),
        (take("model.norm.weight"), "1 tensors are missing, first 'model.norm.weight'"),
    ],
)
def test_missing_and_extra_experts(edit: Any, message: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("mixtral", tmp_path)
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("num_experts", [3, 5])
@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_fused_experts_of_another_count(family: str, num_experts: int, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(family, tmp_path)
    edit_config(folder, num_local_experts=num_experts)
    with pytest.raises(CheckpointError, match=r"layer 0: gate_up_proj: expected shape \[\d, .*got"):
        Checkpoint(folder)


@pytest.mark.parametrize("model_type", ["llama", "no_such_family", None, 7])
def test_unknown_family(model_type: object, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("mixtral", tmp_path)
    edit_config(folder, model_type=model_type)
    with pytest.raises(
        CheckpointError, match="unknown model family.*expected one of mixtral, olmo"
    ):
        Checkpoint(folder)


def test_quantised_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("gpt_oss", tmp_path)
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match="already quantised .*'mxfp4'.*original checkpoint"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.float64, "F64"),
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # a tensor per expert, and fused
def test_expert_weights_of_another_type(
    family: str, dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    folder = write_tiny_checkpoint(family, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    chosen = max(tensor for tensor in tensors if ".experts." in tensor)
    edit_tensors(folder, lambda tensors: tensors.update({chosen: tensors[chosen].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"has type {name}, expected one of bf") as caught:
        Checkpoint(folder)
    assert f"{folder}/model.safetensors: tensor {chosen!r}" in str(caught.value)
    assert "bfloat16, float16, float32; give the original checkpoint" in str(caught.value)


@pytest.mark.parametrize(("hidden", "ffn"), [(96, 64), (64, 96)])
def test_group_size_that_does_not_divide(hidden: int, ffn: int, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("mixtral", tmp_path, hidden=hidden, ffn=ffn)
    with pytest.raises(CheckpointError, match="is 96, expected a multiple of the group size 64"):
        Checkpoint(folder)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size is 0, expected a multiple of 64"),
        ("hidden_size", -64, "hidden_size is -64, expected a multiple of 64"),
        ("hidden_size", 32, "hidden_size is 32, expected a multiple of 64"),
        ("num_hidden_layers", 0, "config.json: has no MoE layer"),
    ],
)
def test_sizes_that_no_model_has(field: str, value: int, message: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("mixtral", tmp_path)
    edit_config(folder, **{field: value})
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint(tmp_path)
    folder = write_tiny_checkpoint("mixtral", tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for spoiled, message in (
        (whole[:-100], "reaches past the file's"),
        (whole[:50], "a header of"),
        (b"", "a header of 0 bytes in 0 bytes"),
        (whole[:8] + b"x" + whole[9:], "not a whole safetensors file"),
    ):
        weights.write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        Checkpoint(folder)


def test_a_config_field_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("mixtral", tmp_path)
    edit_config(folder, num_hidden_layers="six")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: .*num_hidden_layers"):
        Checkpoint(folder)


@pytest.mark.parametrize("shard", ["gone.safetensors", "../model-00001-of-00009.safetensors"])
def test_a_missing_shard_is_named(shard: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("mixtral", tmp_path, max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=f"shard '{shard}' of .* is missing"):
        Checkpoint(folder)


def test_other_weight_files_beside_an_index_are_not_read(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("mixtral", tmp_path, max_shard_size="100KB")
    save_file({"layers.0.w": torch.zeros(2)}, folder / "consolidated.safetensors")
    assert "layers.0.w" not in Checkpoint(folder).dense


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("mixtral", tmp_path)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is in two shards"):
        Checkpoint(folder)


def test_no_such_expert(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint("mixtral", tmp_path))
    for key in (ExpertKey(0, 4), ExpertKey(0, -1), ExpertKey(9, 0)):
        with pytest.raises(KeyError):
            checkpoint.expert(key)
