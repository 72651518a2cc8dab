"""Which pairs get their compensator: five rules of the router's weights, and what they are told.

Pure: tensors in, tensors out. Which pairs are run at all is `gpu_worker/routing.py`.

Legend: T token rows, K top-k columns, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from expert_store.format import blocks_within
from expert_store.types import ExpertKey, Manifest
from gpu_worker.routing import Routing, ranks, shares, skip_mask

Restore = Literal["top_n", "all", "random", "mass", "benefit"]
"""Which of a token's pairs get their compensator.

- top_n: the `top_n` of largest router weight; all: every one.
- random: `top_n` of them, by a hash of seed, layer, token and expert: the control of top_n.
- mass: by falling weight, until they hold `restore_mass` of the token's router weight.
- benefit: those whose share of the token's router weight times what the compensator repairs of
  their expert (relative error) is over `restore_benefit`.
"""


@dataclass(frozen=True, slots=True)
class PairPolicy:
    """What happens to a token's pairs: restored or low-bit, and which are not run at all.

    Fields are those of `WorkerConfig`, checked there. `repaired` is what "benefit" compares: per
    layer the relative error that each expert's compensator takes away, [E] float64.
    """

    restore: Restore = "top_n"
    top_n: int = 0
    restore_mass: float = 0.0
    restore_benefit: float = 0.0
    restore_seed: int = 0
    skip_below: float = 0.0
    repaired: Mapping[int, torch.Tensor] = field(default_factory=dict)


def route(
    layer: int,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    *,
    policy: PairPolicy,
    active_T: torch.Tensor | None = None,
    token_tags_T: torch.Tensor | None = None,
) -> Routing:
    """The routing of a layer, with the pairs marked that are restored and that are skipped.

    Takes the router's output from any device. `token_tags_T` (int64) tells tokens apart for
    "random", whatever batch they are in; without it, tokens with the same experts are the same.
    Raises ValueError when top_n is not 0 to K.
    """
    ids_TK = topk_ids_TK.detach().to("cpu", torch.int64)
    weights_TK = topk_weights_TK.detach().to("cpu", torch.float32)
    if active_T is None:
        active_T = torch.ones(ids_TK.shape[0], dtype=torch.bool)
    skip_TK = skip_mask(weights_TK, policy.skip_below)
    restore_TK = _restore(layer, ids_TK, weights_TK, policy, token_tags_T)
    if policy.skip_below > 0:
        restore_TK = restore_TK & ~skip_TK
    return Routing(ids_TK, weights_TK, restore_TK, skip_TK, active_T.to("cpu", torch.bool))


def _restore(
    layer: int,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    policy: PairPolicy,
    token_tags_T: torch.Tensor | None,
) -> torch.Tensor:
    if policy.restore == "all":
        return torch.ones_like(ids_TK, dtype=torch.bool)
    if policy.restore == "mass":
        return mass_mask(weights_TK, policy.restore_mass)
    if policy.restore == "benefit":
        return shares(weights_TK) * policy.repaired[layer][ids_TK] > policy.restore_benefit
    if policy.restore == "random":
        return random_mask(
            ids_TK, policy.top_n, layer=layer, seed=policy.restore_seed, token_tags_T=token_tags_T
        )
    return restore_mask(weights_TK, policy.top_n)


def restore_mask(topk_weights_TK: torch.Tensor, top_n: int) -> torch.Tensor:
    """[T, K] bool: the pairs among their token's `top_n` largest router weights.

    Raises ValueError when top_n is not 0 to K.
    """
    _check_top_n(top_n, topk_weights_TK.shape[1])
    return ranks(topk_weights_TK) < top_n


def mass_mask(topk_weights_TK: torch.Tensor, mass: float) -> torch.Tensor:
    """[T, K] bool: by falling router weight, the fewest pairs that hold `mass` of a token's weight.

    0 marks none, 1 all whose weight is not 0.
    """
    order_TK = ranks(topk_weights_TK).argsort(dim=1)
    sorted_TK = shares(topk_weights_TK).gather(1, order_TK)
    before_TK = sorted_TK.cumsum(dim=1).roll(1, dims=1)
    before_TK[:, 0] = 0
    needed_TK = sorted_TK > 0
    # At a mass of 1 a small last pair counts too, although those before it may round to 1.
    needed_TK &= (before_TK < mass) | (mass >= 1)
    return torch.zeros_like(needed_TK).scatter_(1, order_TK, needed_TK)


def random_mask(
    topk_ids_TK: torch.Tensor,
    top_n: int,
    *,
    layer: int,
    seed: int,
    token_tags_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, K] bool: `top_n` pairs of each token, drawn by a hash of seed, layer, token and expert.

    The same for a token in any batch and any order of its columns. Raises ValueError when top_n is
    not 0 to K.
    """
    num_rows, num_columns = topk_ids_TK.shape
    _check_top_n(top_n, num_columns)
    tags_T = torch.zeros(num_rows, dtype=torch.int64) if token_tags_T is None else token_tags_T
    tags_T1 = tags_T.to("cpu", torch.int64).numpy().astype(np.uint64)[:, None]
    start_T1 = _mixed(np.uint64(seed & _WORD) + _mixed(np.uint64(layer) + _mixed(tags_T1)))
    drawn_TK = _mixed(start_T1 + topk_ids_TK.numpy().astype(np.uint64))
    order_TK = torch.from_numpy(drawn_TK.argsort(axis=1, kind="stable"))
    return order_TK.argsort(dim=1) < top_n


def fetched_blocks(manifest: Manifest, key: ExpertKey, factor_share: float) -> int:
    """How many blocks of an expert's compensator are fetched: the longest prefix that has
    `factor_share` (0 to 1) of its bytes or less."""
    info = manifest.experts[key]
    if info.factors is None or factor_share >= 1:
        return len(info.repair.blocks)
    max_bytes = factor_share * info.factors.num_bytes
    return blocks_within(manifest.model.expert, info.repair, max_bytes)


def repaired_errors(manifest: Manifest, factor_share: float = 1.0) -> dict[int, torch.Tensor]:
    """Per layer [E] float64: the relative error that what is fetched of a compensator takes away.

    sqrt(error^2 - restored error^2), since what low rank and planes remove is orthogonal to what
    stays; 0 for an expert without factors.
    """
    found = {
        layer: torch.zeros(count, dtype=torch.float64)
        for layer, count in manifest.model.num_experts.items()
    }
    for key, info in manifest.experts.items():
        if info.factors is not None:
            num_blocks = fetched_blocks(manifest, key, factor_share)
            is_whole = num_blocks == len(info.repair.blocks)
            restored = info.restored_error if is_whole else info.prefix_error(num_blocks)
            energy = info.error**2 - restored**2
            found[key.layer][key.expert] = math.sqrt(max(0.0, energy))
    return found


_WORD = (1 << 64) - 1


def _mixed(words: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014), on uint64: every bit moves all."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _check_top_n(top_n: int, num_columns: int) -> None:
    if not 0 <= top_n <= num_columns:
        raise ValueError(f"top_n: got {top_n}, expected 0 to the router's top-k of {num_columns}")
