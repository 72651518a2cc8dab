"""How well a model predicts given tokens, and what that moved: by windows, or token by token.

Both go through the runner and the slot cache that serve requests. Bytes are the transport's
counters. Knows no text and no file.

Legend: W windows, B windows at once, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from gpu_worker.counters import StepCounters
from gpu_worker.model import ModelRunner
from gpu_worker.slot_cache import AttentionMasks, SlotCache


class WindowObserver(Protocol):
    """Sees what the model says of each window while it is scored."""

    def see(self, window: int, log_probs_TV: torch.Tensor) -> None:
        """Float32 log-probabilities [T, V] of the next token after each of a window's tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss of each window, and the counters of the steps that were counted."""

    window_nats: tuple[float, ...]  # nats per predicted token
    counters: StepCounters
    num_tokens: int  # tokens that went through the model while counting

    @property
    def nats(self) -> float:
        """Nats per token over all windows."""
        return statistics.fmean(self.window_nats)

    @property
    def standard_error(self) -> float:
        """Of `nats`, from the spread over windows; NaN for a single one."""
        if len(self.window_nats) < 2:
            return math.nan
        return statistics.stdev(self.window_nats) / math.sqrt(len(self.window_nats))

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def moved_bytes_per_token(self) -> float:
        """Expert bytes that the transport delivered."""
        return self.counters.total_moved_bytes / self.num_tokens

    @property
    def near_data_bytes_per_token(self) -> float:
        """Activation bytes that went to and came from near data."""
        return (self.counters.sent_bytes + self.counters.received_bytes) / self.num_tokens


def cut_windows(
    token_ids: list[int], *, num_windows: int, window_tokens: int, seed: int | None = None
) -> torch.Tensor:
    """[W, window_tokens + 1] windows, one from each of W equal parts of the text.

    Each predicts window_tokens tokens. They start where their part does or, with a seed, at a
    random place in it. Raises ValueError when the text is too short for windows without overlap.
    """
    width = window_tokens + 1
    if num_windows < 1 or window_tokens < 1:
        raise ValueError(
            f"windows: got {num_windows} of {window_tokens} tokens, expected at least 1 of 1"
        )
    part = len(token_ids) // num_windows
    if part < width:
        raise ValueError(
            f"text: {len(token_ids)} tokens are too few for {num_windows} windows of {width}; "
            f"ask for at most {len(token_ids) // width} windows, or give more text"
        )
    shift = random.Random(seed)
    starts = [
        i * part + (0 if seed is None else shift.randint(0, part - width))
        for i in range(num_windows)
    ]
    return torch.tensor([token_ids[start : start + width] for start in starts])


def score_windows(
    runner: ModelRunner,
    windows_WT: torch.Tensor,
    *,
    batch: int = 4,
    observers: Sequence[WindowObserver] = (),
) -> Score:
    """Each window in one pass, `batch` windows at a time: the way prompts are computed."""
    _check(windows_WT, batch)
    windows_WT = windows_WT.to(runner.model.device)
    nats: list[float] = []
    counters = StepCounters()
    for windows_BT in windows_WT.split(batch):
        stepper = Stepper(runner, windows_BT.shape[0], windows_BT.shape[1] - 1)
        logits_BTV, spent = stepper.forward(windows_BT[:, :-1], 0)
        counters += spent
        # A window at a time, so that only one is widened to float32.
        for logits_TV, window_T in zip(logits_BTV, windows_BT, strict=True):
            log_probs_TV = logits_TV.float().log_softmax(dim=1)
            for observer in observers:
                observer.see(len(nats), log_probs_TV)
            nats.append(float(_losses(log_probs_TV, window_T[1:]).mean()))
    return Score(tuple(nats), counters, windows_WT[:, 1:].numel())


def score_decode(runner: ModelRunner, windows_BT: torch.Tensor, *, warm_up: int = 0) -> Score:
    """All windows side by side, a token of each per step, the next one given: how answers come.

    The loss is over all tokens; bytes are counted after the first `warm_up` steps, which fill the
    cache.
    """
    _check(windows_BT, 1)
    num_windows, num_steps = windows_BT.shape[0], windows_BT.shape[1] - 1
    if not 0 <= warm_up < num_steps:
        raise ValueError(
            f"warm_up: got {warm_up}, expected 0 to {num_steps - 1} of {num_steps} steps"
        )
    windows_BT = windows_BT.to(runner.model.device)
    stepper = Stepper(runner, num_windows, num_steps)
    losses = []
    counters = StepCounters()
    for step in range(num_steps):
        logits_BTV, spent = stepper.forward(windows_BT[:, step : step + 1], step)
        log_probs_BV = logits_BTV[:, 0].float().log_softmax(dim=1)
        losses.append(_losses(log_probs_BV, windows_BT[:, step + 1]))
        if step >= warm_up:
            counters += spent
    nats_B = torch.stack(losses).mean(dim=0)
    return Score(tuple(nats_B.tolist()), counters, num_windows * (num_steps - warm_up))


class Stepper:
    """Slots for B windows that advance together."""

    def __init__(self, runner: ModelRunner, num_windows: int, num_positions: int) -> None:
        self._runner = runner
        self._masks = AttentionMasks(runner.model.config)
        self._cache = SlotCache(num_windows, num_positions)
        self._rows = list(range(num_windows))

    def forward(self, ids_BT: torch.Tensor, start: int) -> tuple[torch.Tensor, StepCounters]:
        """Logits [B, T, V] of tokens at positions start, start + 1, ..., and what they cost."""
        num_windows, num_tokens = ids_BT.shape
        positions_T = torch.arange(start, start + num_tokens, device=ids_BT.device)
        positions_BT = positions_T.expand(num_windows, -1)
        self._cache.begin(self._rows, positions_BT)
        mask = self._masks.make(positions_BT, self._runner.model.dtype)
        output = self._runner.forward(ids_BT, positions_BT, self._cache, mask)
        return output.logits, output.counters


def _losses(log_probs_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """[T] nats of the tokens that came."""
    return -log_probs_TV.gather(1, targets_T[:, None])[:, 0]


def _check(windows_WT: torch.Tensor, batch: int) -> None:
    if windows_WT.dim() != 2 or windows_WT.shape[0] < 1 or windows_WT.shape[1] < 2:
        raise ValueError(
            f"windows: got shape {tuple(windows_WT.shape)}, expected [W, T] with T of at least 2"
        )
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
