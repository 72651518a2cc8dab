"""Which model families are supported, and what transformers' classes tell us about their experts.

Knows configs and module trees, on any device including meta; reads no weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expert_store import deepseek
from expert_store.errors import CheckpointError
from expert_store.types import ExpertShape
from kernels.types import Activation

SUPPORTED_MODEL_TYPES: tuple[str, ...] = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek",
    "phimoe",
    "granitemoe",
    "gpt_oss",
)

deepseek.register()

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# transformers' use_experts_implementation decorator sets exactly these on every experts module.
_EXPERTS_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class ExpertsModule(NamedTuple):
    """Where one layer's routed experts live in the model."""

    path: str
    module: torch.nn.Module


def experts_modules(model: torch.nn.Module) -> dict[int, ExpertsModule]:
    """Routed experts by decoder layer, in layer order. Shared experts are not among them."""
    found = {}
    for path, module in model.named_modules():
        if all(hasattr(module, flag) for flag in _EXPERTS_FLAGS):
            match = _LAYER.search(path)
            assert match is not None, f"experts module {path!r} is not inside a decoder layer"
            found[int(match.group(1))] = ExpertsModule(path, module)
    return dict(sorted(found.items()))


def check_model_type(model_type: object, where: str) -> None:
    """CheckpointError unless the family is one that the tests cover."""
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            f"{where}: unknown model family: model_type is {model_type!r}, expected one of "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}; choose a checkpoint of one of these"
        )


def load_config(folder: str) -> Any:
    """The transformers config of a checkpoint or store folder. Never runs code from the folder."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def meta_model(config: Any) -> torch.nn.Module:
    """The family's causal language model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def activation_of(config: Any) -> Activation:
    """What joins gate and up in this model's experts. CheckpointError when the kernels lack it."""
    if config.model_type == "gpt_oss":
        alpha, limit = config.swiglu_alpha, config.swiglu_limit
        if (alpha, limit) != (1.702, 7.0):
            raise CheckpointError(
                f"gpt_oss: swiglu_alpha {alpha} and swiglu_limit {limit} are not supported, "
                "expected 1.702 and 7.0"
            )
        return "clamped_swiglu"
    if config.hidden_act not in _ACTIVATIONS:
        raise CheckpointError(
            f"{config.model_type}: hidden_act is {config.hidden_act!r}, expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[config.hidden_act]


def expert_shape(config: Any, experts: torch.nn.Module) -> ExpertShape:
    """What every routed expert has in common, read off one (meta) experts module."""
    sizes = tuple(experts.down_proj.shape[1:])
    # down_proj is [E, H, F], or [E, F, H] where the family multiplies from the right.
    ffn, hidden = sizes if experts.is_transposed else reversed(sizes)
    return ExpertShape(
        hidden=hidden, ffn=ffn, activation=activation_of(config), has_bias=experts.has_bias
    )


def top_k_of(config: Any) -> int:
    """Routed experts per token."""
    return int(config.num_experts_per_tok)
