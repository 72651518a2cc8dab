"""torch's own contestants: its int4 product, three of them for an expert, and plain bfloat16.

Legend: T tokens, N rows, K cols.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.cpu_kernels.contestant import (
    PATTERN_ROWS,
    Call,
    Contestant,
    Form,
    Shape,
    num_copies,
    random_pattern,
)

GROUP = 64
TOLERANCE = 2e-2  # bfloat16 activations and scales
Product = Callable[[torch.Tensor], torch.Tensor]


def contestants(shape: Shape, form: Form) -> list[Contestant]:
    return [int4(shape, form), bf16(shape, form)]


def int4(shape: Shape, form: Form) -> Contestant:
    """_weight_int4pack_mm_for_cpu; it has no fused form, so an expert is three calls."""
    packed = [_quantized(rows, cols) for rows, cols in shape.matrices(form)]
    num_bytes = sum(codes.nbytes + grids.nbytes for codes, grids, _ in packed)

    def product(codes: torch.Tensor, grids: torch.Tensor) -> Product:
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, grids)

    def products() -> list[Product]:
        return [product(codes.clone(), grids.clone()) for codes, grids, _ in packed]

    return _contestant(
        "torch int4", 4, num_bytes, products, lambda: [weight() for _, _, weight in packed]
    )


def bf16(shape: Shape, form: Form) -> Contestant:
    """Unquantised weights: what the link would have had to carry."""
    weights = [
        random_pattern(rows, cols).bfloat16().repeat(rows // PATTERN_ROWS, 1)
        for rows, cols in shape.matrices(form)
    ]
    num_bytes = sum(weight.nbytes for weight in weights)

    def products() -> list[Product]:
        return [partial(torch.nn.functional.linear, weight=weight.clone()) for weight in weights]

    return _contestant(
        "torch bf16", 16, num_bytes, products, lambda: [weight.float() for weight in weights]
    )


def _contestant(
    name: str,
    bits: int,
    num_bytes: int,
    products: Callable[[], list[Product]],
    weights: Callable[[], list[torch.Tensor]],
) -> Contestant:
    copies = [products() for _ in range(num_copies(num_bytes))]

    def start(x_TK: torch.Tensor) -> list[Call]:
        x = x_TK.bfloat16()
        return [lambda p=p: _run(p, x) for p in copies]

    return Contestant(name, bits, num_bytes, TOLERANCE, start, weights)


def _run(products: list[Product], x: torch.Tensor) -> torch.Tensor:
    first = products[0](x)
    if len(products) == 1:
        return first
    return products[2](torch.nn.functional.silu(first) * products[1](x))


def _quantized(
    rows: int, cols: int
) -> tuple[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]]:
    """torch's packed codes, its [K/64, N, 2] scales and zeros, and who dequantises them."""
    grouped = random_pattern(rows, cols).view(PATTERN_ROWS, cols // GROUP, GROUP)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()  # the value of code 8
    codes = (
        ((grouped - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    )
    times = rows // PATTERN_ROWS
    grids = torch.stack((scale.T.repeat(1, times), zero.T.repeat(1, times)), dim=-1).contiguous()
    all_codes = codes.flatten(1).int().repeat(times, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(all_codes, 1)

    def dequantized() -> torch.Tensor:
        weight = (codes - 8) * scale.float()[..., None] + zero.float()[..., None]
        return weight.flatten(1).repeat(times, 1)

    return packed, grids, dequantized
