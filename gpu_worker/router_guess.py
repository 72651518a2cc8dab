"""Where the next MoE layer's router will probably send the tokens, told from this layer's input.

The next layer's router is applied to the present hidden states (speculative loading of
arXiv 2312.17238), rescaled from this layer's norm to the next one's where both are known. Groups of
experts are not looked at. A guess decides which bytes are fetched early, never a result. Knows no
bytes and no cache.

Legend: S token rows, K top-k, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from expert_store.families import experts_modules

_ROUTERS = ("gate", "router")
_NORM = "post_attention_layernorm"


@dataclass(frozen=True, slots=True)
class Guess:
    """The routing of a layer as it is expected."""

    layer: int
    topk_ids_SK: torch.Tensor  # [S, K] int64, the most likely first
    topk_weights_SK: torch.Tensor  # [S, K] float32, as the router scores them


@dataclass(frozen=True, slots=True)
class _Router:
    """What a guess of one layer takes."""

    weight_EH: torch.Tensor
    bias_E: torch.Tensor | None  # of a router that adds one to its logits
    correction_E: torch.Tensor | None  # added to the sigmoid of logits, for the choice alone
    norm_H: torch.Tensor | None  # weight of the norm before it


class RouterGuess:
    """The routers of one model, in the order in which a step comes to them."""

    def __init__(self, routers: Mapping[int, _Router], top_k: int) -> None:
        self._routers = dict(routers)
        self._top_k = top_k
        layers = sorted(routers)
        self._next = dict(zip(layers, layers[1:], strict=False))

    @staticmethod
    def of(model: Any, top_k: int) -> RouterGuess | None:
        """The guess for a loaded model; None when its routers are no single matrix each."""
        routers = {}
        for layer, (path, _) in experts_modules(model).items():
            block_path = path.rpartition(".")[0]
            router = _router(model.get_submodule(block_path))
            if router is None:
                return None
            decoder = model.get_submodule(block_path.rpartition(".")[0])
            norm = getattr(getattr(decoder, _NORM, None), "weight", None)
            routers[layer] = _Router(
                router.weight,
                getattr(router, "bias", None),
                getattr(router, "e_score_correction_bias", None),
                norm,
            )
        return RouterGuess(routers, top_k)

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return next(iter(self._routers.values())).weight_EH.shape[0]

    def next_layer(self, layer: int) -> int | None:
        """The MoE layer after this one; None after the last."""
        return self._next.get(layer)

    def guess(self, layer: int, hidden_SH: torch.Tensor) -> Guess | None:
        """The routing of the MoE layer after `layer`, whose experts get `hidden_SH`."""
        following = self._next.get(layer)
        if following is None:
            return None
        here, there = self._routers[layer], self._routers[following]
        with torch.inference_mode():
            hidden = hidden_SH
            if here.norm_H is not None and there.norm_H is not None:
                hidden = hidden_SH * _ratio(there.norm_H, here.norm_H)
            scores_SE = F.linear(hidden.to(there.weight_EH.dtype), there.weight_EH).float()
            if there.bias_E is not None:
                scores_SE = scores_SE + there.bias_E.float()
            if there.correction_E is not None:
                weights_SE = scores_SE.sigmoid()
                ids = (weights_SE + there.correction_E).topk(self._top_k, dim=-1).indices
            else:
                weights_SE = scores_SE.softmax(dim=-1)
                ids = weights_SE.topk(self._top_k, dim=-1).indices
        return Guess(following, ids, weights_SE.gather(1, ids))


def _router(block: Any) -> Any | None:
    """The module beside the experts whose `weight` is [E, H]."""
    for name in _ROUTERS:
        found = getattr(block, name, None)
        weight = getattr(found, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            return found
    return None


def _ratio(there_H: torch.Tensor, here_H: torch.Tensor) -> torch.Tensor:
    """there / here where this layer's norm lets anything through, else 0."""
    return torch.where(here_H.abs() > 1e-6, there_H / here_H, torch.zeros_like(there_H))
