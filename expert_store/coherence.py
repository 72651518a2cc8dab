"""Whether a token's experts err together: how alike the rounding errors of one layer's experts are.

Errors of experts that grew from one pretrained layer point the same way and add up; those of
experts trained apart do not. What restoring only some of a token's experts is worth depends on it.
Knows weights, no file and no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from expert_store.choose import ExpertUse
from expert_store.matrix.grid import quantize_grid
from expert_store.types import PROJECTIONS, ExpertKey, ExpertWeights
from kernels.reference import dequantize

BITS = 2
"""Of the codes whose errors are compared: the coarsest, where errors matter."""


def coherence(first: ExpertWeights, second: ExpertWeights) -> float:
    """Mean cosine, over gate, up and down, of the errors of two experts' 2-bit codes; 0 to 1.

    About 0 for experts trained apart; 0.93 for those of smol-moe, which share their base.
    """
    cosines = []
    for name in PROJECTIONS:
        errors = [_error(getattr(weights, name)) for weights in (first, second)]
        norms = float(errors[0].norm() * errors[1].norm())
        cosines.append(float((errors[0] * errors[1]).sum()) / norms if norms else 0.0)
    return min(1.0, max(0.0, sum(cosines) / len(cosines)))


def _error(weight_NK: torch.Tensor) -> torch.Tensor:
    return weight_NK - dequantize(quantize_grid(weight_NK, BITS, grid="symmetric"))


def heard_together(
    uses: Mapping[ExpertKey, ExpertUse], coherence: float
) -> dict[ExpertKey, ExpertUse]:
    """The uses with squared router weights turned into what they count when errors add up so.

    Of a token's output error |sum_i w_i e_i|^2, the parts add up as w_i^2 |e_i|^2 when errors are
    independent, and as w_i (w_1 + w_2 + ...) |e_i|^2, its bound by convexity, when they are alike;
    in between the two are mixed.
    """
    totals = {layer: _total_weight(uses, layer) for layer in {key.layer for key in uses}}
    return {
        key: replace(
            use,
            weight2_at_K=tuple(
                coherence * math.sqrt(weight2) * totals[key.layer] + (1 - coherence) * weight2
                for weight2 in use.weight2_at_K
            ),
        )
        for key, use in uses.items()
    }


def _total_weight(uses: Mapping[ExpertKey, ExpertUse], layer: int) -> float:
    """Of a token's router weights in a layer, about: root mean squares, position by position."""
    experts = [use for key, use in uses.items() if key.layer == layer]
    total = 0.0
    for i in range(len(experts[0].use_at_K)):
        used = sum(use.use_at_K[i] for use in experts)
        squares = sum(use.use_at_K[i] * use.weight2_at_K[i] for use in experts)
        total += math.sqrt(squares / used) if used else 0.0
    return total
