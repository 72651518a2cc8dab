"""Goal: codes and repair made for each other are never worse than made one after the other.

Method: the loss of all uses against the plain order's, by share and kinds; errors said against
errors really left.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from expert_store.forms import BlockKind
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.joint import (
    Joint,
    quantize_jointly,
    quantize_milo,
    quantize_with_planes,
)
from expert_store.matrix.loss import weighted_error
from expert_store.matrix.low_rank import FactorForm, RankRepair
from expert_store.matrix.moments import Moment
from expert_store.matrix.planes import PlaneRepair
from expert_store.matrix.weighting import Weighting
from kernels.reference import dequantize
from kernels.types import QuantizedMatrix
from tests.expert_store.matrix.repair_cases import moment, row_weights, weight

KINDS: list[tuple[BlockKind, ...]] = [
    (),
    ("rank",),
    ("plane",),
    ("plane", "rank"),
    ("rank", "plane", "plane"),
]


def jointly(share: float, kinds: Sequence[BlockKind], rounds: int = 2) -> Joint:
    weighting = Weighting.of(moment(128), row_weights(64))
    return quantize_jointly(
        weight(64, 128),
        2,
        kinds,
        grid="symmetric",
        weighting=weighting,
        share=share,
        rounds=rounds,
    )


def check_says_what_is(values: torch.Tensor, found: Joint, second: Moment | None) -> None:
    rows_weight = row_weights(64)
    left = values - dequantize(found.codes)
    error = weighted_error(left, second, rows_weight)
    assert found.error == pytest.approx(error, rel=1e-4)
    for block in found.blocks:
        left = left - block.dense()
        after = weighted_error(left, second, rows_weight)
        assert block.gain == pytest.approx(error - after, rel=1e-3)
        assert block.gain > 0
        error = after
    assert found.restored_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_never_worse_than_the_plain_order(share: float, kinds: tuple[BlockKind, ...]) -> None:
    plain, joint = jointly(share, kinds, rounds=0), jointly(share, kinds)
    assert plain.rounds == 0
    assert joint.loss(share) <= plain.loss(share)
    check_says_what_is(weight(64, 128), joint, moment(128))
    made = ["plane" if isinstance(block, PlaneRepair) else "rank" for block in joint.blocks]
    assert sorted(made) == sorted(kinds)


def test_planes_are_worth_choosing_with_the_codes() -> None:
    plain, joint = jointly(0.5, ("plane",), rounds=0), jointly(0.5, ("plane",))
    assert joint.rounds > 0
    assert joint.loss(0.5) < 0.97 * plain.loss(0.5)
    assert joint.restored_error < 0.75 * plain.restored_error


def test_one_round_alone_is_that_round() -> None:
    kinds: tuple[BlockKind, ...] = ("plane", "plane")
    weighting = Weighting.of(moment(128), row_weights(64))
    alone = quantize_with_planes(
        weight(64, 128), 2, kinds, grid="symmetric", weighting=weighting, share=0.5
    )
    check_says_what_is(weight(64, 128), alone, moment(128))
    joint = jointly(0.5, kinds, rounds=1)
    assert joint.rounds == 1
    assert torch.equal(alone.codes.data, joint.codes.data)


def test_planes_come_first_whatever_is_asked() -> None:
    made = jointly(0.5, ("rank", "plane", "rank")).blocks
    assert [isinstance(block, PlaneRepair) for block in made] == [True, False, False]


def test_it_is_deterministic() -> None:
    one, other = jointly(0.5, ("plane", "rank")), jointly(0.5, ("plane", "rank"))
    assert torch.equal(one.codes.data, other.codes.data)
    for a, b in zip(one.blocks, other.blocks, strict=True):
        assert torch.equal(a.dense(), b.dense())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ValueError, match="share: got"):
        jointly(share, ("rank",))


def grid_codes(values: torch.Tensor) -> QuantizedMatrix:
    return quantize_grid(values, 2, grid="symmetric")


@pytest.mark.parametrize("rounds", [0, 1, 8])
def test_milo_is_never_worse_with_more_rounds(rounds: int) -> None:
    values, weighting = weight(64, 128), Weighting.of(None, row_weights(64))
    errors = []
    for limit in (0, rounds):
        found = quantize_milo(
            values, grid_codes, 2, weighting=weighting, factors=FactorForm(3), rounds=limit
        )
        errors.append(found.restored_error)
        assert found.rounds <= limit
        check_says_what_is(values, found, None)
        assert all(isinstance(block, RankRepair) for block in found.blocks)
    assert errors[1] <= errors[0]
    if rounds == 8:
        assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("tokens", [5, 500])
def test_poor_input_is_survived(tokens: int) -> None:
    values = torch.zeros(64, 64)
    weighting = Weighting.of(moment(64, tokens))
    found = quantize_jointly(
        values, 2, ("plane", "rank"), grid="symmetric", weighting=weighting, share=0.5
    )
    assert found.error == pytest.approx(0, abs=1e-9)
    assert dequantize(found.codes).isfinite().all()
