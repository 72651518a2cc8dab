"""Where the tokens of simulated steps go: drawn from a skewed popularity, or as they once went.

Legend: T tokens of a step, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from gpu_worker.routing import Routing


class RoutingSource(Protocol):
    """One worker's steps."""

    def num_tokens(self, step: int) -> int:
        """T of a step."""
        ...

    def layer(self, step: int, layer: int) -> Routing:
        """Asked for once for each step and layer, in the order of the run."""
        ...

    def popular(self, layer: int) -> Sequence[int]:
        """The experts of a layer, the most used first: what a warm cache is likely to hold."""
        ...


class DrawnRouting:
    """Tokens that choose K different experts each, independently, by a Zipf popularity.

    `seed` and `worker` give the draws; which expert is popular is the same for all workers.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        top_n: int,
        skew: float,
        seed: int,
        worker: int,
        tokens_per_step: Sequence[int],
    ) -> None:
        self._logits_E = -skew * np.log(np.arange(1, num_experts + 1))
        self._top_k, self._top_n = top_k, top_n
        self._seed = seed
        self._tokens_per_step = tokens_per_step
        self._random = np.random.default_rng((seed, worker))

    def num_tokens(self, step: int) -> int:
        return self._tokens_per_step[min(step, len(self._tokens_per_step) - 1)]

    def layer(self, step: int, layer: int) -> Routing:
        num_tokens, num_experts = self.num_tokens(step), len(self._logits_E)
        # The K largest of logits with Gumbel noise are K draws without replacement, in order.
        noisy_TE = self._logits_E + self._random.gumbel(size=(num_tokens, num_experts))
        ranks_TK = np.argsort(-noisy_TE, axis=1)[:, : self._top_k]
        order_E = self._order(layer)
        return routing_of(torch.from_numpy(order_E[ranks_TK]), self._top_n)

    def popular(self, layer: int) -> Sequence[int]:
        return [int(expert) for expert in self._order(layer)]

    def _order(self, layer: int) -> np.ndarray:
        return np.random.default_rng((self._seed, layer)).permutation(len(self._logits_E))


class ReplayedRouting:
    """Steps as they were recorded: of each the routings by layer."""

    def __init__(self, steps: Sequence[Mapping[int, Routing]]) -> None:
        self._steps = steps

    def num_tokens(self, step: int) -> int:
        return next(iter(self._steps[step].values())).topk_ids_TK.shape[0]

    def layer(self, step: int, layer: int) -> Routing:
        return self._steps[step][layer]

    def popular(self, layer: int) -> Sequence[int]:
        """None: what was recorded began with an empty cache."""
        return ()


def routing_of(topk_ids_TK: torch.Tensor, top_n: int) -> Routing:
    """A routing whose columns are in falling order of weight: the first `top_n` are restored."""
    num_tokens, top_k = topk_ids_TK.shape
    return Routing(
        topk_ids_TK=topk_ids_TK,
        topk_weights_TK=torch.full((num_tokens, top_k), 1.0 / top_k),
        restore_TK=(torch.arange(top_k) < top_n).expand(num_tokens, top_k),
        skip_TK=torch.zeros(num_tokens, top_k, dtype=torch.bool),
        active_T=torch.ones(num_tokens, dtype=torch.bool),
    )
