"""Goal: a plan's sizes are the models' own, and what is no model is named.

Method: published parameter counts; the bundled model's config.json against its store's bytes;
malformed configs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.plan.inputs import Hardware, PlanInputs, Recipe
from cluster.plan.shapes import SHAPES, shape_of, shape_of_config
from cluster.plan.system import RecordBytes, record_bytes, system_of
from expert_store.checkpoint import Checkpoint
from models import MIXTRAL_MINI
from tests.hand_store import build_store

PUBLISHED = {  # billions of parameters, as their publishers say
    "Mixtral-8x7B": 46.7,
    "Mixtral-8x22B": 141,
    "DeepSeek-MoE-16B": 16.4,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235,
}
ACTIVE = {"Mixtral-8x7B": 12.9, "Mixtral-8x22B": 39, "Qwen3-30B-A3B": 3.3, "Qwen3-235B-A22B": 22}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_add_up_to_what_was_published(name: str) -> None:
    shape = SHAPES[name]
    assert shape.num_parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=5e-3)
    if name in ACTIVE:
        idle = shape.num_moe_layers * (shape.num_experts - shape.top_k) * shape.expert_weights
        assert (shape.num_parameters - idle) / 1e9 == pytest.approx(ACTIVE[name], rel=0.03)


def test_a_folder_s_config_gives_the_shape_that_its_weights_have() -> None:
    shape = shape_of(str(MIXTRAL_MINI))
    model = Checkpoint(MIXTRAL_MINI).model_info
    assert (shape.hidden, shape.expert_ffn) == (model.expert.hidden, model.expert.ffn)
    assert (shape.top_k, shape.num_layers, shape.vocab) == (
        model.top_k,
        model.num_layers,
        model.vocab_size,
    )
    weights = sum(path.stat().st_size for path in MIXTRAL_MINI.glob("*.safetensors")) / 2
    assert shape.num_parameters == pytest.approx(weights, rel=0.01)  # norms and headers aside


def test_names_are_found_whatever_their_capitals() -> None:
    assert shape_of("qwen3-30b-a3b") is SHAPES["Qwen3-30B-A3B"]


GOOD = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "intermediate_size": 128, "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip


def test_a_config_with_shared_experts_and_a_dense_layer() -> None:
    shape = shape_of_config(GOOD, name="x", source="x/config.json")
    assert (shape.shared_ffn, shape.num_dense_layers, shape.dense_ffn) == (64, 1, 128)
    assert (shape.num_kv_heads, shape.head_dim, shape.num_moe_layers) == (4, 16, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": None}, "has none of num_local_experts"),
        ({"hidden_size": "64"}, "hidden_size: got '64', expected a whole number"),
        ({"hidden_size": [1]}, r"hidden_size: got \[1\]"),
        ({"hidden_size": True}, "hidden_size: got True"),
        ({"hidden_size": 0}, "hidden: got 0, expected 1 or more"),
        ({"num_attention_heads": -4}, "num_heads: got -4"),
        ({"num_experts_per_tok": 9}, "top_k 9 of 8 experts"),
        ({"first_k_dense_replace": 3}, "3 dense of 3 layers"),
        ({"kv_lora_rank": 512}, "latent attention"),
    ],
)
def test_a_config_that_is_no_such_model_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_of_config({**GOOD, **changes}, name="x", source="x/config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00", "[" * 100_000, json.dumps({"a": 1})])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="--model: "):
        shape_of(str(tmp_path))
    for missing in (str(tmp_path / "gone"), "Mixtral-9x9B", "a\x00b"):
        with pytest.raises(ValueError, match="--model: got .*expected one of Mixtral-8x7B"):
            shape_of(missing)


def test_records_are_as_large_as_those_that_are_written(tmp_path: Path) -> None:
    """Two rank blocks of every projection, which is rank 32."""
    manifest = build_store(tmp_path, hidden=64, ffn=128, bits=3, blocks="gudgud")
    config = {**GOOD, "moe_intermediate_size": 128}
    shape = shape_of_config(config, name="x", source="x")
    assert record_bytes(shape, Recipe(bits=3, rank=32)) == RecordBytes.of_store(manifest)


def test_what_does_not_fit_is_named() -> None:
    shape = SHAPES["Mixtral-8x7B"]
    with pytest.raises(ValueError, match="top_n: got 3, Mixtral-8x7B has 2"):
        system_of(shape, PlanInputs(top_n=3))
    with pytest.raises(ValueError, match="gpu_gib: got 4, but Mixtral-8x7B needs"):
        system_of(shape, PlanInputs(hardware=Hardware(gpu_gib=4)))
    odd = shape_of_config({**GOOD, "hidden_size": 72}, name="x", source="x")
    with pytest.raises(ValueError, match="multiples of 64; plan with 16 bits"):
        system_of(odd, PlanInputs())
    assert system_of(odd, PlanInputs(recipe=Recipe(bits=16))).cache_bytes > 0


def test_a_gpu_without_room_keeps_fewer_experts() -> None:
    shape = SHAPES["Mixtral-8x7B"]
    wide = system_of(shape, PlanInputs(cache_share=1.0))
    assert wide.cache_bytes * wide.layer_scale == pytest.approx(
        sum(wide.sizes.codes.values()) * wide.layer_scale, rel=1e-6
    )
    small = system_of(shape, PlanInputs(cache_share=1.0, hardware=Hardware(gpu_gib=8)))
    assert 0 < small.cache_bytes < wide.cache_bytes
