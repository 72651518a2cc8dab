"""Goal: the restore mask marks exactly each token's Top-n by size of weight, however columns come.

Method: properties against a naive per-token sort, and hand-made rows for ties, signs and limits.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.routing import Routing, restore_mask, route


def naive_mask(weights: list[float], top_n: int) -> list[bool]:
    ranked = sorted(range(len(weights)), key=lambda column: (-abs(weights[column]), column))
    return [column in ranked[:top_n] for column in range(len(weights))]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    """Weights [T, K] with many ties and some negative ones, and an n from 0 to K."""
    num_columns = draw(st.integers(1, 6))
    weight = st.sampled_from([-0.5, -0.25, 0.0, 0.125, 0.25, 0.5, 1.5])
    row = st.lists(weight, min_size=num_columns, max_size=num_columns)
    return draw(st.lists(row, min_size=1, max_size=5)), draw(st.integers(0, num_columns))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_mask_is_the_naive_top_n(case: tuple[list[list[float]], int]) -> None:
    weights, top_n = case
    mask_TK = restore_mask(torch.tensor(weights), top_n)
    assert mask_TK.tolist() == [naive_mask(row, top_n) for row in weights]
    assert mask_TK.sum(dim=1).tolist() == [top_n] * len(weights)


def test_columns_that_are_not_sorted_do_not_matter() -> None:
    """deepseek and glm4_moe give topk(sorted=False): the largest weight may be in any column."""
    mask = restore_mask(torch.tensor([[0.1, 0.2, 0.7]]), 1)
    assert mask.tolist() == [[False, False, True]]


def test_of_equal_weights_the_earlier_column_goes_first() -> None:
    mask = restore_mask(torch.tensor([[0.5, 1.0, 1.0], [1.0, 1.0, 1.0]]), 1)
    assert mask.tolist() == [[False, True, False], [True, False, False]]


def test_a_large_negative_weight_counts_as_large() -> None:
    mask = restore_mask(torch.tensor([[0.4, -0.6]]), 1)
    assert mask.tolist() == [[False, True]]


def test_no_token_rows_give_an_empty_mask() -> None:
    assert restore_mask(torch.empty(0, 3), 2).shape == (0, 3)


@pytest.mark.parametrize("top_n", [-1, 3])
def test_top_n_outside_the_columns_is_refused(top_n: int) -> None:
    with pytest.raises(ValueError, match=f"top_n: got {top_n}, expected 0 to .* 2"):
        restore_mask(torch.tensor([[0.5, 0.5]]), top_n)


def test_route_takes_router_dtypes_and_marks_all_rows_active() -> None:
    ids = torch.tensor([[1, 0]], dtype=torch.int32)
    routing = route(ids, torch.tensor([[0.25, 0.75]], dtype=torch.bfloat16), top_n=1)
    assert routing.topk_ids_TK.dtype == torch.int64
    assert routing.topk_weights_TK.dtype == torch.float32
    assert routing.restore_TK.tolist() == [[False, True]]
    assert routing.active_T.tolist() == [True]


def test_shapes_that_do_not_fit_are_refused() -> None:
    ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
    mask, active = torch.tensor([[True, False]]), torch.tensor([True])
    with pytest.raises(ValueError, match=r"one shape \[T, K\]"):
        Routing(ids, weights[:, :1], mask, active)
    with pytest.raises(ValueError, match=r"active_T: expected \[1\]"):
        Routing(ids, weights, mask, torch.tensor([True, True]))
