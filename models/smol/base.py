"""The dense model that smol-moe is made of: its weights by layer, read from the package's GGUF.

transformers reads GGUF with the `gguf` package. Knows nothing of experts.

Legend: H hidden, F ffn, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True, slots=True)
class Base:
    """A dense Llama: configuration, weights under their names in a checkpoint, tokenizer."""

    config: Any  # LlamaConfig
    weights: dict[str, torch.Tensor]  # float32; lm_head is left out when it is tied
    tokenizer: Any

    def mlp(self, layer: int, projection: str) -> torch.Tensor:
        """The weight of "gate", "up" or "down" of one layer: [out, in] float32."""
        return self.weights[f"model.layers.{layer}.mlp.{projection}_proj.weight"]


def load_base(gguf: Path) -> Base:
    """Read a GGUF file of a Llama, dequantised. Raises OSError and what transformers raises."""
    folder, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # The file says tokenizer.ggml.pre = "smollm": digits stand alone. transformers 5.23 ignores it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return base_of(model, tokenizer)


def base_of(model: Any, tokenizer: Any) -> Base:
    """The `Base` of a LlamaForCausalLM that is in memory."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return Base(model.config, weights, tokenizer)
