"""Which experts a layer's tokens go to, with what weight, and which pairs get a compensator.

Pure: tensors in, tensors out. Knows no bytes and no device.

Legend: T token rows, K top-k columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """One layer's routing, on CPU.

    Columns are in the order the router gave them, which is not that of the weights in every family.
    Rows where `active_T` is False are padding: they reach no expert.
    """

    topk_ids_TK: torch.Tensor  # [T, K] int64
    topk_weights_TK: torch.Tensor  # [T, K] float32
    restore_TK: torch.Tensor  # [T, K] bool
    active_T: torch.Tensor  # [T] bool

    def __post_init__(self) -> None:
        shape = self.topk_ids_TK.shape
        if len(shape) != 2 or self.topk_weights_TK.shape != shape or self.restore_TK.shape != shape:
            raise ValueError(
                f"routing: expected three tensors of one shape [T, K], got ids {tuple(shape)}, "
                f"weights {tuple(self.topk_weights_TK.shape)}, "
                f"restore {tuple(self.restore_TK.shape)}"
            )
        if self.active_T.shape != shape[:1]:
            raise ValueError(
                f"active_T: expected [{shape[0]}], one flag per token row, "
                f"got {tuple(self.active_T.shape)}"
            )


def route(
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    *,
    top_n: int,
    active_T: torch.Tensor | None = None,
) -> Routing:
    """The routing of a layer, with each token's Top-n pairs marked for restoring.

    Takes the router's output from any device. Raises ValueError when top_n is not 0 to K.
    """
    ids_TK = topk_ids_TK.to("cpu", torch.int64)
    weights_TK = topk_weights_TK.to("cpu", torch.float32)
    if active_T is None:
        active_T = torch.ones(ids_TK.shape[0], dtype=torch.bool)
    restore_TK = restore_mask(weights_TK, top_n)
    return Routing(ids_TK, weights_TK, restore_TK, active_T.to("cpu", torch.bool))


def restore_mask(topk_weights_TK: torch.Tensor, top_n: int) -> torch.Tensor:
    """[T, K] bool: the pairs among their token's `top_n` largest router weights.

    Sizes count, not signs: a large negative weight matters as much as a positive one. Of equal
    weights the earlier column goes first: phimoe often gives both its experts weight 1 exactly, and
    the first is the one its router scored higher.
    """
    num_columns = topk_weights_TK.shape[1]
    if not 0 <= top_n <= num_columns:
        raise ValueError(f"top_n: got {top_n}, expected 0 to the router's top-k of {num_columns}")
    by_size_TK = topk_weights_TK.abs().argsort(dim=1, descending=True, stable=True)
    mask_TK = torch.zeros_like(topk_weights_TK, dtype=torch.bool)
    return mask_TK.scatter_(1, by_size_TK[:, :top_n], True)
