"""Goal: blocks come in falling order of error removed per byte, within limits, any prefix valid.

Method: errors really left after every prefix; budgets just at and just under a block's bytes; for
the merged order of several matrices, all orders of small lists of made-up blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from expert_store.matrix.loss import weighted_error
from expert_store.matrix.low_rank import FactorForm, RankRepair
from expert_store.matrix.planes import PlaneRepair, plane_bytes, plane_repair
from expert_store.matrix.repair import (
    Repair,
    RepairLimits,
    best_within,
    merged,
    repair_blocks,
    repairs_of_kinds,
)
from expert_store.matrix.weighting import Weighting
from kernels.types import block_bytes
from tests.expert_store.matrix.repair_cases import moment, residual, row_weights

RANK_BYTES = block_bytes(128, 192, 2, "symmetric")
PLANE_BYTES = plane_bytes(128, 192)


def letters(blocks: list[Repair]) -> str:
    return "".join("r" if isinstance(block, RankRepair) else "p" for block in blocks)


def test_every_prefix_repairs_what_it_says() -> None:
    matrix, second, rows_weight = residual(128, 192), moment(192), row_weights(128)
    weighting = Weighting.of(second, rows_weight)
    blocks = repair_blocks(matrix, weighting, RepairLimits(max_ranks=3, max_planes=2))
    assert sorted(letters(blocks)) == ["p", "p", "r", "r", "r"]
    before = weighted_error(matrix, second, rows_weight)
    for block in blocks:
        matrix = matrix - block.dense()
        after = weighted_error(matrix, second, rows_weight)
        assert block.gain == pytest.approx(before - after, rel=1e-3)
        assert after < before
        before = after


def test_worth_falls() -> None:
    weighting = Weighting.of(moment(192))
    blocks = repair_blocks(residual(128, 192), weighting, RepairLimits(max_ranks=5, max_planes=2))
    worth = [block.gain / block.num_bytes for block in blocks]
    for first, second in itertools.pairwise(worth):
        assert second < 1.02 * first


def test_noise_asks_for_a_plane_and_structure_for_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(256, 384, generator=generator)
    low = torch.randn(256, 48, generator=generator) @ torch.randn(48, 384, generator=generator)
    budget = plane_bytes(256, 384)
    assert letters(best_within(noise, Weighting.of(), budget)) == "p"
    of_structure = best_within(noise + low, Weighting.of(), budget)
    assert set(letters(of_structure)) == {"r"}
    assert budget - 4096 < sum(block.num_bytes for block in of_structure) <= budget


def test_planes_first_are_worth_the_bytes_that_rank_would_take() -> None:
    matrix, weighting = residual(128, 192), Weighting.of(moment(192))
    budget = 2 * PLANE_BYTES + RANK_BYTES
    limits = RepairLimits(max_bytes=budget)
    gain, greedy = (
        sum(block.gain for block in blocks)
        for blocks in (
            best_within(matrix, weighting, budget),
            repair_blocks(matrix, weighting, limits),
        )
    )
    assert gain >= greedy * (1 - 1e-6)
    assert best_within(matrix, weighting, RANK_BYTES - 1) == []


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, ""),
        (RANK_BYTES - 1, ""),
        (RANK_BYTES, "r"),
        (2 * RANK_BYTES + PLANE_BYTES, None),
    ],
)
def test_a_budget_is_never_exceeded(budget: int, expected: str | None) -> None:
    blocks = repair_blocks(
        residual(128, 192), Weighting.of(moment(192)), RepairLimits(max_bytes=budget)
    )
    assert sum(block.num_bytes for block in blocks) <= budget
    if expected is not None:
        assert letters(blocks) == expected
    else:
        assert budget - sum(block.num_bytes for block in blocks) < RANK_BYTES


def test_a_smaller_budget_gives_a_prefix() -> None:
    weighting = Weighting.of(moment(192))
    limits = [RepairLimits(max_ranks=num, max_planes=0) for num in (1, 3)]
    few, many = (repair_blocks(residual(128, 192), weighting, limit) for limit in limits)
    assert len(few) == 1
    assert isinstance(few[0], RankRepair)
    assert isinstance(many[0], RankRepair)
    assert torch.equal(few[0].right.data, many[0].right.data)
    assert torch.equal(few[0].left_t.data, many[0].left_t.data)


def test_kinds_come_as_asked_and_again_the_same() -> None:
    matrix, weighting = residual(128, 192), Weighting.of(moment(192))
    kinds = ("rank", "plane", "rank")
    first = repairs_of_kinds(matrix, weighting, kinds, factors=FactorForm(3, "affine"))
    again = repairs_of_kinds(matrix, weighting, kinds, factors=FactorForm(3, "affine"))
    assert letters(first) == "rpr"
    assert [block.gain for block in first] == [block.gain for block in again]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.dense(), other.dense())
    assert isinstance(first[0], RankRepair)
    assert (first[0].right.bits, first[0].right.grid) == (3, "affine")


def test_the_matrix_given_stays_as_it_is() -> None:
    matrix = residual(128, 192)
    before = matrix.clone()
    repairs_of_kinds(matrix, Weighting.of(), ("rank", "plane"))
    assert torch.equal(matrix, before)


def test_nothing_left_nothing_made() -> None:
    zero = torch.zeros(64, 64)
    assert repair_blocks(zero, Weighting.of(), RepairLimits(max_bytes=1 << 20)) == []
    assert repairs_of_kinds(zero, Weighting.of(), ("rank", "plane")) == []


def test_it_ends_when_no_block_gains() -> None:
    # 64 ranks are all there are: more than that repair only each other's rounding, and in the end
    # float32 holds no more.
    blocks = repair_blocks(
        residual(64, 64), Weighting.of(moment(64)), RepairLimits(max_ranks=40, max_planes=0)
    )
    assert all(block.gain > 0 for block in blocks)


def test_limits_that_end_nothing() -> None:
    with pytest.raises(ValueError, match="limits: without max_bytes"):
        RepairLimits(max_ranks=3)
    with pytest.raises(ValueError, match="max_planes: got -1"):
        RepairLimits(max_bytes=10, max_planes=-1)


def fake(template: PlaneRepair, gains: list[float]) -> list[Repair]:
    return [replace(template, gain=gain) for gain in gains]


def area(order: list[tuple[int, int]], gains: list[list[float]], weights: list[float]) -> float:
    """Error left, summed over the bytes sent so far (all blocks are of one size)."""
    left = total = sum(
        weight * gain for own, weight in zip(gains, weights, strict=True) for gain in own
    )
    area = 0.0
    for matrix, block in order:
        area += left
        left -= weights[matrix] * gains[matrix][block]
    assert left == pytest.approx(0, abs=1e-9 * total)
    return area


@pytest.mark.parametrize("seed", range(6))
def test_the_merged_order_is_the_best_that_keeps_each_matrix_in_order(seed: int) -> None:
    template = plane_repair(residual(16, 64), Weighting.of())
    assert template is not None
    generator = torch.Generator().manual_seed(seed)
    gains = [torch.rand(num, generator=generator).tolist() for num in (3, 2, 2)]
    weights = [1.0, 0.5, 2.0]
    order = merged([fake(template, own) for own in gains], weights)
    slots = set(itertools.permutations([0, 0, 0, 1, 1, 2, 2]))
    best = float("inf")
    for slot in slots:
        count = [0, 0, 0]
        candidate = []
        for matrix in slot:
            candidate.append((matrix, count[matrix]))
            count[matrix] += 1
        best = min(best, area(candidate, gains, weights))
    assert area(order, gains, weights) == pytest.approx(best)
    for matrix, own in enumerate(gains):
        assert [block for m, block in order if m == matrix] == list(range(len(own)))


def test_merging_little() -> None:
    template = plane_repair(residual(16, 64), Weighting.of())
    assert template is not None
    assert merged([], []) == []
    assert merged([[], fake(template, [1.0])], [1.0, 1.0]) == [(1, 0)]
    # Ties keep the order of the matrices.
    same = [fake(template, [1.0, 0.5]), fake(template, [1.0, 0.5])]
    assert merged(same, [1.0, 1.0]) == [(0, 0), (1, 0), (0, 1), (1, 1)]
