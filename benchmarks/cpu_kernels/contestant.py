"""What takes part in the comparison: a product of some shape, its copies in memory, its truth.

Legend: T tokens, H hidden, F ffn, N rows, K cols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Form = Literal["expert", "matrix"]
"""expert: down(silu(gate x) * (up x)). matrix: gate x alone, for which every library has a form."""
Call = Callable[[], torch.Tensor]
"""One product with one copy of the weights; the answer is float [T, rows] and may be overwritten
by the next call."""

POOL_BYTES = 96 << 20
MAX_COPIES = 32
PATTERN_ROWS = 128
"""Random rows that a matrix repeats: quantising them all would take longer than the measurement,
and no kernel's time depends on the values."""


@dataclass(frozen=True, slots=True)
class Shape:
    """An expert's hidden and ffn."""

    hidden: int
    ffn: int

    def matrices(self, form: Form) -> list[tuple[int, int]]:
        """[rows, cols] of the matrices that one call reads."""
        wide = (self.ffn, self.hidden)
        return [wide] if form == "matrix" else [wide, wide, (self.hidden, self.ffn)]

    def products(self, form: Form) -> int:
        """Multiplications of one token."""
        return sum(rows * cols for rows, cols in self.matrices(form))

    def __str__(self) -> str:
        return f"{self.hidden}x{self.ffn}"


@dataclass(frozen=True, slots=True)
class Contestant:
    """`start(x)` makes ready for x, float32 [T, cols], and returns a call for each copy.

    `weights` are its first copy's matrices as float32 [rows, cols], made anew at each call of it:
    the truth that its answers are judged by, within `tolerance` (relative RMS).
    """

    name: str
    bits: int
    num_bytes: int  # of the weights that one call reads
    tolerance: float
    start: Callable[[torch.Tensor], list[Call]]
    weights: Callable[[], list[torch.Tensor]]


def num_copies(num_bytes: int) -> int:
    """Copies of the weights to cycle through.

    Between two uses of a copy all contestants' weights are read several times over, which is more
    than any cache holds.
    """
    return min(MAX_COPIES, max(2, -(-POOL_BYTES // num_bytes)))


def random_pattern(rows: int, cols: int) -> torch.Tensor:
    """A Gaussian weight [PATTERN_ROWS, cols]; its repetition makes up `rows`."""
    if rows % PATTERN_ROWS:
        raise ValueError(f"rows: got {rows}, expected a multiple of {PATTERN_ROWS}")
    return torch.randn(PATTERN_ROWS, cols) / cols**0.5


def expected(weights: list[torch.Tensor], x_TK: torch.Tensor) -> torch.Tensor:
    """The float32 answer: of one matrix, or of gate, up and down."""
    first_TN = x_TK @ weights[0].T
    if len(weights) == 1:
        return first_TN
    _, up, down = weights
    return (torch.nn.functional.silu(first_TN) * (x_TK @ up.T)) @ down.T


def gate(contestant: Contestant, x_TK: torch.Tensor, token_counts: tuple[int, ...]) -> None:
    """Raises AssertionError when an answer, at any of the token counts, is not the reference's."""
    truth_TN = expected(contestant.weights(), x_TK)
    for num_tokens in token_counts:
        got = contestant.start(x_TK[:num_tokens])[0]().float()
        wanted = truth_TN[:num_tokens]
        error = float((got - wanted).norm() / wanted.norm())
        assert error < contestant.tolerance, (
            f"{contestant.name}, {num_tokens} tokens: relative error {error:.2e}, allowed "
            f"{contestant.tolerance:.0e}; no number is printed on a red gate"
        )
