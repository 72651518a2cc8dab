"""Goal: a moment is the mean of x x^T, however it is summed, cut, shrunk or filed.

Method: compare with the definition in float64, and with what shrinking must do at its ends.
"""

from __future__ import annotations

import pytest
import torch

from expert_store.matrix import moments
from expert_store.matrix.moments import Moment, MomentSum


def inputs(tokens: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs of unequal energy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5
    return x @ mix * torch.linspace(0.1, 3.0, cols)


def moment_of(x_TK: torch.Tensor) -> Moment:
    total = MomentSum(x_TK.shape[1])
    total.add(x_TK)
    return total.moment()


def test_batches_add_up_to_the_mean() -> None:
    x = inputs(300, 128)
    total = MomentSum(128)
    for part in x.split(70):
        total.add(part)
    expected = (x.double().T @ x.double() / 300).float()
    assert total.count == 300
    torch.testing.assert_close(total.moment().values, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total.moment().diagonal(), expected.diagonal(), rtol=1e-4, atol=1e-5)


def test_merged_sums_are_the_sum_over_all_tokens() -> None:
    x = inputs(100, 64)
    one, two = MomentSum(64), MomentSum(64)
    one.add(x[:30])
    two.add(x[30:])
    one.merge(two)
    assert one.count == 100
    torch.testing.assert_close(one.moment().values, moment_of(x).values)


def test_wide_inputs_keep_only_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(50, 192)
    full = moment_of(x)
    monkeypatch.setattr(moments, "FULL_INPUTS", 128)
    block = moment_of(x)
    assert full.is_full
    assert not block.is_full
    assert (full.cols, block.cols) == (192, 192)
    torch.testing.assert_close(block.values, full.block_diagonal())
    torch.testing.assert_close(full.blocks_only().values, full.block_diagonal())
    torch.testing.assert_close(full.values[64:128, 64:128], full.block_diagonal()[1])
    torch.testing.assert_close(block.diagonal(), full.diagonal())
    assert torch.equal(Moment.identity(192).values, torch.eye(64).expand(3, 64, 64))


def test_no_token_is_a_zero_moment() -> None:
    assert torch.equal(MomentSum(64).moment().values, torch.zeros(64, 64))


def test_no_token_shrinks_to_the_pool_and_many_stay() -> None:
    pooled, own = moment_of(inputs(2000, 64)), moment_of(inputs(500, 64, seed=1))
    torch.testing.assert_close(own.shrunk(pooled, 0).values, pooled.values)
    torch.testing.assert_close(own.shrunk(pooled, 64).values, (own.values + pooled.values) / 2)
    torch.testing.assert_close(own.shrunk(pooled, 1e9).values, own.values)


def test_shrinking_to_the_diagonal_keeps_it() -> None:
    own = moment_of(inputs(30, 128))
    for moment in (own, own.blocks_only()):
        shrunk = moment.shrunk_to_diagonal(128)
        torch.testing.assert_close(shrunk.diagonal(), own.diagonal())
        off_diagonal = shrunk.values - torch.diag_embed(shrunk.values.diagonal(dim1=-2, dim2=-1))
        expected = moment.values - torch.diag_embed(moment.values.diagonal(dim1=-2, dim2=-1))
        torch.testing.assert_close(off_diagonal, expected / 2)


@pytest.mark.parametrize("tokens", [20, 100, 1000])
def test_a_small_sample_of_the_pool_comes_nearer_to_the_truth(tokens: int) -> None:
    x = inputs(20000, 64)
    truth, sample = moment_of(x), moment_of(x[:tokens])
    pooled = moment_of(x[10000:])

    def distance(moment: Moment) -> float:
        return float((moment.values - truth.values).norm())

    assert distance(sample.shrunk(pooled, tokens)) < distance(sample)


def test_a_sample_smaller_than_its_width_gets_full_rank() -> None:
    sample = moment_of(inputs(20, 64))
    assert int(torch.linalg.matrix_rank(sample.values)) == 20
    assert int(torch.linalg.matrix_rank(sample.shrunk_to_diagonal(20).values)) == 64


@pytest.mark.parametrize("cols", [64, 192])
@pytest.mark.parametrize("full", [True, False])
def test_a_packed_moment_comes_back(cols: int, full: bool) -> None:
    moment = moment_of(inputs(40, cols))
    moment = moment if full or cols == 64 else moment.blocks_only()
    packed = moment.packed()
    assert packed.numel() <= moment.values.numel() * 0.51 + cols
    back = Moment.from_packed(packed, cols)
    torch.testing.assert_close(back.values, moment.values)
    assert torch.equal(back.values, back.values.mT)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="moment: expected float32"):
        Moment(torch.eye(65))
    with pytest.raises(ValueError, match="moment: expected float32"):
        Moment(torch.eye(64, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected a positive multiple of 64, got 100"):
        MomentSum(100)
    with pytest.raises(ValueError, match=r"expected \[tokens, 64\]"):
        MomentSum(64).add(torch.zeros(3, 128))
    with pytest.raises(ValueError, match="expected finite values"):
        MomentSum(64).add(torch.full((1, 64), float("nan")))
    with pytest.raises(ValueError, match="expected a sum over 64 inputs, got 128"):
        MomentSum(64).merge(MomentSum(128))
    with pytest.raises(ValueError, match="pooled: expected the shape"):
        Moment.identity(64).shrunk(Moment.identity(128), 3)
    with pytest.raises(ValueError, match="expected a number of tokens, got -1"):
        Moment.identity(64).shrunk(Moment.identity(64), -1)
    with pytest.raises(ValueError, match="do not fit 128 inputs"):
        Moment.from_packed(torch.zeros(7), 128)


def test_sums_made_while_a_model_runs_can_be_merged_later() -> None:
    with torch.inference_mode():
        one, two = MomentSum(64), MomentSum(64)
        one.add(inputs(10, 64))
        two.add(inputs(20, 64, seed=1))
    one.merge(two)
    assert one.moment().values.isfinite().all()
    assert one.count == 30
