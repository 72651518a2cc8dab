"""The upcycled model's forward pass for training: experts are never put together.

Every expert is base + low rank, so the base's gate and up are computed once per token, and its down
once on the router-weighted sum over the chosen experts. Frozen weights are bfloat16 and get no
gradient; the residual stream, norms, softmaxes and the router are float32.

Legend: B windows, S positions, T = B*S tokens, H hidden, F ffn, E experts, K chosen, R rank, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.smol import TOP_K
from models.smol.base import Base
from models.smol.deltas import LayerDeltas

Adjust = Callable[["Routing"], "Routing"]
Tap = Callable[[int, Tensor], None]
_HEAD_CHUNK = 256  # tokens; 256 x 49152 logits in float32 are 50 MB


class Routing(NamedTuple):
    """What one layer's router said."""

    probabilities: Tensor  # [T, E] float32
    chosen: Tensor  # [T, K] int64, the heaviest first
    weights: Tensor  # [T, K] float32, sum 1


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor  # [H] float32
    qkv: Tensor  # [(heads + 2 kv_heads) * head_dim, H]
    out: Tensor  # [H, heads * head_dim]
    mlp_norm: Tensor  # [H] float32
    gate_up: Tensor  # [2F, H]
    down: Tensor  # [H, F]


class TrainingModel:
    """The frozen base with a forward pass that takes the deltas. `dtype` is the products'."""

    def __init__(self, base: Base, dtype: torch.dtype = torch.bfloat16) -> None:
        self._config = base.config
        self._dtype = dtype
        weights = base.weights
        self._embedding = weights["model.embed_tokens.weight"].to(dtype)
        head = weights.get("lm_head.weight")
        self._head = self._embedding if head is None else head.to(dtype)
        self._norm = weights["model.norm.weight"].float()
        self._layers = [_layer(base, i, dtype) for i in range(base.config.num_hidden_layers)]

    def hidden(
        self,
        tokens_BS: Tensor,
        deltas: Sequence[LayerDeltas] | None,
        tap: Tap | None = None,
        adjust: Adjust | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Last hidden states [T, H] float32, and each layer's routing; `deltas` None is the base.

        `tap` is shown each layer's FFN inputs [T, H] float32; `adjust` changes what a router said.
        """
        B, S = tokens_BS.shape
        x_TH = self._embedding[tokens_BS.reshape(-1)].float()
        rotation = _rotation(self._config, S)
        mask = torch.full((S, S), float("-inf")).triu(1).to(self._dtype)
        routings = []
        for number, layer in enumerate(self._layers):
            n_TH = self._normed(x_TH, layer.attention_norm).to(self._dtype)
            x_TH = x_TH + self._attention(n_TH, layer, (B, S), rotation, mask)
            n_TH = self._normed(x_TH, layer.mlp_norm)
            if tap is not None:
                tap(number, n_TH)
            if deltas is None:
                x_TH = x_TH + _dense_mlp(n_TH.to(self._dtype), layer)
                continue
            routing = route(n_TH, deltas[number].router)
            if adjust is not None:
                routing = adjust(routing)
            x_TH = x_TH + _moe_mlp(n_TH.to(self._dtype), layer, deltas[number], routing)
            routings.append(routing)
        return self._normed(x_TH, self._norm), routings

    def losses(self, hidden_TH: Tensor, targets_T: Tensor) -> Tensor:
        """Each token's nats, [T] float32; the gradient goes to `hidden_TH` alone."""
        losses: Tensor = _HeadLoss.apply(hidden_TH, self._head, targets_T)
        return losses

    def _normed(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        eps = self._config.rms_norm_eps
        return functional.rms_norm(x_TH, weight_H.shape, weight_H, eps)

    def _attention(
        self,
        n_TH: Tensor,
        layer: _Layer,
        shape: tuple[int, int],
        rotation: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        B, S = shape
        config = self._config
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, _dim(config)
        joined = functional.linear(n_TH, layer.qkv).view(B, S, heads + 2 * kv_heads, dim)
        q, k, v = joined.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
        q, k = _rotated(q, rotation), _rotated(k, rotation)
        repeat = heads // kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        # Plain products: at 192 positions twice as fast as torch's fused attention on this CPU.
        scores = (q * dim**-0.5) @ k.transpose(-1, -2) + mask
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B * S, heads * dim)
        return functional.linear(mixed, layer.out)


def route(n_TH: Tensor, router_EH: Tensor) -> Routing:
    """As Mixtral: softmax over all experts, the two largest, made to sum to one."""
    probabilities = functional.linear(n_TH, router_EH).softmax(-1)
    weights, chosen = probabilities.topk(TOP_K, dim=-1)
    return Routing(probabilities, chosen, weights / weights.sum(-1, keepdim=True))


def balance_loss(routings: Sequence[Routing]) -> Tensor:
    """E * sum over experts of (share of the choices) x (mean probability), mean over layers.

    1.0 when the experts are used alike.
    """
    total = torch.zeros(())
    for probabilities, chosen, _ in routings:
        num_experts = probabilities.shape[-1]
        share = torch.bincount(chosen.reshape(-1), minlength=num_experts) / chosen.numel()
        total = total + num_experts * (share * probabilities.mean(0)).sum()
    return total / len(routings)


def _dense_mlp(n_TH: Tensor, layer: _Layer) -> Tensor:
    gate, up = functional.linear(n_TH, layer.gate_up).chunk(2, -1)
    return functional.linear(functional.silu(gate) * up, layer.down)


def _moe_mlp(n_TH: Tensor, layer: _Layer, deltas: LayerDeltas, routing: Routing) -> Tensor:
    """Sum over slots k of weight_k * expert_k(n).

    All experts' right factors are applied to every token (E*R columns: nothing beside the base),
    and the columns of other experts than the slot's set to zero.
    """
    dtype = n_TH.dtype
    num_experts, rank, _ = deltas.right["gate"].shape
    right = {name: value.to(dtype).flatten(0, 1) for name, value in deltas.right.items()}
    left_t = {name: value.to(dtype).flatten(0, 1) for name, value in deltas.left_t.items()}
    base_gate, base_up = functional.linear(n_TH, layer.gate_up).chunk(2, -1)
    low_gate, low_up = (functional.linear(n_TH, right[name]) for name in ("gate", "up"))
    mixed, low_down = None, None
    for slot in range(TOP_K):
        one_hot = functional.one_hot(routing.chosen[:, slot], num_experts)
        mask = one_hot.repeat_interleave(rank, -1).to(dtype)
        gate = torch.addmm(base_gate, low_gate * mask, left_t["gate"])
        up = torch.addmm(base_up, low_up * mask, left_t["up"])
        h_TF = functional.silu(gate) * up * routing.weights[:, slot, None].to(dtype)
        low = functional.linear(h_TF, right["down"]) * mask
        mixed = h_TF if mixed is None else mixed + h_TF
        low_down = low if low_down is None else low_down + low
    assert mixed is not None
    assert low_down is not None
    return torch.addmm(functional.linear(mixed, layer.down), low_down, left_t["down"])


class _HeadLoss(torch.autograd.Function):
    """Cross entropy against a frozen head, with its gradient made chunk by chunk on the way."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor) -> Tensor:
        losses, gradients = [], []
        for h, target in zip(
            hidden_TH.split(_HEAD_CHUNK), targets_T.split(_HEAD_CHUNK), strict=True
        ):
            logits = functional.linear(h.to(head_VH.dtype), head_VH).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            losses.append((log_sum - logits.gather(1, target[:, None])).squeeze(1))
            if ctx.needs_input_grad[0]:
                soft = logits.sub_(log_sum).exp_().to(head_VH.dtype)
                gradients.append((soft @ head_VH).float() - head_VH[target].float())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient_TH,) = ctx.saved_tensors
        return gradient_TH * grad_outputs[0][:, None], None, None


def _layer(base: Base, number: int, dtype: torch.dtype) -> _Layer:
    prefix, weights = f"model.layers.{number}.", base.weights
    qkv = [weights[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
    return _Layer(
        attention_norm=weights[f"{prefix}input_layernorm.weight"].float(),
        qkv=torch.cat(qkv).to(dtype),
        out=weights[f"{prefix}self_attn.o_proj.weight"].to(dtype),
        mlp_norm=weights[f"{prefix}post_attention_layernorm.weight"].float(),
        gate_up=torch.cat([base.mlp(number, "gate"), base.mlp(number, "up")]).to(dtype),
        down=base.mlp(number, "down").to(dtype),
    )


def _dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rotation(config: Any, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, head_dim] float32 of the default rope."""
    dim, theta = _dim(config), config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(0, dim, 2).float() / dim)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (each.to(x.dtype) for each in rotation)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
