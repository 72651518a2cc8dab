"""How likely given continuations of given contexts are: what multiple-choice tests ask for.

Knows token ids only. Sequences of different lengths go through the model side by side, padded on
the right, where no expert runs.

Legend: B sequences, T tokens of the longest of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_worker.model import ModelRunner
from gpu_worker.slot_cache import AttentionMasks, SlotCache

PASS_TOKENS = 1024
"""Padded tokens of one pass at most, or one longer sequence: bounds the logits' memory."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids: what is given, and what is scored. Raises ValueError when either is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("context", "continuation"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got no token, expected at least one")

    def cut(self, max_tokens: int) -> Continuation:
        """The same with its last `max_tokens` inputs; the continuation is never cut.

        Raises ValueError when it does not fit.
        """
        num_inputs = len(self.context) + len(self.continuation) - 1
        if len(self.continuation) > max_tokens:
            raise ValueError(
                f"continuation: {len(self.continuation)} tokens are more than the context of "
                f"{max_tokens}"
            )
        return Continuation(self.context[max(0, num_inputs - max_tokens) :], self.continuation)

    @property
    def inputs(self) -> tuple[int, ...]:
        """What goes through the model: all but the last token."""
        return (*self.context, *self.continuation[:-1])


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Nats of the whole continuation, negative, and whether greedy decoding would have made it."""

    log_prob: float
    is_greedy: bool


def score_continuations(
    runner: ModelRunner, asked: Sequence[Continuation], *, pass_tokens: int = PASS_TOKENS
) -> list[Likelihood]:
    """One Likelihood for each, in their order; the longest run first."""
    order = sorted(range(len(asked)), key=lambda index: -len(asked[index].inputs))
    found: dict[int, Likelihood] = {}
    while order:
        longest = len(asked[order[0]].inputs)
        size = max(1, pass_tokens // longest)
        now, order = order[:size], order[size:]
        found.update(zip(now, _scored(runner, [asked[i] for i in now]), strict=True))
    return [found[index] for index in range(len(asked))]


def _scored(runner: ModelRunner, asked: Sequence[Continuation]) -> list[Likelihood]:
    device, longest = runner.model.device, len(asked[0].inputs)
    rows = [[*each.inputs] + [0] * (longest - len(each.inputs)) for each in asked]
    valid_BT = torch.tensor([[t < len(each.inputs) for t in range(longest)] for each in asked])
    positions_BT = torch.arange(longest, device=device).expand(len(asked), -1)
    cache = SlotCache(len(asked), longest)
    cache.begin(list(range(len(asked))), positions_BT)
    mask = AttentionMasks(runner.model.config).make(positions_BT, runner.model.dtype)
    logits_BTV = runner.forward(
        torch.tensor(rows, device=device), positions_BT, cache, mask, valid_BT=valid_BT.to(device)
    ).logits
    return [
        _likelihood(logits_TV[len(each.context) - 1 : len(each.inputs)], each.continuation)
        for logits_TV, each in zip(logits_BTV, asked, strict=True)
    ]


def _likelihood(logits_TV: torch.Tensor, continuation: tuple[int, ...]) -> Likelihood:
    """Of the logits at the last token of the context and at all but the last one scored."""
    log_probs_TV = logits_TV.float().log_softmax(dim=1)
    targets_T = torch.tensor(continuation, device=logits_TV.device)
    log_prob = float(log_probs_TV.gather(1, targets_T[:, None]).sum())
    return Likelihood(log_prob, bool((log_probs_TV.argmax(dim=1) == targets_T).all()))
