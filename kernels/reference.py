"""The truth: every operation of this room in plain torch with float32 accumulation.

Slow and obvious on purpose; the fast forms are judged against it. Works on any device.

Legend: N rows, K cols, G groups, R rank, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.block_code import BlockCodedMatrix, decode_block_code
from kernels.gated import compose_gated_mlp
from kernels.packing import bf16_weight, middle_code, unpack
from kernels.types import GatedMLP, GatedRepair, LowRank, Matrix, QuantizedMatrix


def dequantize(matrix: Matrix) -> torch.Tensor:
    """The [N, K] float32 weight: scale * code - zero_scaled, or the bfloat16 baseline widened.

    Symmetric: row_scale * (1/255) * scale8 * (code - middle), each step rounded to float32.
    """
    if isinstance(matrix, BlockCodedMatrix):
        return decode_block_code(matrix)
    if matrix.bits == 16:
        return bf16_weight(matrix).float()
    codes_NK, scale_NG, zero_scaled_NG = unpack(matrix)
    weight_NGK = codes_NK.float().view(matrix.rows, -1, matrix.group_size)
    if matrix.grid == "symmetric":
        weight_NGK -= middle_code(matrix.bits)
        weight_NGK *= scale_NG[:, :, None]
    else:
        weight_NGK *= scale_NG[:, :, None]
        weight_NGK -= zero_scaled_NG[:, :, None]
    return weight_NGK.view(matrix.rows, matrix.cols)


def dequantize_low_rank(
    factors: LowRank, dequantize: Callable[[QuantizedMatrix], torch.Tensor] = dequantize
) -> tuple[torch.Tensor, torch.Tensor]:
    """left [N, R] and right [R, K], float32; R is 0 for an empty LowRank.

    `dequantize` is who makes the blocks' float32 factors; `kernels/ops.py` passes a faster one.
    """
    device = factors.data.device
    lefts = [torch.zeros(factors.rows, 0, device=device)]
    rights = [torch.zeros(0, factors.cols, device=device)]
    for block in range(len(factors.block_offsets)):
        lefts.append(dequantize(factors.left_t(block)).T)
        rights.append(dequantize(factors.right(block)))
    return torch.cat(lefts, dim=1), torch.cat(rights)


def matmul(matrix: Matrix, x_TK: torch.Tensor) -> torch.Tensor:
    """x @ W.T as [T, N] float32."""
    return x_TK.float() @ dequantize(matrix).T


def low_rank_matmul(factors: LowRank, x_TK: torch.Tensor) -> torch.Tensor:
    """left @ (right @ x) per token, [T, N] float32; zeros at rank 0."""
    left_NR, right_RK = dequantize_low_rank(factors)
    return (x_TK.float() @ right_RK.T) @ left_NR.T


def gated_mlp(
    x_TH: torch.Tensor,
    mlp: GatedMLP,
    factors: GatedRepair | None = None,
    restored_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """down(act(gate x) * (up x)) as [T, H] float32; factors as in `kernels.ops.gated_mlp`."""
    return compose_gated_mlp(
        x_TH, mlp, factors, restored_T, matmul=matmul, low_rank_matmul=low_rank_matmul
    )
