"""Routers to start from: experts differ by domain before any training.

Per layer: ridge regression of the domain on the FFN inputs, balanced k-means of its scores, and a
ridge regression of the cluster on the inputs as the router.

Legend: T tokens, H hidden, E experts, D domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_WEIGHT = 0.72  # mean normalised router weight of a token's first expert, before training
_RIDGE = 0.02  # of the mean square of an input
_ROUNDS = 30


def first_router(inputs_TH: Tensor, domain_T: Tensor, num_experts: int, seed: int) -> Tensor:
    """Router weights [E, H] float32 for the FFN inputs of a sample in which domains are alike."""
    num_domains = int(domain_T.max()) + 1
    scores_TD = inputs_TH @ _ridge(inputs_TH, _one_hot(domain_T, num_domains))
    cluster_T = _balanced_clusters(scores_TD, num_experts, seed)
    router_HE = _ridge(inputs_TH, _one_hot(cluster_T, num_experts))
    return _scale(inputs_TH @ router_HE) * router_HE.T.contiguous()


def _one_hot(index_T: Tensor, size: int) -> Tensor:
    """Centred: a router has no bias, so its targets have no mean."""
    return torch.nn.functional.one_hot(index_T, size).float() - 1.0 / size


def _ridge(inputs_TH: Tensor, targets: Tensor) -> Tensor:
    gram = inputs_TH.T @ inputs_TH
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs_TH.T @ targets)


def _balanced_clusters(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """k-means [T] int64 whose clusters are pulled towards equal size by a bias on the distance."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < num_clusters:  # the farthest point of a few, against outliers
        few = points[torch.randint(len(points), (64,), generator=generator)]
        centres = torch.cat([centres, few[torch.cdist(few, centres).amin(1).argmax()][None]])
    bias = torch.zeros(num_clusters)
    nearest = torch.zeros(len(points), dtype=torch.long)
    step = 0.25 * float(points.var(0).sum())
    for _ in range(_ROUNDS):
        nearest = (torch.cdist(points, centres).square() + bias).argmin(1)
        share = torch.bincount(nearest, minlength=num_clusters) / len(points)
        bias = bias + step * (share - 1.0 / num_clusters)
        means = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=num_clusters).clamp_min(1)
        centres = means / counts[:, None]
    return nearest


def _scale(logits_TE: Tensor) -> float:
    """The factor that makes the first expert's mean weight FIRST_WEIGHT, by bisection."""
    top = logits_TE.topk(2, dim=-1).values
    margin = top[:, 0] - top[:, 1]
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        if float((margin * middle).sigmoid().mean()) < FIRST_WEIGHT:
            low = middle
        else:
            high = middle
    return (low + high) / 2
