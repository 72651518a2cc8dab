"""Goal: what we say of a family's experts is what its transformers classes do.

Method: tiny models; DeepSeek-MoE, whose class is ours, against its published maths written out.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

from expert_store.deepseek import DeepseekConfig, DeepseekMoE, register
from expert_store.errors import CheckpointError
from expert_store.families import (
    activation_of,
    check_model_type,
    expert_shape,
    experts_modules,
    load_config,
    meta_model,
    top_k_of,
)
from kernels.activations import apply_gate
from tests.tiny_checkpoints import FAMILIES, tiny_config, write_tiny_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_modules_and_shape(family: str) -> None:
    config = tiny_config(family, layers=3, hidden=64, ffn=192, experts=5, top_k=3)
    found = experts_modules(meta_model(config))
    first_moe = 1 if family.startswith("deepseek") else 0
    assert list(found) == list(range(first_moe, 3))
    for layer, (path, module) in found.items():
        assert path.startswith(f"model.layers.{layer}.")
        assert module.num_experts == 5
        shape = expert_shape(config, module)
        assert (shape.hidden, shape.ffn) == (64, 192)
        assert shape.has_bias == (family == "gpt_oss")
    assert top_k_of(config) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_is_what_the_module_applies(family: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    _, module = experts_modules(model).popitem()[1]
    gate_up = 4 * torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    if module.is_concatenated:
        gate, up = gate_up[:, :64], gate_up[:, 64:]
    else:
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    ours = apply_gate(activation_of(model.config), gate.contiguous(), up.contiguous())
    torch.testing.assert_close(ours, module._apply_gate(gate_up), rtol=1e-5, atol=1e-6)


def test_activations_that_the_kernels_lack() -> None:
    with pytest.raises(CheckpointError, match="hidden_act is 'tanh', expected one of silu"):
        activation_of(tiny_config("mixtral", hidden_act="tanh"))
    with pytest.raises(CheckpointError, match=r"swiglu_limit 9\.0 are not supported"):
        activation_of(tiny_config("gpt_oss", swiglu_limit=9.0))


def test_supported_families() -> None:
    for family in FAMILIES:
        check_model_type(family, "here")
    with pytest.raises(CheckpointError, match="here: unknown model family: model_type is 'gpt2'"):
        check_model_type("gpt2", "here")


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
def test_deepseek_moe_is_the_published_maths(norm_topk_prob: bool, shared: int) -> None:
    config = tiny_config(
        "deepseek", ffn=128, top_k=2, norm_topk_prob=norm_topk_prob, n_shared_experts=shared
    )
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    block = DeepseekMoE(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        hidden = torch.randn(2, 5, 64, generator=generator)
        scores = linear(hidden, block.gate.weight).softmax(-1)
        weights, ids = scores.topk(2)
        if norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        expected = torch.zeros_like(hidden)
        for b in range(2):
            for t in range(5):
                for weight, expert in zip(weights[b, t], ids[b, t], strict=True):
                    gate, up = block.experts.gate_up_proj[expert].chunk(2)
                    inner = silu(gate @ hidden[b, t]) * (up @ hidden[b, t])
                    expected[b, t] += weight * (block.experts.down_proj[expert] @ inner)
        if shared:
            assert block.shared_experts.gate_proj.weight.shape == (2 * 128, 64)
            expected += block.shared_experts(hidden)
        torch.testing.assert_close(block(hidden), expected, rtol=1e-4, atol=1e-5)


def test_deepseek_loads_with_its_published_config(tmp_path: Path) -> None:
    # The hub's config.json names remote code; ours is used and none of theirs is run.
    folder = write_tiny_checkpoint("deepseek", tmp_path, layers=3, moe_layer_freq=2)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    register()  # a second time does no harm
    loaded = load_config(str(folder))
    assert isinstance(loaded, DeepseekConfig)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False
    )
    assert not any(info.values()), info
    assert list(experts_modules(model)) == [2]  # layer 0 dense, 1 skipped by the frequency
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 3


def test_deepseek_refuses_another_scoring_function() -> None:
    with pytest.raises(ValueError, match="scoring_func: got 'sigmoid', expected 'softmax'"):
        meta_model(tiny_config("deepseek", scoring_func="sigmoid"))
