"""The second moment of a matrix's inputs: which errors of a weight are heard, and how loudly.

Sums it up over batches, shrinks the moment of a rarely used expert toward a pooled one, and packs
it for a file. Knows no expert, no model, no file.

Legend: T tokens, K inputs (cols), G groups of 64 inputs, g the 64 inputs of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.types import GROUP_SIZE

FULL_INPUTS = 2048
"""Up to here a moment keeps all pairs of inputs (16 MiB of float32), above only those of a group
(K * 64 * 4 bytes: 3.5 MiB for 14336 inputs, where all pairs would take 784 MiB)."""


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """R = E[x x^T] of a matrix's inputs x, symmetric and positive semi-definite.

    Full, or only its diagonal blocks of 64 x 64 (inputs of different groups then count as
    uncorrelated). All zero: no token was seen. Raises ValueError on a wrong shape or type.
    """

    values: torch.Tensor  # [K, K] or [G, 64, 64] float32

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        is_full = len(shape) == 2 and shape[0] == shape[1] > 0 and shape[0] % GROUP_SIZE == 0
        is_block = len(shape) == 3 and shape[0] > 0 and shape[1:] == (GROUP_SIZE, GROUP_SIZE)
        if not (is_full or is_block) or self.values.dtype != torch.float32:
            raise ValueError(
                f"moment: expected float32 [K, K] with K a multiple of {GROUP_SIZE}, or "
                f"[G, {GROUP_SIZE}, {GROUP_SIZE}], got {self.values.dtype} of shape {shape}"
            )

    @property
    def is_full(self) -> bool:
        return self.values.dim() == 2

    @property
    def cols(self) -> int:
        """K, the number of inputs."""
        return self.values.shape[0] * (1 if self.is_full else GROUP_SIZE)

    @classmethod
    def identity(cls, cols: int) -> Moment:
        """Inputs of unit energy and no correlation: what to use without calibration."""
        if cols <= FULL_INPUTS:
            return cls(torch.eye(cols))
        return cls(torch.eye(GROUP_SIZE).repeat(cols // GROUP_SIZE, 1, 1))

    def diagonal(self) -> torch.Tensor:
        """[K] float32: the mean square of each input."""
        return self.values.diagonal(dim1=-2, dim2=-1).reshape(-1)

    def block_diagonal(self) -> torch.Tensor:
        """[G, 64, 64] float32: the pairs within each group of 64 inputs."""
        if not self.is_full:
            return self.values
        groups = self.cols // GROUP_SIZE
        by_group = self.values.view(groups, GROUP_SIZE, groups, GROUP_SIZE)
        return by_group.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def blocks_only(self) -> Moment:
        """This moment without the pairs of inputs from different groups."""
        return Moment(self.block_diagonal())

    def diagonal_only(self) -> Moment:
        """The same without products of different inputs."""
        return Moment(torch.diag_embed(self.diagonal().view(-1, GROUP_SIZE)))

    def shrunk(self, pooled: Moment, count: float) -> Moment:
        """This mean over `count` tokens, with `pooled` counting as K tokens more.

        That is the posterior mean under the weakest proper conjugate prior (inverse Wishart) with
        its mean at `pooled`: it takes about K degrees of freedom. On SmolLM2's inputs, with one
        domain of text as the expert, K and 2 K gave the least error on held-out text at 64, 256 and
        1022 tokens, full and in blocks; Ledoit and Wolf's weight, which minimises the distance of
        the moments, follows the few loudest directions and came out up to a fifth worse
        (benchmarks/results/quantizers.md). No token gives `pooled` itself. Raises ValueError when
        the shapes differ or count is negative.
        """
        if pooled.values.shape != self.values.shape:
            raise ValueError(
                f"pooled: expected the shape {tuple(self.values.shape)} of the moment to shrink, "
                f"got {tuple(pooled.values.shape)}"
            )
        if not count >= 0:
            raise ValueError(f"count: expected a number of tokens, got {count}")
        return Moment(torch.lerp(self.values, pooled.values, self.cols / (self.cols + count)))

    def shrunk_to_diagonal(self, count: float) -> Moment:
        """This mean over `count` tokens, with its own diagonal counting as K tokens more.

        For a pool, which has nothing wider to lean on: products of different inputs are where a
        short text misleads. The same rule as `shrunk`, and the same evidence: within 1 % of the
        best share at 500 and 6100 tokens, for 576 and 1536 inputs.
        """
        return self.shrunk(Moment(torch.diag_embed(self.values.diagonal(dim1=-2, dim2=-1))), count)

    def packed(self) -> torch.Tensor:
        """[n] float32: one triangle row by row, block after block; half the bytes, for a file."""
        row, col = torch.tril_indices(self.values.shape[-1], self.values.shape[-1])
        return self.values[..., row, col].reshape(-1)

    @classmethod
    def from_packed(cls, packed: torch.Tensor, cols: int) -> Moment:
        """The moment of `cols` inputs that `packed()` made. Raises ValueError on a wrong length."""
        groups = cols // GROUP_SIZE
        for shape in ((cols, cols), (groups, GROUP_SIZE, GROUP_SIZE)):
            triangle = shape[-1] * (shape[-1] + 1) // 2
            if packed.shape != (triangle * (1 if len(shape) == 2 else groups),):
                continue
            row, col = torch.tril_indices(shape[-1], shape[-1])
            values = torch.empty(shape)
            values[..., row, col] = packed.view(*shape[:-2], triangle)
            values[..., col, row] = packed.view(*shape[:-2], triangle)
            return cls(values)
        raise ValueError(f"packed moment: {tuple(packed.shape)} values do not fit {cols} inputs")


class MomentSum:
    """Sums x x^T over batches of inputs; sums of several experts add up to their pool."""

    def __init__(self, cols: int) -> None:
        if cols <= 0 or cols % GROUP_SIZE:
            raise ValueError(f"cols: expected a positive multiple of {GROUP_SIZE}, got {cols}")
        self.cols = cols
        self.count = 0
        groups = cols // GROUP_SIZE
        shape = (cols, cols) if cols <= FULL_INPUTS else (groups, GROUP_SIZE, GROUP_SIZE)
        self._sum = torch.zeros(shape)

    def add(self, x_TK: torch.Tensor) -> None:
        """Count T more tokens. Raises ValueError when the width differs or a value is not finite.

        To weight tokens, scale the rows of x by the square root of the weights.
        """
        if x_TK.dim() != 2 or x_TK.shape[1] != self.cols:
            raise ValueError(f"inputs: expected [tokens, {self.cols}], got {tuple(x_TK.shape)}")
        if not x_TK.isfinite().all():
            raise ValueError(f"inputs: expected finite values, got NaN or Inf in {len(x_TK)} rows")
        x = x_TK.float()
        if self._sum.dim() == 2:
            self._sum.addmm_(x.T, x)
        else:
            x_GTg = x.view(len(x), -1, GROUP_SIZE).transpose(0, 1)
            self._sum.baddbmm_(x_GTg.transpose(1, 2), x_GTg)
        self.count += len(x)

    def merge(self, other: MomentSum) -> None:
        """Count the tokens of another sum of the same width too."""
        if other.cols != self.cols:
            raise ValueError(f"other: expected a sum over {self.cols} inputs, got {other.cols}")
        self._sum = self._sum + other._sum  # either may come from inference mode
        self.count += other.count

    def moment(self) -> Moment:
        """The mean so far; all zero when no token came."""
        return Moment(self._sum / max(1, self.count))
