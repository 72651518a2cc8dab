"""Random packed matrices, factors and MLPs for the kernel tests, with each path's tolerance."""

from __future__ import annotations

import torch

from kernels.packing import pack, pack_bf16
from kernels.types import (
    GROUP_SIZE,
    TILE_ROWS,
    Activation,
    GatedMLP,
    GatedRepair,
    LowRank,
    QuantizedMatrix,
    block_bytes,
)

# Relative root-mean-square error against the reference.
FP32_TOLERANCE = 1e-5
TRITON_TOLERANCE = 1e-4  # float32 in another order; TF32x3 on a GPU
INT8_MATMUL_TOLERANCE = 2e-2  # activations rounded to 1/127 of their group's largest
INT8_MLP_TOLERANCE = 3e-2  # two such roundings, through a nonlinearity

TOKEN_COUNTS = (1, 2, 3, 5, 8, 33, 70)


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).double().norm() / expected.double().norm().clamp(min=1e-30))


def random_matrix(rows: int, cols: int, bits: int, seed: int = 0) -> QuantizedMatrix:
    """A Gaussian weight on a min-max grid, as a quantiser would leave it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) / cols**0.5
    if bits == 16:
        return pack_bf16(weight)
    grouped = weight.view(rows, cols // GROUP_SIZE, GROUP_SIZE)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = (high - low) / (2**bits - 1)
    zero = -low / scale
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return pack(codes.view(rows, cols).to(torch.uint8), scale, zero, bits)


def random_low_rank(rows: int, cols: int, bits: int, num_blocks: int, seed: int = 0) -> LowRank:
    """Blocks laid out back to front with a gap before each, so that only the offsets find them."""
    gap = 7
    size = block_bytes(rows, cols, bits)
    data = torch.randint(0, 256, (num_blocks * (size + gap),), dtype=torch.uint8)
    offsets = tuple(gap + b * (size + gap) for b in reversed(range(num_blocks)))
    for b, offset in enumerate(offsets):
        right = random_matrix(TILE_ROWS, cols, bits, seed + 2 * b).data
        left_t = random_matrix(TILE_ROWS, rows, bits, seed + 2 * b + 1).data
        data[offset : offset + size] = torch.cat((right, left_t))
    return LowRank(data, offsets, rows, cols, bits)


def random_mlp(
    hidden: int,
    ffn: int,
    bits: int,
    *,
    activation: Activation = "silu",
    biases: bool = False,
    seed: int = 0,
) -> GatedMLP:
    generator = torch.Generator().manual_seed(seed + 1000)

    def bias(size: int) -> torch.Tensor | None:
        return torch.randn(size, generator=generator) if biases else None

    return GatedMLP(
        random_matrix(ffn, hidden, bits, seed),
        random_matrix(ffn, hidden, bits, seed + 1),
        random_matrix(hidden, ffn, bits, seed + 2),
        activation,
        bias(ffn),
        bias(ffn),
        bias(hidden),
    )


def random_factors(hidden: int, ffn: int, bits: int, num_blocks: int) -> GatedRepair:
    return GatedRepair(
        random_low_rank(ffn, hidden, bits, num_blocks, seed=10),
        random_low_rank(ffn, hidden, bits, num_blocks, seed=30),
        random_low_rank(hidden, ffn, bits, num_blocks, seed=50),
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
    return QuantizedMatrix(view, matrix.rows, matrix.cols, matrix.bits)
