"""In which order error feedback rounds the inputs of a matrix, and what each passes on to the rest.

Loud inputs come first: what they leave can still be made up for by those that follow. Knows
matrices only.

Legend: K cols, G groups of 64 cols, g the 64 cols of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from expert_store.matrix.grid import DAMPING
from expert_store.matrix.moments import Moment
from kernels.types import GROUP_SIZE


@dataclass(frozen=True, slots=True, eq=False)
class InputOrder:
    """The order of rounding, a whole group at a time, and the damped moment in that order.

    With R = M M^T, M upper triangular, an error of input j is best made up for by moving each
    later input i by -U[j, i] / U[j, j] of it, U = M^-1; what is heard of it then is M[j, j]^2.
    Everything below but the two permutations is in the order of rounding.
    """

    groups_G: torch.Tensor  # the groups as they come
    cols_K: torch.Tensor  # the inputs as they come
    moment: torch.Tensor  # [K, K] or [G, 64, 64]
    shares: torch.Tensor  # U[j, i] / U[j, j], of the same shape
    weight_Gg: torch.Tensor  # M[j, j]^2
    is_diagonal: bool  # nothing is passed on

    @classmethod
    def of(cls, moment: Moment) -> InputOrder:
        energy_Gg = moment.diagonal().view(-1, GROUP_SIZE)
        groups_G = energy_Gg.sum(dim=1).argsort(descending=True, stable=True)
        within_Gg = energy_Gg[groups_G].argsort(dim=1, descending=True, stable=True)
        cols_K = (groups_G[:, None] * GROUP_SIZE + within_Gg).view(-1)
        is_diagonal = int(moment.values.count_nonzero()) == int(energy_Gg.count_nonzero())
        damping = DAMPING * float(energy_Gg.mean()) or 1.0
        if moment.is_full:
            values = moment.values[cols_K][:, cols_K]
        else:
            values = moment.values[
                groups_G[:, None, None], within_Gg[:, :, None], within_Gg[:, None]
            ]
        values.diagonal(dim1=-2, dim2=-1).add_(damping)
        # Float64, since the loudest input may have a million times the energy of the quietest.
        root = torch.linalg.cholesky(values.double().flip(-1, -2)).flip(-1, -2)
        unit = torch.eye(values.shape[-1], dtype=torch.float64).expand_as(root)
        diagonal = root.diagonal(dim1=-2, dim2=-1)
        shares = torch.linalg.solve_triangular(root, unit, upper=True) * diagonal.unsqueeze(-1)
        weight_Gg = diagonal.square().view(-1, GROUP_SIZE).float()
        return cls(groups_G, cols_K, values, shares.float(), weight_Gg, is_diagonal)

    def inputs_back(self, values_KN: torch.Tensor) -> torch.Tensor:
        """[N, K], the inputs as they lie in the matrix."""
        placed = torch.empty_like(values_KN)
        placed[self.cols_K] = values_KN
        return placed.T.contiguous()

    def groups_back(self, values_GN: torch.Tensor) -> torch.Tensor:
        """[N, G], the groups as they lie in the matrix."""
        placed = torch.empty_like(values_GN)
        placed[self.groups_G] = values_GN
        return placed.T.contiguous()


def inputs_of(group: int) -> slice:
    """The inputs of one group."""
    return slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)


def independent(moment: Moment) -> Iterator[tuple[slice, Moment]]:
    """Groups whose inputs go together, and their full moment: all, or one after the other."""
    if moment.is_full:
        yield slice(0, moment.cols // GROUP_SIZE), moment
        return
    for group, block in enumerate(moment.values):
        yield slice(group, group + 1), Moment(block)
