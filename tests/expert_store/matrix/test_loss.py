"""Goal: the weighted error is the mean squared error of the outputs, summed over rows.

Method: compare with multiplying the error by the inputs themselves.
"""

from __future__ import annotations

import pytest
import torch

from expert_store.matrix import loss
from expert_store.matrix.loss import relative_error, weighted_error
from expert_store.matrix.moments import Moment, MomentSum


def setting(rows: int = 10, cols: int = 128) -> tuple[torch.Tensor, torch.Tensor, Moment]:
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(rows, cols, generator=generator)
    x = torch.randn(200, cols, generator=generator) + 0.5
    total = MomentSum(cols)
    total.add(x)
    return error, x, total.moment()


def test_full_moment_is_the_error_of_the_outputs() -> None:
    error, x, moment = setting()
    expected = (x.double() @ error.double().T).square().mean(dim=0).sum()
    assert weighted_error(error, moment) == pytest.approx(float(expected), rel=1e-5)


def test_blocks_are_the_sum_of_the_groups_errors() -> None:
    error, x, moment = setting()
    expected = sum(
        float((x[:, part] @ error[:, part].T).square().mean(dim=0).sum())
        for part in (slice(0, 64), slice(64, 128))
    )
    assert weighted_error(error, moment.blocks_only()) == pytest.approx(expected, rel=1e-5)


def test_rows_have_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    error, _, moment = setting()
    weight = torch.arange(10.0)
    expected = sum(float(weight[n]) * weighted_error(error[n : n + 1], moment) for n in range(10))
    monkeypatch.setattr(loss, "_CHUNK_WEIGHTS", 3 * 128)
    assert weighted_error(error, moment, weight) == pytest.approx(expected, rel=1e-5)


def test_no_moment_is_the_sum_of_squares() -> None:
    error, _, _ = setting()
    assert weighted_error(error) == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert weighted_error(error, Moment.identity(128)) == pytest.approx(weighted_error(error))


def test_relative_error_at_its_ends() -> None:
    error, _, moment = setting()
    assert relative_error(error, error, moment) == 0
    assert relative_error(error, torch.zeros_like(error), moment) == 1
    assert relative_error(torch.zeros(2, 64), torch.zeros(2, 64)) == 0
    assert relative_error(torch.zeros(2, 64), torch.ones(2, 64)) == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 64 inputs as the residual has, got 128"):
        weighted_error(torch.zeros(2, 64), Moment.identity(128))
    with pytest.raises(ValueError, match=r"row_weight: expected \[2\]"):
        weighted_error(torch.zeros(2, 64), None, torch.ones(3))
