"""Goal: the weighting's norm is the weighted error, whatever it is made of.

Method: the Frobenius norm of S^(1/2) E C against `weighted_error`; moments that have no root.
"""

from __future__ import annotations

import pytest
import torch

from expert_store.matrix.loss import weighted_error
from expert_store.matrix.moments import Moment
from expert_store.matrix.weighting import Weighting
from tests.expert_store.matrix.repair_cases import moment, residual, row_weights


@pytest.mark.parametrize("tokens", [3, 40, 1000])
@pytest.mark.parametrize("full", [True, False], ids=["full", "blocks"])
@pytest.mark.parametrize("weighted_rows", [True, False])
def test_the_root_gives_the_error(tokens: int, full: bool, weighted_rows: bool) -> None:
    matrix = residual(40, 192)
    second = moment(192, tokens) if full else moment(192, tokens).blocks_only()
    rows_weight = row_weights(40) if weighted_rows else None
    weighting = Weighting.of(second, rows_weight)
    expected = weighted_error(matrix, second, rows_weight)
    assert weighting.error(matrix) == expected
    heard = weighting.times_root(weighting.scale_rows(matrix))
    assert float(heard.square().sum()) == pytest.approx(expected, rel=1e-3)
    scaled = weighting.scale_rows(matrix)
    product = float((weighting.times_moment(scaled) * scaled).sum())
    assert product == pytest.approx(expected, rel=1e-4)


def test_what_says_nothing_counts_as_none() -> None:
    weighting = Weighting.of(Moment(torch.zeros(64, 64)), torch.zeros(8))
    assert weighting.moment is None
    assert weighting.row_weight_N is None
    matrix = residual(8, 64)
    assert weighting.error(matrix) == pytest.approx(float(matrix.square().sum()), rel=1e-5)
    assert torch.equal(weighting.times_root(matrix), matrix)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_row_weights_that_are_none(bad: float) -> None:
    with pytest.raises(ValueError, match="row_weight: expected finite values of at least 0"):
        Weighting.of(None, torch.tensor([1.0, bad]))


def test_a_moment_that_is_none() -> None:
    values = torch.eye(64)
    values[0, 1] = values[1, 0] = -100.0
    with pytest.raises(ValueError, match="moment: not positive semi-definite"):
        Weighting.of(Moment(values))
