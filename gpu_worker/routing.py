"""Which experts a layer's tokens go to, with what weight, and which pairs a policy leaves out.

Pure: tensors in, tensors out. Which pairs get a compensator is `gpu_worker/restoring.py`. Knows no
bytes and no device.

Legend: T token rows, K top-k columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """One layer's routing, on CPU.

    Columns are in the order the router gave them, which is not that of the weights in every family.
    Rows where `active_T` is False are padding: they reach no expert. Pairs in `skip_TK` are not run
    either; their token goes on with the others.
    """

    topk_ids_TK: torch.Tensor  # [T, K] int64
    topk_weights_TK: torch.Tensor  # [T, K] float32
    restore_TK: torch.Tensor  # [T, K] bool
    skip_TK: torch.Tensor  # [T, K] bool
    active_T: torch.Tensor  # [T] bool

    def __post_init__(self) -> None:
        shape = self.topk_ids_TK.shape
        others = (self.topk_weights_TK, self.restore_TK, self.skip_TK)
        if len(shape) != 2 or any(other.shape != shape for other in others):
            raise ValueError(
                f"routing: expected four tensors of one shape [T, K], got ids {tuple(shape)}, "
                f"weights {tuple(self.topk_weights_TK.shape)}, "
                f"restore {tuple(self.restore_TK.shape)}, skip {tuple(self.skip_TK.shape)}"
            )
        if self.active_T.shape != shape[:1]:
            raise ValueError(
                f"active_T: expected [{shape[0]}], one flag per token row, "
                f"got {tuple(self.active_T.shape)}"
            )

    @property
    def run_TK(self) -> torch.Tensor:
        """[T, K] bool: the pairs that are run."""
        return torch.from_numpy(self.active_T.numpy()[:, None] & ~self.skip_TK.numpy())

    @property
    def num_skipped(self) -> int:
        """Pairs of active rows that are not run."""
        return int((self.active_T.numpy()[:, None] & self.skip_TK.numpy()).sum())


def skip_mask(topk_weights_TK: torch.Tensor, below: float) -> torch.Tensor:
    """[T, K] bool: pairs with less than `below` of their token's router weight; 0 marks none.

    Sizes count, not signs. A token's first expert is never marked, however small its share. The
    other weights stay as they are: scaled up to the old sum they lost more on mixtral-mini's 2-bit
    experts (2026-11-22, 60 windows of six domains, nats over the original at thresholds of 0.1, 0.3
    and 0.5: 0.025, 0.038, 0.070 as they are, 0.027, 0.042, 0.076 scaled), and as much on bfloat16.
    """
    if below <= 0:
        return torch.zeros_like(topk_weights_TK, dtype=torch.bool)
    return (shares(topk_weights_TK) < below) & (ranks(topk_weights_TK) > 0)


def expert_scores(routing: Routing) -> dict[int, float]:
    """By expert, the shares of their tokens' router weight that its pairs have, added up; of pairs
    that are run."""
    run_TK = routing.run_TK
    experts_P = routing.topk_ids_TK[run_TK]
    sums_E = torch.bincount(experts_P, weights=shares(routing.topk_weights_TK)[run_TK])
    return {expert: float(sums_E[expert]) for expert in experts_P.unique().tolist()}


def ranks(topk_weights_TK: torch.Tensor) -> torch.Tensor:
    """[T, K] int64: 0 for a token's largest router weight, 1 for the next, and so on.

    Sizes count, not signs: a large negative weight matters as much as a positive one. Of equal
    weights the earlier column goes first: phimoe often gives both its experts weight 1 exactly, and
    the first is the one its router scored higher.
    """
    # In numpy: on a decode step's few tokens its calls cost a fraction of torch's.
    sizes_TK = np.abs(topk_weights_TK.cpu().numpy())
    by_size_TK = (-sizes_TK).argsort(axis=1, kind="stable")
    return torch.from_numpy(by_size_TK.argsort(axis=1))


def shares(topk_weights_TK: torch.Tensor) -> torch.Tensor:
    """[T, K] float64: each pair's part of the sum of its token's weights; 0 where all are 0.

    Sizes count, not signs.
    """
    sizes_TK = topk_weights_TK.double().abs()
    sums_T1 = sizes_TK.sum(dim=1, keepdim=True)
    return sizes_TK / sums_T1.where(sums_T1 > 0, 1.0)
