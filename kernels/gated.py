"""The order of operations of a gated MLP with low-rank additions, whatever multiplies the matrices.

Every backend passes its own two products in, so that biases, activation and the restore mask are
written once. Knows no bytes.

Legend: T tokens, H hidden, F ffn, N rows, K cols.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.activations import apply_gate
from kernels.types import GatedLowRank, GatedMLP, LowRank, QuantizedMatrix

MatrixProduct = Callable[[QuantizedMatrix, torch.Tensor], torch.Tensor]
"""(matrix, x_TK) -> [T, N] float32."""
LowRankProduct = Callable[[LowRank, torch.Tensor], torch.Tensor]
"""(factors, x_TK) -> [T, N] float32."""


def compose_gated_mlp(
    x_TH: torch.Tensor,
    mlp: GatedMLP,
    factors: GatedLowRank | None,
    restored_T: torch.Tensor | None,
    *,
    matmul: MatrixProduct,
    low_rank_matmul: LowRankProduct,
) -> torch.Tensor:
    """down(act(gate x + bias) * (up x + bias)) + bias as [T, H] float32.

    Low-rank additions go to the rows where restored_T (bool [T]) is true, to all when it is None.
    """
    x = x_TH.float()
    rows = _restored_rows(factors, restored_T, x)
    gate_TF, up_TF = matmul(mlp.gate, x), matmul(mlp.up, x)
    if factors is not None and rows is not None:
        gate_TF.index_add_(0, rows, low_rank_matmul(factors.gate, x[rows]))
        up_TF.index_add_(0, rows, low_rank_matmul(factors.up, x[rows]))
    if mlp.gate_bias is not None:
        gate_TF += mlp.gate_bias
    if mlp.up_bias is not None:
        up_TF += mlp.up_bias
    h_TF = apply_gate(mlp.activation, gate_TF, up_TF)
    y_TH = matmul(mlp.down, h_TF)
    if factors is not None and rows is not None:
        y_TH.index_add_(0, rows, low_rank_matmul(factors.down, h_TF[rows]))
    if mlp.down_bias is not None:
        y_TH += mlp.down_bias
    return y_TH


def _restored_rows(
    factors: GatedLowRank | None, restored_T: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor | None:
    """Indices of the tokens that get the low-rank additions; None when nothing is to be added.

    A restored_T that lies on the host costs no device synchronisation here.
    """
    if factors is None or max(factors.gate.rank, factors.up.rank, factors.down.rank) == 0:
        return None
    every = torch.ones(x.shape[0], dtype=torch.bool)
    rows = (every if restored_T is None else restored_T).nonzero(as_tuple=True)[0]
    return rows.to(x.device, non_blocking=True) if rows.numel() else None
