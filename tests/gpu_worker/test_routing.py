"""Goal: ranks and shares of router weights are a naive sort's, however columns come; bad shapes
are refused.

Method: properties against plain Python, and hand-made rows for ties, signs and limits.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.routing import Routing, ranks, shares, skip_mask

WEIGHT = st.sampled_from([-0.5, -0.25, 0.0, 0.125, 0.25, 0.5, 1.5])
ROWS = st.integers(1, 6).flatmap(
    lambda size: st.lists(st.lists(WEIGHT, min_size=size, max_size=size), min_size=1, max_size=5)
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_ranks_shares_and_skips_are_the_naive_ones(rows: list[list[float]], below: float) -> None:
    weights_TK = torch.tensor(rows)
    for row, ranked, share, skipped in zip(
        rows,
        ranks(weights_TK).tolist(),
        shares(weights_TK).tolist(),
        skip_mask(weights_TK, below).tolist(),
        strict=True,
    ):
        order = sorted(range(len(row)), key=lambda column: (-abs(row[column]), column))
        assert ranked == [order.index(column) for column in range(len(row))]
        total = sum(map(abs, row))
        assert share == pytest.approx([abs(w) / total if total else 0.0 for w in row])
        assert skipped == [c != order[0] and share[c] < below for c in range(len(row))]


def test_shapes_that_do_not_fit_are_refused() -> None:
    ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
    mask, active = torch.tensor([[True, False]]), torch.tensor([True])
    with pytest.raises(ValueError, match=r"one shape \[T, K\]"):
        Routing(ids, weights[:, :1], mask, mask, active)
    with pytest.raises(ValueError, match=r"skip \(1, 1\)"):
        Routing(ids, weights, mask, mask[:, :1], active)
    with pytest.raises(ValueError, match=r"active_T: expected \[1\]"):
        Routing(ids, weights, mask, mask, torch.tensor([True, True]))
