"""Goal: ranks go to heavy tails first, inside the budget, never dearer than one more bit.

Method: worked examples and properties.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_store.allocate import allocate_ranks, rank_cap
from expert_store.config import PAPER_LADDER
from expert_store.types import ExpertKey, ExpertShape
from kernels.types import block_bytes, group_bytes


def kurtosis(*values: float) -> dict[ExpertKey, float]:
    return {ExpertKey(0, i): value for i, value in enumerate(values)}


def ranks(values: dict[ExpertKey, float], avg_rank: int, cap: int = 1024) -> list[int]:
    found = allocate_ranks(values, avg_rank=avg_rank, ladder=PAPER_LADDER, cap=cap)
    assert list(found) == sorted(found)
    return [found[key] for key in values]


def test_worked_examples() -> None:
    assert ranks(kurtosis(3.0, 9.0, 4.0, 5.0), 16, cap=32) == [0, 32, 0, 32]
    assert ranks(kurtosis(3.0, 9.0, 4.0, 5.0), 16) == [0, 32, 0, 32]  # 64 is no step of the ladder
    assert ranks(kurtosis(3.0, 9.0, 4.0, 5.0), 32) == [0, 128, 0, 0]
    assert ranks(kurtosis(3.0, 9.0, 4.0, 5.0), 44) == [0, 128, 16, 32]
    assert ranks(kurtosis(3.0, 3.0, 3.0), 16, cap=16) == [16, 16, 16]
    assert ranks(kurtosis(3.0, 3.0, 3.0), 6) == [16, 0, 0]  # ties go by key
    assert ranks(kurtosis(3.0, 9.0), 0) == [0, 0]
    assert ranks(kurtosis(3.0, 9.0), 512, cap=15) == [0, 0]
    assert ranks({}, 16) == []


@given(
    values=st.lists(st.floats(1, 100), min_size=1, max_size=40),
    avg_rank=st.integers(0, 1100),
    cap=st.integers(0, 1100),
)
def test_properties(values: list[float], avg_rank: int, cap: int) -> None:
    heavy = kurtosis(*values)
    found = allocate_ranks(heavy, avg_rank=avg_rank, ladder=PAPER_LADDER, cap=cap)
    assert found.keys() == heavy.keys()
    assert sum(found.values()) <= avg_rank * len(values)
    assert all(rank in PAPER_LADDER and rank <= cap for rank in found.values())
    by_kurtosis = [found[key] for key in sorted(heavy, key=lambda key: (-heavy[key], key))]
    assert by_kurtosis == sorted(by_kurtosis, reverse=True)


@pytest.mark.parametrize(
    ("hidden", "ffn", "cap"),
    [(4096, 14336, 896), (2048, 768, 144), (384, 320, 48), (64, 64, 0), (128, 128, 16)],
)
def test_cap_is_where_rank_costs_one_more_bit(hidden: int, ffn: int, cap: int) -> None:
    assert rank_cap(ExpertShape(hidden, ffn, "silu", False), 3) == cap
    # One more bit is 128 bytes a tile (2 * 64 B of codes); the blocks below the cap cost less.
    one_more_bit = (ffn // 16) * (hidden // 64) * (group_bytes(3) - group_bytes(2))
    assert cap // 16 * block_bytes(ffn, hidden, 3) <= one_more_bit
    assert (cap // 16 + 1) * block_bytes(ffn, hidden, 3) > one_more_bit
