"""Chooses the next token of each sequence from its logits.

A draw is a pure function of the request's seed, the token's index and the logits: who else runs, or
a step that is run again, changes a token only by changing the logits. Knows no text, no model.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.sequence import SamplingParams, Sequence

MASK_64 = 2**64 - 1
FIRST_SIZES = (1024, 16_384)
"""How many of the most likely tokens are looked at first when top_p is on."""


class BadLogitsError(Exception):
    """The model gave NaN or infinite logits for a sequence."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sequence's next token, or why there is none."""

    token_id: int | None
    error: BadLogitsError | None = None


def sample(logits_BV: torch.Tensor, sequences: tuple[Sequence, ...]) -> list[Sampled]:
    """The next token of each sequence, in order. Greedy ties go to the lowest id."""
    assert logits_BV.shape[0] == len(sequences), (logits_BV.shape, len(sequences))
    best_B, usable_B = _largest(logits_BV)
    chosen = []
    for row, (sequence, best, usable) in enumerate(zip(sequences, best_B, usable_B, strict=True)):
        if not usable:
            chosen.append(Sampled(None, _bad_logits(sequence)))
        elif sequence.params.temperature == 0:
            chosen.append(Sampled(best))
        else:
            uniform = uniform_draw(sequence.seed, len(sequence.output_ids))
            chosen.append(Sampled(draw(logits_BV[row], sequence.params, uniform)))
    return chosen


def _largest(logits_BV: torch.Tensor) -> tuple[list[int], list[bool]]:
    """Of each row the first of its largest logits, and whether that is finite.

    The largest logit is NaN if any is, and must be finite: a row of -inf forbids every token.
    """
    if logits_BV.device.type == "cpu":
        # In numpy: torch's argmax and max of 8 rows of 32000 took 516 us here, numpy's 29 us, in
        # bfloat16 1343 and 47 us (AMD EPYC, one thread, 2026-11-23).
        logits = logits_BV.detach().float().numpy()
        best_B = logits.argmax(axis=1)
        return best_B.tolist(), np.isfinite(logits[np.arange(len(best_B)), best_B]).tolist()
    best = logits_BV.argmax(dim=-1)
    return best.tolist(), torch.isfinite(logits_BV.max(dim=-1).values).tolist()


def _bad_logits(sequence: Sequence) -> BadLogitsError:
    return BadLogitsError(
        f"request {sequence.request_id}: the logits of token {sequence.num_tokens} hold NaN or are "
        "infinite; the weights or an expert's output are damaged, run `moetier verify` on the store"
    )


def draw(logits_V: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """The token at `uniform` in [0, 1) of the distribution cut by temperature, top_k, then top_p.

    top_p keeps the fewest tokens, most likely first, whose probabilities reach it, at least one.
    Probabilities are float64; needs a finite largest logit.
    """
    logits_V = logits_V.double()
    # Shifted before the division: a tiny temperature may underflow to a one-hot, never overflow.
    weights_V = torch.exp((logits_V - logits_V.max()) / params.temperature)
    if 0 < params.top_k < weights_V.numel():
        weights, ids = torch.topk(weights_V, params.top_k)
        cumulative = _top_p(torch.cumsum(weights, dim=0), params.top_p, float(weights.sum()))
    elif params.top_p < 1:
        cumulative, ids = _most_likely(weights_V, params.top_p)
    else:
        cumulative, ids = torch.cumsum(weights_V, dim=0), None
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    index = min(index, cumulative.numel() - 1)
    return index if ids is None else int(ids[index])


def _most_likely(weights_V: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative weights and ids of the fewest tokens that hold top_p of the whole.

    Looks for them among few tokens first: sorting a large vocabulary costs more than a small step.
    """
    total = float(weights_V.sum())
    for size in (*(s for s in FIRST_SIZES if s < weights_V.numel()), weights_V.numel()):
        weights, ids = torch.topk(weights_V, size)
        cumulative = torch.cumsum(weights, dim=0)
        if cumulative[-1] >= top_p * total:
            break
    return _top_p(cumulative, top_p, total), ids


def _top_p(cumulative: torch.Tensor, top_p: float, total: float) -> torch.Tensor:
    """The beginning of `cumulative` that reaches top_p of `total`."""
    if top_p == 1:
        return cumulative
    return cumulative[: 1 + int(torch.searchsorted(cumulative, top_p * total))]


def uniform_draw(seed: int, index: int) -> float:
    """The uniform number in [0, 1) of token `index` of a request with `seed` (splitmix64)."""
    state = (_mix(seed & MASK_64) + index * 0x9E3779B97F4A7C15) & MASK_64
    return (_mix(state) >> 11) / 2**53


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
    return state ^ (state >> 31)
