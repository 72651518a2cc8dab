"""A small dense Llama with the bundled tokenizer, and deltas for it: smol-moe in miniature."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from models import MIXTRAL_MINI
from models.smol.base import Base, base_of
from models.smol.deltas import LayerDeltas, new_layer

HIDDEN, FFN, EXPERTS, RANK, LAYERS = 64, 128, 4, 3, 2


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Weights are bfloat16 values, so that writing them as such changes nothing."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_((value + 0.1 * torch.randn_like(value)).bfloat16().float())
    return model


def tiny_base(seed: int = 0) -> Base:
    return base_of(tiny_llama(seed), AutoTokenizer.from_pretrained(MIXTRAL_MINI))


def fresh_deltas() -> list[LayerDeltas]:
    """As before training: routers that choose, additions that are zero; bfloat16 values."""
    generator = torch.Generator().manual_seed(5)
    routers = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=generator).bfloat16().float()
    return [_as_stored(new_layer(router, FFN, RANK, 7)) for router in routers]


def trained_deltas() -> list[LayerDeltas]:
    """As after training: every expert differs, by as much as the weights themselves."""
    generator = torch.Generator().manual_seed(6)
    layers = fresh_deltas()
    for layer in layers:
        for value in layer.left_t.values():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator).bfloat16())
    return layers


def _as_stored(layer: LayerDeltas) -> LayerDeltas:
    right = {name: value.bfloat16().float() for name, value in layer.right.items()}
    return LayerDeltas(layer.router, right, layer.left_t)
