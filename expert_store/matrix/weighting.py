"""How loudly each error of a weight is heard: moment and row weights, with their square roots.

tr(S E R E^T) with S diagonal over rows and R the inputs' second moment is the squared Frobenius
norm of S^(1/2) E C, where R = C C^T. Knows matrices only.

Legend: N rows (outputs), K cols (inputs), G groups of 64 inputs, g the 64 inputs of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expert_store.matrix.loss import weighted_error
from expert_store.matrix.moments import Moment
from kernels.types import GROUP_SIZE

# Added to the diagonal so that the root of a moment of few tokens exists, in shares of its mean;
# ten times more until it does. Too small to change which errors count.
_FIRST_JITTER = 1e-6
_MAX_TRIES = 6


@dataclass(frozen=True, slots=True, eq=False)
class Weighting:
    """Moment and row weights of one matrix, and the moment's Cholesky root.

    `of` makes one. Without a moment every input counts 1, without row weights every row does.
    """

    moment: Moment | None
    row_weight_N: torch.Tensor | None  # [N] float32, >= 0
    root: torch.Tensor | None  # [K, K] or [G, 64, 64] float32, lower triangular

    @staticmethod
    def of(moment: Moment | None = None, row_weight_N: torch.Tensor | None = None) -> Weighting:
        """An all-zero moment or all-zero row weights say nothing, and count as none.

        Raises ValueError when a row weight is negative or not finite.
        """
        if row_weight_N is not None:
            if not bool((row_weight_N >= 0).all() and row_weight_N.isfinite().all()):
                raise ValueError("row_weight: expected finite values of at least 0")
            row_weight_N = row_weight_N.float() if bool((row_weight_N > 0).any()) else None
        if moment is not None and not bool((moment.diagonal() > 0).any()):
            moment = None
        return Weighting(moment, row_weight_N, None if moment is None else _root(moment.values))

    def error(self, residual_NK: torch.Tensor) -> float:
        """tr(S E R E^T)."""
        return weighted_error(residual_NK, self.moment, self.row_weight_N)

    def times_moment(self, values_NK: torch.Tensor) -> torch.Tensor:
        """values @ R, [N, K]."""
        return _times(values_NK, None if self.moment is None else self.moment.values)

    def times_root(self, values_NK: torch.Tensor) -> torch.Tensor:
        """values @ C, [N, K]."""
        return _times(values_NK, self.root)

    def scale_rows(self, values_NK: torch.Tensor) -> torch.Tensor:
        """S^(1/2) @ values, [N, K]."""
        if self.row_weight_N is None:
            return values_NK
        return values_NK * self.row_weight_N.sqrt()[:, None]


def _times(values_NK: torch.Tensor, by: torch.Tensor | None) -> torch.Tensor:
    if by is None:
        return values_NK
    if by.dim() == 2:
        return values_NK @ by
    values_GNg = values_NK.reshape(len(values_NK), -1, GROUP_SIZE).transpose(0, 1)
    return torch.bmm(values_GNg, by).transpose(0, 1).reshape(values_NK.shape)


def _root(values: torch.Tensor) -> torch.Tensor:
    """Lower triangular C with C C^T = R, [K, K] or [G, 64, 64]."""
    mean = float(values.diagonal(dim1=-2, dim2=-1).mean())
    eye = torch.eye(values.shape[-1])
    jitter = _FIRST_JITTER * mean
    for _ in range(_MAX_TRIES):
        root, failed = torch.linalg.cholesky_ex(values + jitter * eye)
        if not bool(failed.any()):
            return root
        jitter *= 10
    raise ValueError(
        f"moment: not positive semi-definite even with {jitter / 10:.1e} added to its diagonal "
        f"(mean {mean:.1e}); it is no mean of products x x^T"
    )
