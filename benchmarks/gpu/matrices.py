"""Random packed matrices, factors and experts, made on the device, and poisoned outputs.

Legend: N rows, K cols, G groups, R rank, T tokens, H hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch

from kernels import packing
from kernels.types import (
    GROUP_SIZE,
    TILE_ROWS,
    GatedMLP,
    GatedRepair,
    Grid,
    LowRank,
    QuantizedMatrix,
    block_bytes,
    left_offset,
)

FACTOR_BITS = 3
GAP = 64
"""Bytes before each rank block, so that only the offsets find them."""


def form_name(bits: int, grid: Grid) -> str:
    """How groups and rows name codes; the affine grid goes without saying."""
    return f"{bits} bits" + (" symmetric" if grid == "symmetric" else "")


def random_matrix(
    rows: int, cols: int, bits: int, device: str, seed: int = 0, grid: Grid = "affine"
) -> QuantizedMatrix:
    """Uniform codes; scales and zeros that keep outputs near unit size, affine ones off centre."""
    generator = torch.Generator(device).manual_seed(seed)
    codes_NK = torch.randint(
        0, 2**bits, (rows, cols), dtype=torch.uint8, device=device, generator=generator
    )
    noise_NG = torch.rand(rows, cols // GROUP_SIZE, device=device, generator=generator)
    unit = 3.0 / ((2**bits - 1) * cols**0.5)
    if grid == "symmetric":
        scale8_NG = (85 + 170 * noise_NG).to(torch.uint8)
        row_scale_N = unit * (1 + noise_NG[:, 0])
        return packing.pack_symmetric(codes_NK, scale8_NG, row_scale_N, bits)
    scale_NG = (noise_NG + 0.5) * unit
    zero_NG = (2**bits - 1) / 2 + noise_NG - 0.5
    return packing.pack(codes_NK, scale_NG, zero_NG, bits)


def random_low_rank(
    rows: int,
    cols: int,
    rank: int,
    device: str,
    *,
    bits: int,
    seed: int = 0,
    grid: Grid = "affine",
) -> LowRank:
    """Rank blocks laid back to front with gaps between them."""
    size, num_blocks = block_bytes(rows, cols, bits, grid), rank // TILE_ROWS
    left = left_offset(cols, bits, grid)
    data = torch.full((num_blocks * (size + GAP),), 255, dtype=torch.uint8, device=device)
    offsets = tuple(GAP + index * (size + GAP) for index in reversed(range(num_blocks)))
    for index, offset in enumerate(offsets):
        right = random_matrix(TILE_ROWS, cols, bits, device, seed + 2 * index, grid).data
        left_t = random_matrix(TILE_ROWS, rows, bits, device, seed + 2 * index + 1, grid).data
        data[offset : offset + right.numel()] = right
        data[offset + left : offset + left + left_t.numel()] = left_t
    return LowRank(data, offsets, rows, cols, bits, grid)


def random_expert(
    hidden: int, ffn: int, bits: int, device: str, *, seed: int = 0, grid: Grid = "affine"
) -> GatedMLP:
    """Three matrices, no biases, silu."""
    return GatedMLP(
        random_matrix(ffn, hidden, bits, device, seed + 1, grid),
        random_matrix(ffn, hidden, bits, device, seed + 2, grid),
        random_matrix(hidden, ffn, bits, device, seed + 3, grid),
        "silu",
    )


def random_repair(
    hidden: int,
    ffn: int,
    rank: int,
    device: str,
    *,
    seed: int = 0,
    grid: Grid = "affine",
    num_planes: int = 0,
) -> GatedRepair:
    """One rank and so many planes for each of the three matrices of `random_expert`."""

    def factors(rows: int, cols: int, offset: int) -> LowRank:
        return random_low_rank(
            rows, cols, rank, device, bits=FACTOR_BITS, seed=seed + offset, grid=grid
        )

    def planes(rows: int, cols: int, offset: int) -> tuple[QuantizedMatrix, ...]:
        return tuple(
            random_matrix(rows, cols, 1, device, seed + offset + plane, "symmetric")
            for plane in range(num_planes)
        )

    return GatedRepair(
        factors(ffn, hidden, 100),
        factors(ffn, hidden, 200),
        factors(hidden, ffn, 300),
        planes(ffn, hidden, 400),
        planes(ffn, hidden, 500),
        planes(hidden, ffn, 600),
    )


def random_inputs(tokens: int, cols: int, device: str, seed: int = 77) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, cols, device=device, generator=generator)


def copies(matrix: QuantizedMatrix, pool_bytes: int) -> list[QuantizedMatrix]:
    """Enough copies that going round them finds none in the cache; two at least."""
    count = max(2, -(-pool_bytes // matrix.data.numel()))
    return [replace(matrix, data=matrix.data.clone()) for _ in range(count)]


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
