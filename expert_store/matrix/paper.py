"""The paper's rank blocks (arXiv 2512.17073): truncated SVD of the residual, factors through hqq.

Bytes of one rank block of 16 for hidden 4096, ffn 14336 at 3 bits: (64 + 224) tiles x 448 = 126
KiB, so rank 32 of an expert (three projections) is 0.74 MiB beside 52.5 MiB of 2-bit codes (1.4 %).
For hidden 2048, ffn 768: 44 tiles x 448 = 19 KiB, so 0.11 MiB beside 1.4 MiB (8.0 %).

Legend: N rows, K cols, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expert_store.matrix.hqq import quantize_hqq
from expert_store.matrix.low_rank import RankRepair
from kernels.reference import dequantize
from kernels.types import TILE_ROWS


def truncated_svd(residual_NK: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-`rank` approximation as left [N, R] = U sqrt(S), right [R, K] = sqrt(S) V.

    By the Gram matrix of the shorter side and `eigh`: the same subspace as a full SVD (float32 Gram
    of a near-white residual loses nothing that shows) in a sixth of its time. float32 in and out.
    Raises ValueError when the rank is over the matrix.
    """
    rows, cols = residual_NK.shape
    if not 0 <= rank <= min(rows, cols):
        raise ValueError(f"rank: got {rank}, expected 0 to {min(rows, cols)} for [{rows}, {cols}]")
    if rows > cols:
        left, right = truncated_svd(residual_NK.T, rank)
        return right.T.contiguous(), left.T.contiguous()
    _, vectors = torch.linalg.eigh(residual_NK @ residual_NK.T)  # rising eigenvalues
    basis_NR = vectors[:, rows - rank :].flip(1)
    projected_RK = basis_NR.T @ residual_NK  # S V: row norms are the singular values
    root = projected_RK.norm(dim=1).sqrt()
    safe = torch.where(root > 0, root, torch.ones_like(root))
    return (basis_NR * root).contiguous(), (projected_RK / safe[:, None]).contiguous()


def svd_repairs(residual_NK: torch.Tensor, rank: int, factor_bits: int) -> list[RankRepair]:
    """Rank blocks of 16, largest singular values first; the gain of each is what it removes alone.

    Raises ValueError when the rank is no multiple of 16 or over the matrix.
    """
    if rank % TILE_ROWS:
        raise ValueError(f"rank: got {rank}, expected a multiple of {TILE_ROWS}")
    if rank == 0:
        return []
    left_NR, right_RK = truncated_svd(residual_NK, rank)
    blocks = []
    for start in range(0, rank, TILE_ROWS):
        part = slice(start, start + TILE_ROWS)
        right = quantize_hqq(right_RK[part].contiguous(), factor_bits)
        left_t = quantize_hqq(left_NR[:, part].T.contiguous(), factor_bits)
        right_part, left_part = dequantize(right), dequantize(left_t).T
        # ||E||^2 - ||E - L R||^2 = 2 <E R^T, L> - <L^T L, R R^T>
        gain = 2 * ((residual_NK @ right_part.T) * left_part).sum(dtype=torch.float64)
        gain -= ((left_part.T @ left_part) * (right_part @ right_part.T)).sum(dtype=torch.float64)
        blocks.append(RankRepair(right, left_t, float(gain)))
    return blocks


def in_order(blocks: Sequence[RankRepair]) -> list[RankRepair]:
    """Falling order of what each removes alone, per byte; ties keep their order."""
    return sorted(blocks, key=lambda block: block.gain / block.num_bytes, reverse=True)
