"""Goal: codes and planes chosen together lose less over all uses than one after the other.

Method: losses against the plain order's, by share and grid; with one use it is plain error feedback
and without a moment the nearest of all sums of levels, searched here by hand.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from expert_store.matrix.feedback import quantize_feedback
from expert_store.matrix.loss import weighted_error
from expert_store.matrix.moments import Moment
from expert_store.matrix.planes import plane_repair
from expert_store.matrix.progressive import quantize_progressive
from expert_store.matrix.uses import Use
from expert_store.matrix.weighting import Weighting
from kernels.packing import unpack
from kernels.reference import dequantize
from kernels.types import Grid
from tests.expert_store.matrix.repair_cases import moment, weight


def losses(values: torch.Tensor, uses: list[Use], grid: Grid, second: Moment | None) -> list[float]:
    """The error with no plane, one, two, ..."""
    codes, planes = quantize_progressive(uses, 2, grid=grid, moment=second)
    left, errors = values - dequantize(codes), []
    for plane in planes:
        errors.append(weighted_error(left, second))
        left = left - dequantize(plane)
    return [*errors, weighted_error(left, second)]


@pytest.mark.parametrize("grid", ["symmetric", "affine"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "blocks"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_it_beats_one_after_the_other(grid: Grid, full: bool, share: float) -> None:
    values, second = weight(64, 192), moment(192)
    second = second if full else second.blocks_only()
    alone, together = losses(
        values, [Use(1 - share, 0, values), Use(share, 1, values)], grid, second
    )
    codes, _ = quantize_progressive([Use(1.0, 0, values)], 2, grid=grid, moment=second)
    residual = values - dequantize(codes)
    plain = weighted_error(residual, second)
    block = plane_repair(residual, Weighting.of(second))
    assert block is not None
    assert (1 - share) * alone + share * together < (1 - share) * plain + share * (
        plain - block.gain
    )


def test_shares_move_the_loss_where_it_is_heard() -> None:
    values, second = weight(64, 192), moment(192)
    found = [
        losses(values, [Use(1 - p, 0, values), Use(p, 1, values)], "symmetric", second)
        for p in (0.1, 0.5, 0.9)
    ]
    alone, together = zip(*found, strict=True)
    assert list(alone) == sorted(alone)
    assert list(together) == sorted(together, reverse=True)


def test_two_planes_leave_less_each() -> None:
    values, second = weight(64, 192), moment(192)
    uses = [Use(0.4, 0, values), Use(0.3, 1, values), Use(0.3, 2, values)]
    none, one, two = losses(values, uses, "symmetric", second)
    assert two < 0.6 * one < 0.36 * none


@pytest.mark.parametrize("grid", ["symmetric", "affine"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "blocks"])
def test_one_use_is_plain_error_feedback(grid: Grid, full: bool) -> None:
    values, second = weight(48, 192), moment(192)
    second = second if full else second.blocks_only()
    (error,) = losses(values, [Use(1.0, 0, values)], grid, second)
    plain = quantize_feedback(values, 2, grid=grid, moment=second)
    assert error == pytest.approx(weighted_error(values - dequantize(plain), second), rel=0.02)


def test_feedback_beats_the_nearest_level() -> None:
    values, second = weight(64, 192), moment(192)
    with_feedback = losses(values, [Use(1.0, 0, values)], "symmetric", second)
    diagonal = Moment(torch.diag(second.diagonal()))
    codes, _ = quantize_progressive([Use(1.0, 0, values)], 2, grid="symmetric", moment=diagonal)
    nearest = weighted_error(values - dequantize(codes), second)
    assert with_feedback[0] < 0.9 * nearest


def test_without_a_moment_each_weight_gets_its_best_pair() -> None:
    values = weight(16, 128)
    codes, planes = quantize_progressive(
        [Use(0.5, 0, values), Use(0.5, 1, values)], 2, grid="symmetric"
    )
    _, scale, middle = unpack(codes)
    _, plane_scale, half = unpack(planes[0])
    per_weight = [each.repeat_interleave(64, dim=1) for each in (scale, middle, plane_scale, half)]
    least = torch.full_like(values, torch.inf)
    for code, sign in itertools.product(range(4), range(2)):
        rest = values - (per_weight[0] * code - per_weight[1])
        error = 0.5 * rest**2 + 0.5 * (rest - (per_weight[2] * sign - per_weight[3])) ** 2
        least = torch.minimum(least, error)
    rest = values - dequantize(codes)
    found = 0.5 * rest**2 + 0.5 * (rest - dequantize(planes[0])) ** 2
    torch.testing.assert_close(found, least, rtol=1e-4, atol=1e-9)


def test_a_use_may_aim_elsewhere() -> None:
    values, other = weight(32, 128), weight(32, 128, seed=9)
    uses = [Use(0.25, 0, values), Use(0.75, 0, other)]
    codes, planes = quantize_progressive(uses, 3, grid="affine")
    assert planes == ()
    mixed, _ = quantize_progressive([Use(1.0, 0, 0.25 * values + 0.75 * other)], 3, grid="affine")
    torch.testing.assert_close(dequantize(codes), dequantize(mixed), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 1000], ids=["rank-deficient", "full"])
@pytest.mark.parametrize(("rows", "cols"), [(7, 64), (64, 64), (20, 192)])
def test_shapes_and_poor_moments(rows: int, cols: int, tokens: int) -> None:
    values = weight(rows, cols)
    values[2] = 0
    values[3] = 0.5
    second = moment(cols, tokens)
    uses = [Use(0.5, 0, values), Use(0.5, 1, values)]
    for grid in ("symmetric", "affine"):
        codes, planes = quantize_progressive(uses, 2, grid=grid, moment=second)
        assert (codes.rows, codes.cols, codes.bits, codes.grid) == (rows, cols, 2, grid)
        assert [(p.rows, p.cols, p.bits, p.grid) for p in planes] == [(rows, cols, 1, "symmetric")]
        assert (dequantize(codes) + dequantize(planes[0])).isfinite().all()
        again, _ = quantize_progressive(uses, 2, grid=grid, moment=second)
        assert torch.equal(codes.data, again.data)


def test_what_does_not_fit() -> None:
    values = weight(16, 64)
    with pytest.raises(ValueError, match="uses: expected at least one"):
        quantize_progressive([], 2, grid="symmetric")
    with pytest.raises(ValueError, match="shares: expected one above 0"):
        quantize_progressive([Use(0.0, 0, values)], 2, grid="symmetric")
    with pytest.raises(ValueError, match="share: got -1"):
        quantize_progressive([Use(-1, 0, values)], 2, grid="symmetric")
    with pytest.raises(ValueError, match="num_planes: got 4, expected 0 to 3"):
        quantize_progressive([Use(1, 4, values)], 2, grid="symmetric")
    with pytest.raises(ValueError, match="targets differ in shape"):
        quantize_progressive([Use(1, 0, values), Use(1, 0, values[:8])], 2, grid="symmetric")
    with pytest.raises(ValueError, match="moment: expected 64 inputs, got 128"):
        quantize_progressive([Use(1, 0, values)], 2, grid="symmetric", moment=moment(128))
