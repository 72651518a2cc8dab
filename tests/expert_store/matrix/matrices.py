"""Weights and moments that the quantisers are tried on."""

from __future__ import annotations

from functools import cache

import torch
from safetensors import safe_open

from expert_store.matrix.moments import Moment, MomentSum
from models import MIXTRAL_MINI


def gaussian(rows: int = 48, cols: int = 192, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05


def heavy_tailed(rows: int = 48, cols: int = 192, seed: int = 0) -> torch.Tensor:
    """Student's t of 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(5, rows, cols, generator=generator)
    return normal[0] / normal[1:].square().mean(dim=0).sqrt() * 0.05


@cache
def trained(name: str = "w1", layer: int = 1) -> torch.Tensor:
    """128 rows of an expert of the bundled mixtral-mini."""
    with safe_open(MIXTRAL_MINI / "model.safetensors", framework="pt") as file:
        key = next(key for key in sorted(file.keys()) if f"layers.{layer}." in key and name in key)
        weight: torch.Tensor = file.get_tensor(key).float()
    return weight.reshape(-1, weight.shape[-1])[:128].contiguous()


def correlated_moment(cols: int, tokens: int = 400, seed: int = 1, scale: float = 1.0) -> Moment:
    """Inputs of unequal energy that go together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(cols) + 0.7 * torch.randn(cols, cols, generator=generator) / cols**0.5
    loudness = torch.exp(0.8 * torch.randn(cols, generator=generator))
    total = MomentSum(cols)
    total.add(torch.randn(tokens, cols, generator=generator) @ mix * loudness * scale)
    return total.moment()
