"""Weights that are hard to code within a bound, and their block codes, for the kernel tests."""

from __future__ import annotations

import torch

from kernels.block_code import BlockCodedMatrix
from kernels.block_encode import encode_block_code


def nasty(rows: int, cols: int, seed: int, power: float = 3.0) -> torch.Tensor:
    """Heavy tails, rows of very different scale, zeros, one constant row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    weight = weight.sign() * weight.abs() ** power
    weight *= (torch.rand(rows, 1, generator=generator) * 40 - 20).exp2()
    weight[1::5] = 0
    weight[2::7] = 1.5
    return weight


def bound_of(weight: torch.Tensor, relative: float, grouped: bool) -> torch.Tensor:
    groups = weight.shape[1] // 64 if grouped else 1
    rms = weight.view(weight.shape[0], groups, -1).double().pow(2).mean(-1).sqrt()
    floor = rms.amax(dim=1, keepdim=True) * 2.0**-10
    return (relative * rms.maximum(floor)).clamp(min=2.0**-100)


def code_of(
    rows: int, cols: int, relative: float, *, grouped: bool = False, differenced: bool = False
) -> BlockCodedMatrix:
    weight = nasty(rows, cols, seed=rows + cols)
    return encode_block_code(weight, bound_of(weight, relative, grouped), differenced=differenced)
