"""Tiny random checkpoints of every supported family, in the layout that the hub has them in.

transformers' own save_pretrained writes them, so the key names are its, not ours. Seeded: the same
arguments give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from expert_store.families import SUPPORTED_MODEL_TYPES

FAMILIES: tuple[str, ...] = SUPPORTED_MODEL_TYPES


def tiny_config(
    family: str,
    *,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 64,
    experts: int = 4,
    top_k: int = 2,
    vocab: int = 128,
    max_positions: int = 256,
    **overrides: Any,
) -> Any:
    """The family's config at toy size. DeepSeek families get one dense layer first."""
    head_dim = hidden // 4
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_positions,
        "num_experts_per_tok": top_k,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    local = {"num_local_experts": experts, "head_dim": head_dim}
    moe = {"moe_intermediate_size": ffn}
    latent = dict(
        num_key_value_heads=4,
        n_routed_experts=experts,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        routed_scaling_factor=1.5,
        n_group=1,
        topk_group=1,
        intermediate_size=2 * ffn,
        **moe,
    )
    own: dict[str, dict[str, Any]] = {
        "mixtral": local,
        "olmoe": {"num_experts": experts, "num_key_value_heads": 4},
        "qwen2_moe": dict(num_experts=experts, shared_expert_intermediate_size=2 * ffn, **moe),
        "qwen3_moe": dict(num_experts=experts, head_dim=head_dim, **moe),
        "deepseek_v2": dict(latent, head_dim=16),
        "deepseek_v3": dict(latent, head_dim=16, num_mtp_layers=0),
        "deepseek": dict(
            num_key_value_heads=4,
            n_routed_experts=experts,
            n_shared_experts=2,
            first_k_dense_replace=1,
            intermediate_size=2 * ffn,
            **moe,
        ),
        "phimoe": {"num_local_experts": experts, "lm_head_bias": True, "attention_bias": True},
        "granitemoe": {
            "num_local_experts": experts,
            "embedding_multiplier": 2.0,
            "attention_multiplier": head_dim**-0.5,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        "gpt_oss": dict(
            local,
            sliding_window=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    }
    if family not in own:
        raise ValueError(f"family: got {family!r}, expected one of {FAMILIES}")
    return CONFIG_MAPPING[family](**{**common, **own[family], **overrides})


def write_tiny_checkpoint(
    family: str,
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 64,
    experts: int = 4,
    top_k: int = 2,
    vocab: int = 128,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write the checkpoint into `folder` (made if need be) and return the folder.

    hidden and ffn are multiples of 64; `overrides` go to the config. No tokenizer is written.
    """
    config = tiny_config(
        family,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        experts=experts,
        top_k=top_k,
        vocab=vocab,
        **overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                # Large enough that wrong experts change the logits, small enough not to blow up.
                parameter.copy_(noise * (0.5 / parameter.shape[-1] ** 0.5))
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.01 * torch.randn(buffer.shape, generator=generator))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)
