"""DeepSeek-MoE-16B ("deepseek"), which transformers lacks: Llama attention, DeepSeek-V2's experts.

Follows the published remote code: softmax, top-k without renormalising, plus shared experts.
The decorator's name must occur in this file, transformers greps it: @use_experts_implementation.

Legend: T tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

MODEL_TYPE = "deepseek"


class DeepseekConfig(LlamaConfig):
    """Fields of the published config.json; the defaults are those of DeepSeek-MoE-16B."""

    model_type = MODEL_TYPE
    attribute_map = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}

    moe_intermediate_size: int = 1408
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True


class DeepseekRouter(nn.Module):
    """hidden [T, H] -> (logits [T, E], weights [T, K] in the input's dtype, expert ids [T, K])."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        if config.scoring_func != "softmax":
            raise ValueError(
                f"scoring_func: got {config.scoring_func!r}, expected 'softmax', the only one "
                "that model_type 'deepseek' was published with"
            )
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = nn.functional.linear(hidden_TH, self.weight)
        scores_TE = logits_TE.softmax(-1, dtype=torch.float32)
        weights_TK, ids_TK = torch.topk(scores_TE, self.top_k, dim=-1, sorted=False)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return logits_TE, weights_TK.to(hidden_TH.dtype), ids_TK


class DeepseekMoE(nn.Module):
    """Routed experts plus, where the config has them, always-on shared experts."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.experts = DeepseekV2Experts(config)
        self.gate = DeepseekRouter(config)
        self.shared_experts = None
        if config.n_shared_experts:
            shared_size = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = LlamaMLP(
                type(config)(**{**config.to_dict(), "intermediate_size": shared_size})
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden_TH = hidden.view(-1, hidden.shape[-1])
        _, weights_TK, ids_TK = self.gate(hidden_TH)
        out = self.experts(hidden_TH, ids_TK, weights_TK).view_as(hidden)
        return out if self.shared_experts is None else out + self.shared_experts(hidden)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        is_moe = (
            config.n_routed_experts is not None
            and layer_idx >= config.first_k_dense_replace
            and layer_idx % config.moe_layer_freq == 0
        )
        if is_moe:
            self.mlp = DeepseekMoE(config)


class DeepseekModel(LlamaModel):
    config_class = DeepseekConfig
    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        # Not LlamaModel's own constructor: that would first build a Llama of the same size.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(LlamaForCausalLM):
    config_class = DeepseekConfig
    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Make transformers' Auto classes and key conversion know this model. Safe to call again."""
    AutoConfig.register(MODEL_TYPE, DeepseekConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    if get_checkpoint_conversion_mapping(MODEL_TYPE) is None:
        # Same hub keys as qwen2_moe: mlp.experts.E.{gate,up,down}_proj.weight.
        register_checkpoint_conversion_mapping(
            MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe")
        )
