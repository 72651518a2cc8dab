"""Random packed matrices, factors and MLPs for the kernel tests, with each path's tolerance."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels.packing import middle_code, pack, pack_bf16, pack_symmetric
from kernels.types import (
    GRID_BITS,
    GROUP_SIZE,
    TILE_ROWS,
    Activation,
    GatedMLP,
    GatedRepair,
    Grid,
    LowRank,
    QuantizedMatrix,
    block_bytes,
    left_offset,
)

FORMS = tuple((grid, bits) for grid, widths in GRID_BITS.items() for bits in widths)
"""Every (grid, bits) that has tiles."""

# Relative root-mean-square error against the reference.
FP32_TOLERANCE = 1e-5
TRITON_TOLERANCE = 1e-4  # float32 in another order; TF32x3 on a GPU
INT8_MATMUL_TOLERANCE = 2e-2  # activations rounded to 1/127 of their group's largest
INT8_MLP_TOLERANCE = 3e-2  # two such roundings, through a nonlinearity

TOKEN_COUNTS = (1, 2, 3, 5, 8, 33, 70)


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).double().norm() / expected.double().norm().clamp(min=1e-30))


def random_matrix(
    rows: int,
    cols: int,
    bits: int,
    seed: int = 0,
    grid: Grid = "affine",
    group_size: int = GROUP_SIZE,
) -> QuantizedMatrix:
    """A Gaussian weight on a min-max grid, as a quantiser would leave it; rows differ in size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) / cols**0.5
    weight *= torch.rand(rows, 1, generator=generator) + 0.5
    if bits == 16:
        return pack_bf16(weight)
    grouped = weight.view(rows, cols // group_size, group_size)
    if grid == "symmetric":
        return _on_symmetric_grid(grouped, bits)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = (high - low) / (2**bits - 1)
    zero = -low / scale
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    codes_NK = codes.view(rows, cols).to(torch.uint8)
    return pack(codes_NK, scale, zero, bits, group_size=group_size)


def _on_symmetric_grid(grouped_NGK: torch.Tensor, bits: int) -> QuantizedMatrix:
    middle = middle_code(bits)
    # One bit has only a magnitude; with more the outermost code is the largest weight.
    size_NGK = grouped_NGK.abs()
    scale_NG = size_NGK.mean(-1) / middle if bits == 1 else size_NGK.amax(-1) / middle
    row_scale_N = scale_NG.amax(-1).half().float()
    scale8_NG = (255 * scale_NG / row_scale_N[:, None]).round().clamp(1, 255)
    step_NG1 = (row_scale_N[:, None] * scale8_NG / 255)[..., None]
    codes = (grouped_NGK / step_NG1 + middle).round().clamp(0, 2**bits - 1)
    codes_NK = codes.flatten(1).to(torch.uint8)
    return pack_symmetric(
        codes_NK, scale8_NG.to(torch.uint8), row_scale_N, bits, group_size=grouped_NGK.shape[2]
    )


def random_low_rank(
    rows: int, cols: int, bits: int, num_blocks: int, seed: int = 0, grid: Grid = "affine"
) -> LowRank:
    """Blocks laid out back to front with a gap before each, so that only the offsets find them."""
    gap = 7
    size, left = block_bytes(rows, cols, bits, grid), left_offset(cols, bits, grid)
    data = torch.randint(0, 256, (num_blocks * (size + gap),), dtype=torch.uint8)
    offsets = tuple(gap + b * (size + gap) for b in reversed(range(num_blocks)))
    for b, offset in enumerate(offsets):
        right = random_matrix(TILE_ROWS, cols, bits, seed + 2 * b, grid).data
        left_t = random_matrix(TILE_ROWS, rows, bits, seed + 2 * b + 1, grid).data
        data[offset : offset + right.numel()] = right
        data[offset + left : offset + left + left_t.numel()] = left_t
    return LowRank(data, offsets, rows, cols, bits, grid)


def random_mlp(
    hidden: int,
    ffn: int,
    bits: int,
    *,
    activation: Activation = "silu",
    biases: bool = False,
    seed: int = 0,
    grid: Grid = "affine",
    group_size: int = GROUP_SIZE,
) -> GatedMLP:
    generator = torch.Generator().manual_seed(seed + 1000)

    def bias(size: int) -> torch.Tensor | None:
        return torch.randn(size, generator=generator) if biases else None

    return GatedMLP(
        random_matrix(ffn, hidden, bits, seed, grid, group_size),
        random_matrix(ffn, hidden, bits, seed + 1, grid, group_size),
        random_matrix(hidden, ffn, bits, seed + 2, grid, group_size),
        activation,
        bias(ffn),
        bias(ffn),
        bias(hidden),
    )


def random_factors(
    hidden: int, ffn: int, bits: int, num_blocks: int, grid: Grid = "affine", num_planes: int = 0
) -> GatedRepair:
    """`num_blocks` rank blocks and `num_planes` planes for each of the three matrices."""

    def planes(rows: int, cols: int, seed: int) -> tuple[QuantizedMatrix, ...]:
        return tuple(random_matrix(rows, cols, 1, seed + p, "symmetric") for p in range(num_planes))

    return GatedRepair(
        random_low_rank(ffn, hidden, bits, num_blocks, 10, grid),
        random_low_rank(ffn, hidden, bits, num_blocks, 30, grid),
        random_low_rank(hidden, ffn, bits, num_blocks, 50, grid),
        planes(ffn, hidden, 70),
        planes(ffn, hidden, 80),
        planes(hidden, ffn, 90),
    )


def random_inputs(num_tokens: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, cols, generator=torch.Generator().manual_seed(seed + 77))


def rounded_to_int8(x_TK: torch.Tensor) -> torch.Tensor:
    """What the int8 kernels make of their inputs: multiples of a 127th of each group's largest."""
    grouped = x_TK.view(x_TK.shape[0], -1, GROUP_SIZE)
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    return ((grouped / scale).round() * scale).view(x_TK.shape)


def poisoned(rows: int, cols: int) -> torch.Tensor:
    """Output memory that shows every element a kernel forgot to write."""
    return torch.full((rows, cols), float("nan"))


def at_odd_address(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same matrix at an odd address, as in the middle of a mapped file."""
    size, device = matrix.data.numel() + 2, matrix.data.device
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)
    start = 1 + buffer.data_ptr() % 2
    view = buffer[start : start + matrix.data.numel()]
    view.copy_(matrix.data)
    return replace(matrix, data=view)
