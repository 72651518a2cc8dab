"""How large a model's parts are: published shapes by name, or those of a folder's config.json.

Pure apart from reading that file. Knows no bits, no bytes per second and no store's records.

Legend: H hidden, F ffn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder with grouped-query attention whose MoE layers come after its dense ones.

    `shared_ffn` is that of all shared experts together, 0 without. Raises ValueError for sizes that
    no model has.
    """

    name: str
    source: str  # where the sizes are from
    hidden: int
    num_layers: int
    num_dense_layers: int  # with one ordinary MLP in place of experts
    dense_ffn: int
    num_experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    ties_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            *((name, 1) for name in ("hidden", "num_layers", "num_experts", "top_k", "expert_ffn")),
            *((name, 1) for name in ("num_heads", "num_kv_heads", "head_dim", "vocab")),
            *((name, 0) for name in ("num_dense_layers", "dense_ffn", "shared_ffn")),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise ValueError(f"{self.name}: {name}: got {value!r}, expected {least} or more")
        if self.top_k > self.num_experts or self.num_dense_layers >= self.num_layers:
            raise ValueError(
                f"{self.name}: top_k {self.top_k} of {self.num_experts} experts, "
                f"{self.num_dense_layers} dense of {self.num_layers} layers: a part is more than "
                "the whole"
            )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def expert_weights(self) -> int:
        """Of one routed expert: gate, up and down."""
        return 3 * self.hidden * self.expert_ffn

    @property
    def attention_weights(self) -> int:
        """Of one layer: queries and output, keys and values."""
        return 2 * self.hidden * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def moe_layer_weights(self) -> int:
        """Of one MoE layer, all but its routed experts."""
        shared = 3 * self.hidden * self.shared_ffn
        return self.attention_weights + shared + self.hidden * self.num_experts

    @property
    def other_weights(self) -> int:
        """What a step reads outside the MoE layers: the dense layers and the output head."""
        dense = self.attention_weights + 3 * self.hidden * self.dense_ffn
        return self.num_dense_layers * dense + self.hidden * self.vocab

    @property
    def num_parameters(self) -> int:
        """All of them, norms and biases aside."""
        experts = self.num_moe_layers * self.num_experts * self.expert_weights
        embedding = 0 if self.ties_embeddings else self.hidden * self.vocab
        dense = self.num_moe_layers * self.moe_layer_weights + self.other_weights
        return experts + dense + embedding

    @property
    def kv_weights_per_token(self) -> int:
        """Keys and values of one position, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def _mixtral(name: str, hidden: int, layers: int, ffn: int, heads: int) -> ModelShape:
    source = f"config.json of mistralai/{name}-v0.1"
    return ModelShape(name, source, hidden, layers, 0, 0, 8, 2, ffn, 0, heads, 8, 128, vocab=32000)


def _qwen3(name: str, hidden: int, layers: int, ffn: int, heads: int) -> ModelShape:
    source = f"config.json of Qwen/{name}"
    return ModelShape(
        name, source, hidden, layers, 0, 0, 128, 8, ffn, 0, heads, 4, 128, vocab=151936
    )


SHAPES: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _mixtral("Mixtral-8x7B", 4096, 32, 14336, 32),
        _mixtral("Mixtral-8x22B", 6144, 56, 16384, 48),
        ModelShape(
            name="DeepSeek-MoE-16B",
            source="config.json of deepseek-ai/deepseek-moe-16b-base",
            hidden=2048,
            num_layers=28,
            num_dense_layers=1,
            dense_ffn=10944,
            num_experts=64,
            top_k=6,
            expert_ffn=1408,
            shared_ffn=2 * 1408,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            vocab=102400,
        ),
        _qwen3("Qwen3-30B-A3B", 2048, 48, 768, 32),
        _qwen3("Qwen3-235B-A22B", 4096, 94, 1536, 64),
    )
}
"""Their parameters add up to what their publishers say (46.7, 141, 16.4, 30.5 and 235 billion)."""


def shape_of(model: str) -> ModelShape:
    """The shape of that name, whatever its capitals, or of the folder's config.json.

    Raises ValueError naming what was given, what is wrong with it and what is allowed.
    """
    by_name = {name.lower(): shape for name, shape in SHAPES.items()}
    if model.lower() in by_name:
        return by_name[model.lower()]
    path = Path(model) / "config.json"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ValueError(
            f"--model: got {model!r}, expected one of {', '.join(SHAPES)}, or a folder with a "
            "config.json: a checkpoint or a store"
        ) from error
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--model: {path} is not JSON ({error}); is it a config.json?") from error
    if not isinstance(config, dict):
        raise ValueError(f"--model: {path}: expected a JSON object, got a {type(config).__name__}")
    return shape_of_config(config, name=Path(model).resolve().name, source=str(path))


def shape_of_config(config: Mapping[str, Any], *, name: str, source: str) -> ModelShape:
    """The shape that a transformers config.json describes.

    Raises ValueError for a model without routed experts, or whose attention keeps something else
    than keys and values of heads.
    """
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    if config.get("kv_lora_rank"):
        raise ValueError(
            f"--model: {source} has latent attention (kv_lora_rank), whose sizes are not planned; "
            "take the published shape that is nearest"
        )

    def first(*names: str, default: int | None = None) -> int:
        for each in names:
            value = config.get(each)
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise ValueError(
                    f"--model: {source}: {each}: got {value!r}, expected a whole number"
                )
            if value is not None:
                return value
        if default is None:
            raise ValueError(f"--model: {source} has none of {', '.join(names)}")
        return default

    num_experts = first("num_local_experts", "num_experts", "n_routed_experts")
    expert_ffn = first("moe_intermediate_size", "intermediate_size")
    shared = first("n_shared_experts", default=0)
    hidden, heads = first("hidden_size"), first("num_attention_heads")
    return ModelShape(
        name=name,
        source=source,
        hidden=hidden,
        num_layers=first("num_hidden_layers"),
        num_dense_layers=first("first_k_dense_replace", default=0),
        dense_ffn=first("intermediate_size", default=0),
        num_experts=num_experts,
        top_k=first("num_experts_per_tok", "moe_topk", "moe_k"),
        expert_ffn=expert_ffn,
        shared_ffn=first("shared_expert_intermediate_size", default=shared * expert_ffn),
        num_heads=heads,
        num_kv_heads=first("num_key_value_heads", default=heads),
        head_dim=first("head_dim", default=hidden // max(1, heads)),
        vocab=first("vocab_size"),
        ties_embeddings=bool(config.get("tie_word_embeddings", False)),
    )
