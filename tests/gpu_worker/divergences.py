"""What noise in one layer's output costs, by running a model beside itself, perturbed.

The oracle for the nats that a calibration takes from gradients.

Legend: W windows, T tokens of each, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import kl_div

from gpu_worker.injection import InjectingExperts, Injection, Perturbed
from gpu_worker.model import ModelRunner, bind_experts


def divergence(runner: ModelRunner, windows_WT: torch.Tensor, injection: Injection) -> float:
    """Mean KL(unperturbed || perturbed) in nats per token; the runner has its own experts again."""
    injecting = InjectingExperts(runner.experts, seed=0)
    own = ModelRunner(runner.model, injecting)
    positions_2T = torch.arange(windows_WT.shape[1]).expand(2, -1)
    total = 0.0
    bind_experts(runner.model, injecting)
    try:
        for window, ids_T in enumerate(windows_WT):
            injecting.plan([Perturbed(None, window), Perturbed(injection, window)])
            logits_2TV = own.forward(ids_T.expand(2, -1), positions_2T, None, None).logits
            base_TV, other_TV = logits_2TV.float().log_softmax(dim=2)
            total += float(kl_div(other_TV, base_TV, log_target=True, reduction="sum"))
    finally:
        bind_experts(runner.model, runner.experts)
    return total / windows_WT.numel()
