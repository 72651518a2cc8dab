"""A budget of average rank to a rank for every expert. Pure functions of plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expert_store.types import ExpertKey, ExpertShape

BITS_PER_FACTOR_WEIGHT = {2: 2.5, 3: 3.5, 4: 4.5}
"""Stored bits of one factor weight: its code and its share of a scale and zero per 64 (32 / 64)."""


def rank_cap(shape: ExpertShape, factor_bits: int) -> int:
    """Largest rank that costs no more than one more bit for every weight of the matrix.

    One more bit for a [rows, cols] matrix is rows * cols bits; rank r at 3 bits is
    3.5 * r * (rows + cols) bits (3 of code, 0.5 of scale and zero). They meet at
    r* = rows * cols / (3.5 * (rows + cols)): 910 for 4096 x 14336, 159 for 2048 x 768, 49 for
    384 x 320. Never more than the matrix has, and a multiple of 16.
    """
    rows, cols = shape.ffn, shape.hidden
    equal_price = rows * cols / (BITS_PER_FACTOR_WEIGHT[factor_bits] * (rows + cols))
    return int(min(equal_price, rows, cols)) // 16 * 16


def allocate_ranks(
    kurtosis: Mapping[ExpertKey, float], *, avg_rank: int, ladder: Sequence[int], cap: int
) -> dict[ExpertKey, int]:
    """Rank of each expert: greedy by falling kurtosis, mean at most `avg_rank`.

    Heavy tails quantise worst, so the expert with the highest kurtosis chooses first and takes the
    largest rank of the ladder, not over `cap`, that the rest of the budget holds; and so on. Ties
    go by key. With ladder 0, 16, 32, cap 32, average 16 and four experts: 32, 32, 0, 0.
    """
    steps = sorted((rank for rank in ladder if rank <= cap), reverse=True)
    budget = avg_rank * len(kurtosis)
    ranks = {}
    for key in sorted(kurtosis, key=lambda item: (-kurtosis[item], item)):
        ranks[key] = next((rank for rank in steps if rank <= budget), 0)
        budget -= ranks[key]
    return dict(sorted(ranks.items()))
