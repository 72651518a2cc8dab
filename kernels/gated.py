"""The order of operations of a gated MLP and its repair, whatever multiplies the matrices.

Every backend passes its own two products in, so that biases, activation, planes and the restore
mask are written once. Knows no bytes.

Legend: T tokens, H hidden, F ffn, N rows, K cols, S restored tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kernels.activations import apply_gate
from kernels.types import GatedMLP, GatedRepair, LowRank, Matrix, QuantizedMatrix

MatrixProduct = Callable[[Matrix, torch.Tensor], torch.Tensor]
"""(matrix, x_TK) -> [T, N] float32."""
LowRankProduct = Callable[[LowRank, torch.Tensor], torch.Tensor]
"""(factors, x_TK) -> [T, N] float32."""


def compose_gated_mlp(
    x_TH: torch.Tensor,
    mlp: GatedMLP,
    factors: GatedRepair | None,
    restored_T: torch.Tensor | None,
    *,
    matmul: MatrixProduct,
    low_rank_matmul: LowRankProduct,
) -> torch.Tensor:
    """down(act(gate x + bias) * (up x + bias)) + bias as [T, H] float32.

    Low-rank factors and planes are added to the rows where restored_T (bool [T]) is true, to all
    when it is None.
    """
    x = x_TH.float()
    rows = _restored_rows(factors, restored_T, x)
    gate_TF, up_TF = matmul(mlp.gate, x), matmul(mlp.up, x)
    if factors is not None and rows is not None:
        add = partial(_add, rows=rows, matmul=matmul, low_rank_matmul=low_rank_matmul)
        restored = x[rows]
        add(gate_TF, restored, factors.gate, factors.gate_planes)
        add(up_TF, restored, factors.up, factors.up_planes)
    if mlp.gate_bias is not None:
        gate_TF += mlp.gate_bias
    if mlp.up_bias is not None:
        up_TF += mlp.up_bias
    h_TF = apply_gate(mlp.activation, gate_TF, up_TF)
    y_TH = matmul(mlp.down, h_TF)
    if factors is not None and rows is not None:
        add(y_TH, h_TF[rows], factors.down, factors.down_planes)
    if mlp.down_bias is not None:
        y_TH += mlp.down_bias
    return y_TH


def _add(
    y_TN: torch.Tensor,
    x_SK: torch.Tensor,
    low_rank: LowRank,
    planes: tuple[QuantizedMatrix, ...],
    *,
    rows: torch.Tensor,
    matmul: MatrixProduct,
    low_rank_matmul: LowRankProduct,
) -> None:
    """y[rows] += what factors, then planes, make of x_SK, the inputs of those S rows."""
    if low_rank.rank:
        y_TN.index_add_(0, rows, low_rank_matmul(low_rank, x_SK))
    for plane in planes:
        y_TN.index_add_(0, rows, matmul(plane, x_SK))


def _restored_rows(
    factors: GatedRepair | None, restored_T: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor | None:
    """Indices of the tokens that get the repair; None when nothing is to be added.

    A restored_T that lies on the host costs no device synchronisation here.
    """
    if factors is None or factors.is_empty:
        return None
    every = torch.ones(x.shape[0], dtype=torch.bool)
    rows = (every if restored_T is None else restored_T).nonzero(as_tuple=True)[0]
    return rows.to(x.device, non_blocking=True) if rows.numel() else None
