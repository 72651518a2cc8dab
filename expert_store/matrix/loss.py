"""How much an error of a weight is heard: its energy under the second moment of the inputs.

Knows matrices only.

Legend: N rows (outputs), K cols (inputs), G groups of 64 inputs, g the 64 inputs of one group.
"""

from __future__ import annotations

import torch

from expert_store.matrix.moments import Moment
from kernels.types import GROUP_SIZE

_CHUNK_WEIGHTS = 1 << 22


def row_errors(residual_NK: torch.Tensor, moment: Moment | None = None) -> torch.Tensor:
    """[N] float64, E_n R E_n^T: the mean squared error of every output.

    Without a moment R is the identity. Products in float32, sums in float64. Raises ValueError when
    the widths differ.
    """
    rows, cols = residual_NK.shape
    if moment is not None and moment.cols != cols:
        raise ValueError(f"moment: expected {cols} inputs as the residual has, got {moment.cols}")
    step = max(1, _CHUNK_WEIGHTS // cols)
    parts = []
    for start in range(0, rows, step):
        error_NK = residual_NK[start : start + step].float()
        error_N = (error_NK * _times(error_NK, moment)).sum(dim=1, dtype=torch.float64)
        parts.append(error_N.clamp_min_(0))
    return torch.cat(parts)


def weighted_error(
    residual_NK: torch.Tensor,
    moment: Moment | None = None,
    row_weight_N: torch.Tensor | None = None,
) -> float:
    """sum_n s_n E_n R E_n^T: the outputs' mean squared error; without weights all rows count 1.

    Without a moment this is the sum of squares. Raises ValueError when the shapes do not fit.
    """
    error_N = row_errors(residual_NK, moment)
    if row_weight_N is None:
        return float(error_N.sum())
    if row_weight_N.shape != error_N.shape:
        raise ValueError(f"row_weight: expected [{len(error_N)}], got {tuple(row_weight_N.shape)}")
    return float((error_N * row_weight_N).sum())


def relative_error(
    weight_NK: torch.Tensor,
    approximation_NK: torch.Tensor,
    moment: Moment | None = None,
    row_weight_N: torch.Tensor | None = None,
) -> float:
    """D: an approximation's weighted error over the weight's own energy; 0 where both are 0."""
    lost = weighted_error(weight_NK - approximation_NK, moment, row_weight_N)
    energy = weighted_error(weight_NK, moment, row_weight_N)
    return lost / energy if energy else float(lost > 0)


def _times(error_NK: torch.Tensor, moment: Moment | None) -> torch.Tensor:
    """E R, [N, K]."""
    if moment is None:
        return error_NK
    if moment.is_full:
        return error_NK @ moment.values
    error_GNg = error_NK.reshape(len(error_NK), -1, GROUP_SIZE).transpose(0, 1)
    return torch.bmm(error_GNg, moment.values).transpose(0, 1).reshape(error_NK.shape)
