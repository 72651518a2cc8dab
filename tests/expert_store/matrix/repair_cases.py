"""Small matrices with what makes repair easy or hard: outlying inputs, low rank, few tokens.

Legend: N rows, K cols, T tokens.
"""

from __future__ import annotations

import torch

from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.moments import Moment
from kernels.reference import dequantize


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """[N, K]: Gaussian, with some columns twice as large."""
    values = 0.02 * torch.randn(rows, cols, generator=generator(seed))
    values[:, :: cols // 8] *= 2
    return values


def residual(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """[N, K]: what 2-bit codes leave of such a weight, and a part of rank 4."""
    values = weight(rows, cols, seed)
    left = values - dequantize(quantize_grid(values, 2, grid="symmetric"))
    low = torch.randn(rows, 4, generator=generator(seed + 1))
    return left + 0.002 * low @ torch.randn(4, cols, generator=generator(seed + 2))


def moment(cols: int, tokens: int | None = None, seed: int = 3) -> Moment:
    """Of correlated inputs, some of them ten times as large; rank-deficient under `cols` tokens."""
    tokens = tokens or 4 * cols
    mixing = torch.eye(cols) + 0.3 * torch.randn(cols, cols, generator=generator(seed)) / cols**0.5
    inputs = torch.randn(tokens, cols, generator=generator(seed + 1)) @ mixing
    inputs[:, :: cols // 4] *= 10
    return Moment(inputs.T @ inputs / tokens)


def row_weights(rows: int, seed: int = 5) -> torch.Tensor:
    """[N]: of one to a hundred, and one row that does not matter at all."""
    weights = 10 ** (2 * torch.rand(rows, generator=generator(seed)))
    weights[1] = 0
    return weights
