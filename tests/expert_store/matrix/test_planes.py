"""Goal: a plane is a residual's signs and the scales that fit them, and never makes it worse.

Method: against the closed form by hand; errors before and after; inputs that hold nothing.
"""

from __future__ import annotations

import pytest
import torch

from expert_store.matrix.loss import weighted_error
from expert_store.matrix.moments import Moment
from expert_store.matrix.planes import fit_row_scales, plane_bytes, plane_repair
from expert_store.matrix.weighting import Weighting
from kernels.packing import unpack_symmetric
from kernels.reference import dequantize
from tests.expert_store.matrix.repair_cases import moment, residual, row_weights


@pytest.mark.parametrize("diagonal", [False, True], ids=["plain", "weighted"])
def test_signs_and_scales_are_the_closed_form(diagonal: bool) -> None:
    matrix = residual(32, 128)
    energy = torch.linspace(1, 20, 128) if diagonal else torch.ones(128)
    weighting = Weighting.of(Moment(torch.diag(energy)) if diagonal else None)
    block = plane_repair(matrix, weighting, feedback=False)
    assert block is not None
    codes, _, _ = unpack_symmetric(block.plane)
    assert torch.equal(codes.bool(), matrix > 0)
    # The best scale of a group is the (weighted) mean magnitude; 8-bit scales and the damping of
    # the weights move it by a few per cent.
    weight = energy.view(2, 64)
    best = (matrix.view(32, 2, 64).abs() * weight).sum(-1) / weight.sum(-1)
    found = block.dense().view(32, 2, 64).abs()
    assert float((found - found[..., :1]).abs().max()) < 1e-7
    torch.testing.assert_close(found[..., 0], best, rtol=0.03, atol=0)


@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (7, 128), (40, 192)])
@pytest.mark.parametrize("tokens", [None, 10, 1000])
@pytest.mark.parametrize("feedback", [False, True])
def test_it_never_makes_it_worse(rows: int, cols: int, tokens: int | None, feedback: bool) -> None:
    matrix = residual(rows, cols)
    second = None if tokens is None else moment(cols, tokens)
    rows_weight = row_weights(rows)
    weighting = Weighting.of(second, rows_weight)
    before = weighted_error(matrix, second, rows_weight)
    for _ in range(3):  # a plane over a plane too
        block = plane_repair(matrix, weighting, feedback=feedback)
        assert block is not None
        assert (block.plane.rows, block.plane.cols, block.plane.bits) == (rows, cols, 1)
        assert block.num_bytes == plane_bytes(rows, cols)
        matrix = matrix - block.dense()
        after = weighted_error(matrix, second, rows_weight)
        assert block.gain == pytest.approx(before - after, rel=1e-3)
        assert after < before
        before = after


def test_feedback_hears_what_inputs_share() -> None:
    matrix, second = residual(64, 192), moment(192)
    weighting = Weighting.of(second)
    gains = []
    for feedback in (False, True):
        block = plane_repair(matrix, weighting, feedback=feedback)
        assert block is not None
        gains.append(block.gain)
    assert gains[1] > 1.05 * gains[0]


def test_a_gaussian_leaves_what_it_must() -> None:
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    block = plane_repair(matrix, Weighting.of())
    assert block is not None
    # 1 - 2/pi of a Gaussian's energy is left by its best 1-bit quantiser.
    assert 1 - block.gain / float(matrix.square().sum()) == pytest.approx(0.363, abs=0.02)


@pytest.mark.parametrize("second", [None, moment(128), Moment(torch.zeros(2, 64, 64))], ids=str)
def test_of_nothing_there_is_no_plane(second: Moment | None) -> None:
    assert plane_repair(torch.zeros(16, 128), Weighting.of(second)) is None


def test_a_zero_moment_counts_as_none() -> None:
    matrix = residual(16, 128)
    silent = plane_repair(matrix, Weighting.of(Moment(torch.zeros(128, 128))))
    plain = plane_repair(matrix, Weighting.of())
    assert silent is not None
    assert plain is not None
    assert torch.equal(silent.plane.data, plain.plane.data)


def test_zero_rows_and_groups_stay_zero() -> None:
    matrix = residual(16, 128)
    matrix[3] = 0
    matrix[5, 64:] = 0
    block = plane_repair(matrix, Weighting.of())
    assert block is not None
    added = block.dense()
    assert float(added[3].abs().max()) < 1e-6
    assert float(added[5, 64:].abs().max()) < 1e-6


def test_no_row_is_scaled_away_from_its_target() -> None:
    matrix, second = residual(32, 128), moment(128)
    weighting = Weighting.of(second)
    block = plane_repair(matrix, weighting, feedback=False)
    assert block is not None
    target = matrix.clone()
    target[:16] *= -3  # signs that are all wrong are best not added at all
    fitted = dequantize(fit_row_scales(block.plane, target, weighting))
    assert float(fitted[:16].abs().max()) == 0
    for row in range(32):
        left = weighted_error((target - fitted)[row : row + 1], second)
        assert left <= weighted_error(target[row : row + 1], second) * (1 + 1e-5)


def test_cols_that_no_group_divides() -> None:
    with pytest.raises(ValueError, match=r"weight: expected \[rows, multiple of 64\]"):
        plane_repair(torch.zeros(16, 96), Weighting.of())
