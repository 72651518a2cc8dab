"""A Mixtral checkpoint as a GGUF file that llama.cpp reads: architecture llama with experts.

`python -m benchmarks.offload_parts.gguf_file MODEL FILE bf16|q4_0` writes one. It has no
vocabulary: token ids go in. Raises ValueError for another family.

Legend: E experts, F ffn, H hidden.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig

TYPES = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT_NAMES = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def write_gguf(model: Path, file: Path, kind: str) -> None:
    """Write it: experts and attention in `kind`, a key of TYPES; norms and routers in float32."""
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    if config.model_type != "mixtral":
        raise ValueError(f"model: got {config.model_type}, only mixtral can be written as GGUF")
    writer = gguf.GGUFWriter(file, "llama")
    _write_config(writer, config)
    for name, array in _tensors(_Weights(model), config):
        is_small = array.ndim == 1 or "ffn_gate_inp" in name
        if is_small:
            writer.add_tensor(name, array)
        else:
            data = gguf.quants.quantize(array, TYPES[kind])
            writer.add_tensor(name, data, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Weights:
    """The checkpoint's tensors by name, as float32 arrays."""

    def __init__(self, model: Path) -> None:
        self._of: dict[str, Any] = {}
        for path in sorted(model.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self._of |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def __getitem__(self, name: str) -> np.ndarray:
        tensor: torch.Tensor = self._of[name].get_tensor(name)
        return tensor.float().numpy()


def _write_config(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _tensors(weights: _Weights, config: Any) -> Any:
    """Names and float32 arrays, the experts of a layer as one [E, rows, cols]."""
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if "lm_head.weight" in weights:
        yield "output.weight", weights["lm_head.weight"]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for theirs, ours in LAYER_NAMES.items():
            array = weights[f"{prefix}.{theirs}.weight"]
            if ours in heads:
                array = _interleaved(array, heads[ours])
            yield f"blk.{layer}.{ours}.weight", array
        for theirs, ours in EXPERT_NAMES.items():
            experts = [
                weights[f"{prefix}.block_sparse_moe.experts.{expert}.{theirs}.weight"]
                for expert in range(config.num_local_experts)
            ]
            yield f"blk.{layer}.{ours}.weight", np.stack(experts)


def _interleaved(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head as llama.cpp rotates them: neighbours are a pair, not the two halves."""
    rows, cols = array.shape
    halves = array.reshape(num_heads, 2, rows // num_heads // 2, cols)
    return halves.swapaxes(1, 2).reshape(rows, cols)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
