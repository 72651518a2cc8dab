"""What noise in the experts' output costs: KL divergence of the next-token distribution.

Runs a model beside itself, perturbed. Knows no text and no file.

Legend: W windows, B sequences, T tokens of each, V vocabulary, I injections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from expert_store.families import experts_modules
from gpu_worker.injection import InjectingExperts, Injection, Perturbed
from gpu_worker.model import ModelRunner, bind_experts

LOGITS_BYTES = 512 << 20
"""Float32 logits of one pass: as many sequences side by side as fit, at least two."""

TokensDone = Callable[[int], None]


def divergences(
    runner: ModelRunner,
    windows_WT: torch.Tensor,
    injections: Sequence[Injection],
    *,
    seed: int = 0,
    progress: TokensDone = lambda num_tokens: None,
) -> torch.Tensor:
    """[I, W] mean KL(unperturbed || perturbed) in nats per token, of each injection and window.

    Noise depends on seed and window only, so injections are compared on the same draws. The
    runner's experts are bound again afterwards. `progress` is told tokens times injections.
    Raises ValueError for an injection into a layer that has no experts.
    """
    if windows_WT.dim() != 2 or not windows_WT.numel():
        raise ValueError(f"windows: got shape {tuple(windows_WT.shape)}, expected [W, T]")
    model = runner.model
    injecting = InjectingExperts(runner.experts, seed=seed)
    _check_targets(injections, set(experts_modules(model)))
    num_tokens = windows_WT.shape[1]
    per_sequence = 4 * num_tokens * model.config.vocab_size
    at_once = max(2, LOGITS_BYTES // per_sequence) - 1
    nats_IW = torch.zeros(len(injections), windows_WT.shape[0])
    own = ModelRunner(model, injecting)
    bind_experts(model, injecting)
    try:
        for window, ids_T in enumerate(windows_WT.to(model.device)):
            for start in range(0, len(injections), at_once):
                some = injections[start : start + at_once]
                injecting.plan([Perturbed(one, window) for one in (None, *some)])
                ids_BT = ids_T.expand(1 + len(some), -1)
                positions_BT = torch.arange(num_tokens, device=ids_T.device).expand_as(ids_BT)
                base_TV, *others = own.forward(ids_BT, positions_BT, None, None).logits
                for index, other_TV in enumerate(others, start):
                    nats_IW[index, window] = float(divergence(base_TV, other_TV).mean())
                progress(num_tokens * len(some))
    finally:
        bind_experts(model, runner.experts)
    return nats_IW


def divergence(base_TV: torch.Tensor, other_TV: torch.Tensor) -> torch.Tensor:
    """[T] KL(base || other) of two rows of logits each, in nats, float32; never negative."""
    base_TV = base_TV.float().log_softmax(dim=1)
    other_TV = other_TV.float().log_softmax(dim=1)
    return (base_TV.exp() * (base_TV - other_TV)).sum(dim=1).clamp(min=0)


def _check_targets(injections: Sequence[Injection], layers: set[int]) -> None:
    for injection in injections:
        if unknown := sorted(set(injection.targets) - layers):
            raise ValueError(
                f"injection: layer {unknown[0]} has no routed experts, expected some of "
                f"{sorted(layers)}"
            )
