"""Goal: error feedback lowers the weighted error, never raises it, and survives odd moments.

Method: compare with the grid on random and trained weights under full and block-diagonal moments;
check the triangular factor against its definition; then moments and weights that could break it.
"""

from __future__ import annotations

import pytest
import torch

from expert_store.matrix import feedback
from expert_store.matrix.feedback import quantize_feedback
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.loss import relative_error, row_errors
from expert_store.matrix.moments import Moment, MomentSum
from expert_store.matrix.ordering import InputOrder
from kernels.reference import dequantize
from kernels.types import Grid
from tests.expert_store.matrix.matrices import correlated_moment, gaussian, heavy_tailed, trained

GRIDS: tuple[Grid, ...] = ("affine", "symmetric")


def rank_deficient(cols: int) -> Moment:
    return correlated_moment(cols, tokens=10)


def one_loud_input(cols: int) -> Moment:
    """A massive activation: one input a million times the energy of the others."""
    values = correlated_moment(cols).values.clone()
    values[70] *= 1e3
    values[:, 70] *= 1e3
    return Moment(values)


def silent_inputs(cols: int) -> Moment:
    values = correlated_moment(cols).values.clone()
    values[:40] = 0
    values[:, :40] = 0
    return Moment(values)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("make", [gaussian, heavy_tailed, trained])
def test_lower_error_than_the_grid(make: type, grid: Grid, bits: int) -> None:
    weight = make()
    moment = correlated_moment(weight.shape[1])
    errors = [
        relative_error(weight, dequantize(matrix), moment)
        for matrix in (
            quantize_grid(weight, bits, grid=grid, moment=moment),
            quantize_feedback(weight, bits, grid=grid, moment=moment.blocks_only()),
            quantize_feedback(weight, bits, grid=grid, moment=moment),
        )
    ]
    assert errors[2] < 0.97 * errors[1]
    assert errors[2] < 0.85 * errors[0]


@pytest.mark.parametrize("bits", [1, 4])
def test_the_other_widths_have_it_too(bits: int) -> None:
    weight, moment = gaussian(), correlated_moment(192)
    plain = quantize_grid(weight, bits, grid="symmetric", moment=moment)
    matrix = quantize_feedback(weight, bits, grid="symmetric", moment=moment)
    assert (matrix.rows, matrix.cols, matrix.bits, matrix.grid) == (48, 192, bits, "symmetric")
    found, before = (relative_error(weight, dequantize(each), moment) for each in (matrix, plain))
    assert found < 0.8 * before


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("make", [correlated_moment, rank_deficient, one_loud_input, silent_inputs])
def test_no_row_is_worse_than_on_the_grid(make: type, grid: Grid, full: bool) -> None:
    weight = heavy_tailed(rows=30)
    weight[3], weight[4, 7] = 0.125, 90.0
    moment: Moment = make(192)
    moment = moment if full else moment.blocks_only()
    plain = dequantize(quantize_grid(weight, 2, grid=grid, moment=moment))
    found = dequantize(quantize_feedback(weight, 2, grid=grid, moment=moment))
    assert found.isfinite().all()
    before_N, after_N = row_errors(weight - plain, moment), row_errors(weight - found, moment)
    assert bool((after_N <= before_N * (1 + 1e-6)).all())
    assert float(after_N.sum()) < float(before_N.sum())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_without_correlation_it_is_the_grid(grid: Grid, scale: float) -> None:
    # Scale 0: an expert that no token reached.
    weight, moment = gaussian(), Moment(Moment.identity(192).values * scale)
    for each in (moment, moment.blocks_only()):
        found = quantize_feedback(weight, 2, grid=grid, moment=each)
        assert torch.equal(found.data, quantize_grid(weight, 2, grid=grid).data)


@pytest.mark.parametrize("grid", GRIDS)
def test_uncorrelated_groups_need_no_full_moment(grid: Grid) -> None:
    block = correlated_moment(192).blocks_only()
    full = Moment(torch.block_diag(*block.values))
    weight = gaussian()
    one, other = (quantize_feedback(weight, 2, grid=grid, moment=each) for each in (full, block))
    errors = [relative_error(weight, dequantize(each), block) for each in (one, other)]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)


def test_same_input_same_bytes() -> None:
    weight, moment = gaussian(), correlated_moment(192)
    first, second = (quantize_feedback(weight, 2, grid="affine", moment=moment) for _ in range(2))
    assert torch.equal(first.data, second.data)


def test_rows_do_not_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = gaussian(), correlated_moment(192)
    whole = dequantize(quantize_feedback(weight, 3, grid="symmetric", moment=moment))
    monkeypatch.setattr(feedback, "CHUNK_ROWS", 20)
    parts = dequantize(quantize_feedback(weight, 3, grid="symmetric", moment=moment))
    # Sums in another order may tip a weight that lies between two levels.
    assert relative_error(weight, parts, moment) == pytest.approx(
        relative_error(weight, whole, moment), rel=0.01
    )


@pytest.mark.parametrize("name", ["zero", "constant", "huge", "tiny"])
@pytest.mark.parametrize("grid", GRIDS)
def test_odd_weights_survive(name: str, grid: Grid) -> None:
    weight = {
        "zero": torch.zeros(20, 192),
        "constant": torch.full((20, 192), 0.25),
        "huge": gaussian(20) * 3e5,
        "tiny": gaussian(20) * 1e-5,
    }[name]
    moment = correlated_moment(192)
    found = dequantize(quantize_feedback(weight, 2, grid=grid, moment=moment))
    assert found.isfinite().all()
    assert relative_error(weight, found, moment) < 0.2


def test_sweeps_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = gaussian(), correlated_moment(192)
    errors = []
    for sweeps in (0, 1, 2):
        monkeypatch.setattr(feedback, "SWEEPS", sweeps)
        matrix = quantize_feedback(weight, 2, grid="symmetric", moment=moment)
        errors.append(relative_error(weight, dequantize(matrix), moment))
    assert errors[0] > 1.02 * errors[1]
    assert errors[1] > errors[2]


def test_what_is_passed_on_is_the_best_answer_of_the_rest() -> None:
    """An error of 1 in input j is heard least when the later inputs err by shares[j, later]."""
    order = InputOrder.of(correlated_moment(128))
    values, shares = order.moment, order.shares
    for j in (0, 30, 127):
        later = values[j + 1 :, j + 1 :]
        best = -torch.linalg.solve(later, values[j + 1 :, j]) if len(later) else torch.zeros(0)
        torch.testing.assert_close(shares[j, j + 1 :], best, rtol=1e-3, atol=1e-4)
        whole = torch.cat((torch.ones(1), best))
        heard = whole @ values[j:, j:] @ whole
        torch.testing.assert_close(order.weight_Gg.view(-1)[j], heard, rtol=1e-3, atol=1e-5)


def test_loud_inputs_come_first_and_every_input_once() -> None:
    moment = correlated_moment(192)
    order = InputOrder.of(moment)
    assert order.cols_K.sort().values.tolist() == list(range(192))
    assert torch.equal(order.cols_K.view(3, 64)[:, 0] // 64, order.groups_G)
    energy = moment.diagonal()[order.cols_K].view(3, 64)
    assert bool((energy.diff(dim=1) <= 0).all())
    assert bool((energy.sum(1).diff() <= 0).all())


def test_more_tokens_help_on_unseen_ones() -> None:
    """What the shrunk moment of few tokens promises holds for tokens that it has not seen."""
    weight = gaussian()
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(192) + 0.7 * torch.randn(192, 192, generator=generator) / 192**0.5
    total, held = MomentSum(192), MomentSum(192)
    held.add(torch.randn(4000, 192, generator=generator) @ mix)
    plain = dequantize(quantize_grid(weight, 2, grid="symmetric"))
    errors = [relative_error(weight, plain, held.moment())]
    for tokens in (100, 400, 3500):
        total.add(torch.randn(tokens, 192, generator=generator) @ mix)
        moment = total.moment().shrunk_to_diagonal(total.count)
        found = dequantize(quantize_feedback(weight, 2, grid="symmetric", moment=moment))
        errors.append(relative_error(weight, found, held.moment()))
    assert errors == sorted(errors, reverse=True)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="moment: expected 64 inputs, got 128"):
        quantize_feedback(torch.zeros(8, 64), 2, grid="affine", moment=Moment.identity(128))
    with pytest.raises(ValueError, match="bits: got 1, the affine grid has"):
        quantize_feedback(torch.zeros(8, 64), 1, grid="affine", moment=Moment.identity(64))
