"""Random packed matrices, factors and experts, made on the device, and poisoned outputs.

Legend: N rows, K cols, G groups, R rank, T tokens, H hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from kernels import packing
from kernels.types import (
    GROUP_SIZE,
    TILE_ROWS,
    GatedMLP,
    GatedRepair,
    LowRank,
    QuantizedMatrix,
    block_bytes,
    matrix_bytes,
)

FACTOR_BITS = 3
GAP = 64
"""Bytes before each rank block, so that only the offsets find them."""


def random_matrix(rows: int, cols: int, bits: int, device: str, seed: int = 0) -> QuantizedMatrix:
    """Uniform codes; scales and zeros that keep outputs near unit size and never symmetric."""
    generator = torch.Generator(device).manual_seed(seed)
    codes_NK = torch.randint(
        0, 2**bits, (rows, cols), dtype=torch.uint8, device=device, generator=generator
    )
    noise_NG = torch.rand(rows, cols // GROUP_SIZE, device=device, generator=generator)
    scale_NG = (noise_NG + 0.5) * (3.0 / ((2**bits - 1) * cols**0.5))
    zero_NG = (2**bits - 1) / 2 + noise_NG - 0.5
    return packing.pack(codes_NK, scale_NG, zero_NG, bits)


def random_low_rank(
    rows: int, cols: int, rank: int, device: str, *, bits: int, seed: int = 0
) -> LowRank:
    """Rank blocks laid back to front with gaps between them."""
    size, num_blocks = block_bytes(rows, cols, bits), rank // TILE_ROWS
    data = torch.full((num_blocks * (size + GAP),), 255, dtype=torch.uint8, device=device)
    offsets = tuple(GAP + index * (size + GAP) for index in reversed(range(num_blocks)))
    for index, offset in enumerate(offsets):
        right = random_matrix(TILE_ROWS, cols, bits, device, seed=seed + 2 * index)
        left_t = random_matrix(TILE_ROWS, rows, bits, device, seed=seed + 2 * index + 1)
        data[offset : offset + size] = torch.cat((right.data, left_t.data))
    return LowRank(data, offsets, rows, cols, bits)


def random_expert(hidden: int, ffn: int, bits: int, device: str, *, seed: int = 0) -> GatedMLP:
    """Three matrices, no biases, silu."""
    return GatedMLP(
        random_matrix(ffn, hidden, bits, device, seed + 1),
        random_matrix(ffn, hidden, bits, device, seed + 2),
        random_matrix(hidden, ffn, bits, device, seed + 3),
        "silu",
    )


def random_factors(hidden: int, ffn: int, rank: int, device: str, *, seed: int = 0) -> GatedRepair:
    """Additions of one rank to the three matrices of `random_expert`."""
    return GatedRepair(
        random_low_rank(ffn, hidden, rank, device, bits=FACTOR_BITS, seed=seed + 100),
        random_low_rank(ffn, hidden, rank, device, bits=FACTOR_BITS, seed=seed + 200),
        random_low_rank(hidden, ffn, rank, device, bits=FACTOR_BITS, seed=seed + 300),
    )


def random_inputs(tokens: int, cols: int, device: str, seed: int = 77) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, cols, device=device, generator=generator)


def copies(matrix: QuantizedMatrix, pool_bytes: int) -> list[QuantizedMatrix]:
    """Enough copies that going round them finds none in the cache; two at least."""
    count = max(2, -(-pool_bytes // matrix_bytes(matrix.rows, matrix.cols, matrix.bits)))
    return [
        QuantizedMatrix(matrix.data.clone(), matrix.rows, matrix.cols, matrix.bits)
        for _ in range(count)
    ]


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected|| / ||expected|| in float64; NaN when `got` holds any."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fresh float memory is NaN meanwhile, so that an element no program writes is seen."""
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        fresh = original(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    with patch.object(torch.Tensor, "new_empty", new_empty):
        yield
