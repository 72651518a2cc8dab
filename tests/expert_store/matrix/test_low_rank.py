"""Goal: rank blocks are the weighted truncated SVD, quantised, and say what they repair.

Method: against torch.linalg.svd of S^(1/2) E R^(1/2) and of E; claimed gains against errors really
left. The Krylov path, for large matrices, is run on small ones by lowering its threshold.
"""

from __future__ import annotations

import pytest
import torch

from expert_store.matrix import low_rank
from expert_store.matrix.loss import weighted_error
from expert_store.matrix.low_rank import FactorForm, RankFinder, leading_basis, weighted_svd
from expert_store.matrix.moments import Moment
from expert_store.matrix.weighting import Weighting
from tests.expert_store.matrix.repair_cases import moment, residual, row_weights

SHAPES = [(64, 64), (64, 192), (192, 64), (128, 128)]


def left_after(matrix: torch.Tensor, rank: int, weighting: Weighting) -> torch.Tensor:
    left, right = weighted_svd(matrix, rank, weighting)
    assert (left.shape, right.shape) == ((matrix.shape[0], rank), (rank, matrix.shape[1]))
    return matrix - left @ right


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 16, 64])
def test_it_is_the_best_of_its_rank(rows: int, cols: int, rank: int) -> None:
    matrix, second, rows_weight = residual(rows, cols), moment(cols), row_weights(rows)
    weighting = Weighting.of(second, rows_weight)
    values, vectors = torch.linalg.eigh(second.values.double())
    heard = rows_weight.double().sqrt()[:, None] * matrix.double()
    heard = heard @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    singular = torch.linalg.svdvals(heard)
    least = float(singular[rank:].square().sum())
    found = weighted_error(left_after(matrix, rank, weighting), second, rows_weight)
    assert found == pytest.approx(least, rel=1e-3, abs=1e-5 * float(singular.square().sum()))


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_the_singular_values_are_split_evenly(rows: int, cols: int) -> None:
    matrix = residual(rows, cols)
    left, right = weighted_svd(matrix, 16, Weighting.of())
    root = torch.linalg.svdvals(matrix)[:16].sqrt()
    torch.testing.assert_close(left.norm(dim=0), root, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(right.norm(dim=1), root, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("second", [None, Moment.identity(192)], ids=["none", "identity"])
def test_without_a_moment_it_is_the_svd(second: Moment | None) -> None:
    matrix = residual(64, 192)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    left, right = weighted_svd(matrix, 16, Weighting.of(second))
    torch.testing.assert_close(left @ right, (u[:, :16] * s[:16]) @ v[:16], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 16, 48])
@pytest.mark.parametrize("tokens", [20, 1000], ids=["rank-deficient", "full"])
def test_weighting_is_no_worse_where_it_counts(rank: int, tokens: int) -> None:
    matrix, second = residual(128, 192), moment(192, tokens)
    weighted = weighted_error(left_after(matrix, rank, Weighting.of(second)), second)
    plain = weighted_error(left_after(matrix, rank, Weighting.of()), second)
    assert weighted <= plain * (1 + 1e-4)
    if rank == 16 and tokens == 1000:
        assert weighted < 0.9 * plain  # or the test could not tell them apart


def test_more_rank_never_hurts() -> None:
    matrix, second = residual(128, 192), moment(192)
    errors = [
        weighted_error(left_after(matrix, rank, Weighting.of(second)), second)
        for rank in range(0, 129, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * errors[0]


@pytest.mark.parametrize("rank", [-1, 65])
def test_rank_over_the_matrix(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank: got {rank}, expected 0 to 64 for \[64, 128\]"):
        weighted_svd(torch.zeros(64, 128), rank, Weighting.of())


@pytest.mark.parametrize("kind", ["noise", "structure"])
@pytest.mark.parametrize("rank", [16, 48])
def test_the_krylov_path_captures_99_percent(
    kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 64)
    matrix = torch.randn(320, 640, generator=torch.Generator().manual_seed(0))
    if kind == "structure":
        matrix = matrix @ torch.diag(torch.linspace(0.2, 2, 640)) + 5 * residual(320, 640)
    exact = float(torch.linalg.svdvals(matrix)[:rank].square().sum())
    basis = leading_basis(matrix, rank)[:, :rank]
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-4)
    captured = float((basis.T @ matrix).square().sum())
    assert 0.99 * exact < captured < 1.0001 * exact
    assert torch.equal(basis, leading_basis(matrix, rank)[:, :rank])


def test_the_krylov_path_goes_on_where_it_left_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 64)
    matrix, second = residual(256, 640), moment(640)
    weighting = Weighting.of(second)
    gains = {}
    for name in ("krylov", "exact"):
        if name == "exact":
            monkeypatch.setattr(low_rank, "EXACT_SIDE", 1024)
        finder, left, gains[name] = RankFinder(256, 640, weighting, FactorForm()), matrix, 0.0
        for _ in range(3):
            block = finder.next(left)
            assert block is not None
            left = left - block.dense()
            gains[name] += block.gain
    assert gains["krylov"] > 0.98 * gains["exact"]


FORMS = [
    FactorForm(3, "affine"),
    FactorForm(3, "symmetric"),
    FactorForm(2, "symmetric"),
    FactorForm(4, "affine"),
    FactorForm(1, "symmetric"),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_repair_what_they_say(form: FactorForm, weighted: bool) -> None:
    matrix = residual(192, 128)
    second, rows_weight = (moment(128), row_weights(192)) if weighted else (None, None)
    weighting = Weighting.of(second, rows_weight)
    finder, left, errors = RankFinder(192, 128, weighting, form), matrix, []
    for _ in range(4):
        errors.append(weighted_error(left, second, rows_weight))
        block = finder.next(left)
        assert block is not None
        assert (block.right.rows, block.right.cols) == (16, 128)
        assert (block.left_t.rows, block.left_t.cols) == (16, 192)
        assert {block.right.bits, block.left_t.bits} == {form.bits}
        assert {block.right.grid, block.left_t.grid} == {form.grid}
        left = left - block.dense()
        after = weighted_error(left, second, rows_weight)
        assert block.gain == pytest.approx(errors[-1] - after, rel=1e-3)
        assert block.gain > 0
    # The first block holds the part of rank 4; a factor of 1 bit cannot follow it.
    assert form.bits == 1 or errors[0] - errors[1] > 1.5 * (errors[1] - errors[2])


def test_few_bits_keep_most_of_the_repair() -> None:
    matrix, second = residual(128, 192), moment(192)
    weighting = Weighting.of(second)
    left, right = weighted_svd(matrix, 16, weighting)
    exact = weighting.error(matrix) - weighting.error(matrix - left @ right)
    shares = {}
    for bits in (1, 2, 3, 4):
        block = RankFinder(128, 192, weighting, FactorForm(bits)).next(matrix)
        assert block is not None
        shares[bits] = block.gain / exact
    assert 0.5 < shares[1] < shares[2] < shares[3] < shares[4] <= 1
    assert shares[2] > 0.85
    assert shares[3] > 0.95


def test_rounding_one_factor_for_the_other_pays() -> None:
    matrix, weighting = residual(128, 192), Weighting.of(moment(192))
    gains = []
    for sweeps in (1, 3):
        block = RankFinder(128, 192, weighting, FactorForm(2, sweeps=sweeps)).next(matrix)
        assert block is not None
        gains.append(block.gain)
    assert gains[1] > gains[0]


@pytest.mark.parametrize("second", [None, moment(128), Moment(torch.zeros(2, 64, 64))], ids=str)
def test_of_nothing_there_is_no_block(second: Moment | None) -> None:
    finder = RankFinder(64, 128, Weighting.of(second), FactorForm())
    assert finder.next(torch.zeros(64, 128)) is None


def test_a_single_direction_is_one_block() -> None:
    one = torch.outer(torch.arange(64.0), torch.linspace(-1, 1, 128))
    finder = RankFinder(64, 128, Weighting.of(), FactorForm(3, "affine"))
    block = finder.next(one)
    assert block is not None
    assert block.dense().isfinite().all()
    assert (one - block.dense()).norm() < 0.1 * one.norm()


@pytest.mark.parametrize(("rows", "cols"), [(48, 64), (64, 96)])
def test_sides_that_no_group_divides(rows: int, cols: int) -> None:
    with pytest.raises(ValueError, match=rf"got \[{rows}, {cols}\], rank blocks need multiples"):
        RankFinder(rows, cols, Weighting.of(), FactorForm())


def test_forms_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="factor bits: got 1, a affine grid has"):
        FactorForm(1, "affine")
    with pytest.raises(ValueError, match="sweeps: got 0"):
        FactorForm(sweeps=0)
