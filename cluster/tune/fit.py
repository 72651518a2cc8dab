"""What a step costs, from measured steps: least squares over the three terms of `ServiceTimes`.

Pure. Relative errors count, so that short steps matter as much as long ones; no term is negative.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.autoscaling_rules import ServiceTimes


@dataclass(frozen=True, slots=True)
class Step:
    """A measured step: of one prompt's next tokens, or of one token for each sequence."""

    prompt_tokens: int
    sequences: int  # that decode; 0 in a step of a prompt
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted times, as in `ServiceTimes`, and how well they are known.

    - step_s, sequence_s, prompt_token_s: seconds of a step, for each sequence and prompt token.
    - error: median of |fitted / measured - 1| over the kinds of steps.
    - num_steps: how many were measured.
    """

    step_s: float
    sequence_s: float
    prompt_token_s: float
    error: float = 0.0
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.service(1, 1)  # whose own checks name what is wrong

    def service(self, prompt_tokens: float, answer_tokens: float) -> ServiceTimes:
        """With what requests are like."""
        return ServiceTimes(
            self.step_s, self.sequence_s, self.prompt_token_s, prompt_tokens, answer_tokens
        )


def fit(steps: Sequence[Step]) -> Fit:
    """Fit to the median of each kind of step, which a busy machine's outliers do not move.

    Raises ValueError without steps of prompts and of two numbers of sequences.
    """
    kinds: dict[tuple[int, int], list[float]] = defaultdict(list)
    for step in steps:
        kinds[step.prompt_tokens, step.sequences].append(step.seconds)
    if not any(prompt for prompt, _ in kinds) or len({n for _, n in kinds if n}) < 2:
        raise ValueError(
            f"steps: got {len(steps)} of {len(kinds)} kinds, expected some of prompts and decode "
            "steps of two or more numbers of sequences; measure longer"
        )
    rows = np.array([[1.0, sequences, prompt] for prompt, sequences in kinds])
    seconds = np.array([statistics.median(each) for each in kinds.values()])
    times = _least_squares(rows / seconds[:, None])
    errors = np.abs(rows @ times / seconds - 1)
    step_s, sequence_s, prompt_token_s = (float(each) for each in times)
    return Fit(step_s, sequence_s, prompt_token_s, float(np.median(errors)), len(steps))


def _least_squares(rows: np.ndarray) -> np.ndarray:
    """x >= 0, x[0] > 0, for which rows @ x is nearest to ones: the best over all sets of terms."""
    best, least = np.array([1e-6, 0.0, 0.0]), np.inf
    for more in itertools.chain.from_iterable(itertools.combinations((1, 2), n) for n in range(3)):
        used = [0, *more]
        found, *_ = np.linalg.lstsq(rows[:, used], np.ones(len(rows)), rcond=None)
        error = float(np.sum((rows[:, used] @ found - 1) ** 2))
        if found[0] > 0 and (found >= 0).all() and error < least:
            best, least = np.zeros(3), error
            best[used] = found
    return best
