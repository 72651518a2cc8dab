"""Goal: factors are the residual's truncated SVD, quantised, in falling order of what they repair.

Method: against torch.linalg.svd; the claimed energy against the residual that is really left.
"""

from __future__ import annotations

import pytest
import torch

from expert_store.matrix.paper import in_order, svd_repairs, truncated_svd


def residual(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(rows, 8, generator=generator) @ torch.randn(8, cols, generator=generator)
    return 0.02 * (0.3 * low + torch.randn(rows, cols, generator=generator))


@pytest.mark.parametrize(("rows", "cols"), [(64, 192), (192, 64), (128, 128)])
@pytest.mark.parametrize("rank", [0, 1, 16, 64])
def test_truncated_svd_is_exact(rows: int, cols: int, rank: int) -> None:
    matrix = residual(rows, cols)
    left, right = truncated_svd(matrix, rank)
    assert (left.shape, right.shape) == ((rows, rank), (rank, cols))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(left @ right, best, rtol=1e-3, atol=1e-5)
    # U sqrt(S) and sqrt(S) V: both sides carry the same energy, rank by rank.
    torch.testing.assert_close(left.norm(dim=0), s[:rank].sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right.norm(dim=1), s[:rank].sqrt(), rtol=1e-4, atol=1e-5)


def test_svd_of_nothing_and_of_little() -> None:
    left, right = truncated_svd(torch.zeros(64, 128), 16)
    assert torch.equal(left @ right, torch.zeros(64, 128))
    one = torch.outer(torch.arange(64.0), torch.ones(128))
    left, right = truncated_svd(one, 16)
    assert left.isfinite().all()
    assert right.isfinite().all()
    torch.testing.assert_close(left @ right, one, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [-1, 65, 1024])
def test_rank_over_the_matrix(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank: got {rank}, expected 0 to 64 for \[64, 128\]"):
        truncated_svd(torch.zeros(64, 128), rank)


def test_rank_that_is_no_whole_block() -> None:
    with pytest.raises(ValueError, match="rank: got 24, expected a multiple of 16"):
        svd_repairs(torch.zeros(64, 64), 24, 3)


@pytest.mark.parametrize("factor_bits", [2, 3, 4])
def test_blocks_repair_what_they_say(factor_bits: int) -> None:
    matrix = residual(192, 128)
    left_over = matrix.clone()
    blocks = svd_repairs(matrix, 64, factor_bits)
    assert len(blocks) == 4
    for item in blocks:
        without = matrix - item.dense()
        repaired = float(matrix.square().sum() - without.square().sum())
        assert item.gain == pytest.approx(repaired, rel=1e-3)
        left_over -= item.dense()
        assert (item.right.rows, item.right.cols) == (16, 128)
        assert (item.left_t.rows, item.left_t.cols) == (16, 192)
        assert item.right.bits == item.left_t.bits == factor_bits
    # The first block holds the eight strong directions: most of what rank 64 can win.
    assert blocks[0].gain > 2 * blocks[1].gain
    assert left_over.norm() < 0.9 * matrix.norm()


def test_three_bits_keep_most_of_the_repair() -> None:
    matrix = residual(128, 192)
    left, right = truncated_svd(matrix, 16)
    exact = float(matrix.square().sum() - (matrix - left @ right).square().sum())
    quantised = svd_repairs(matrix, 16, 3)[0].gain
    assert 0.85 * exact < quantised <= exact


def test_order_is_by_repaired_energy() -> None:
    weak = svd_repairs(0.5 * residual(64, 128, seed=1), 32, 3)
    strong = svd_repairs(residual(64, 128, seed=2), 32, 3)
    ordered = in_order(weak + strong)
    energies = [item.gain for item in ordered]
    assert energies == sorted(energies, reverse=True)
    assert ordered[0] is strong[0]
    assert sorted(map(id, ordered)) == sorted(map(id, weak + strong))


def test_rank_zero_has_no_blocks() -> None:
    assert svd_repairs(residual(64, 64), 0, 3) == []
