"""The same noise in every window of a scoring pass, each window with a draw of its own.

Knows no loss and no cell.
"""

from __future__ import annotations

import torch

from gpu_worker.injection import InjectingExperts, Injection, Perturbed
from gpu_worker.model import StepExperts, StepReport


class NoisyWindows:
    """`StepExperts` that injects into windows which are run one at a time, in order.

    The draw of a window is its number, so that injections are compared on the same draws.
    """

    def __init__(self, inner: StepExperts, injection: Injection, seed: int = 0) -> None:
        self._experts = InjectingExperts(inner, seed=seed)
        self._injection = injection
        self._window = 0

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: torch.Tensor | None = None) -> None:
        self._experts.plan([Perturbed(self._injection, self._window)])
        self._window += 1
        self._experts.begin(valid_S, token_tags_S)

    def run_layer(
        self,
        layer: int,
        hidden_SH: torch.Tensor,
        topk_ids_SK: torch.Tensor,
        topk_weights_SK: torch.Tensor,
    ) -> torch.Tensor:
        return self._experts.run_layer(layer, hidden_SH, topk_ids_SK, topk_weights_SK)

    def end(self) -> StepReport:
        return self._experts.end()
