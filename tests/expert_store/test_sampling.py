"""Goal: every layer's curves are of its own height, whichever layers were measured whole.

Method: curves by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from expert_store.budget import Choice
from expert_store.choose import ExpertUse, prior_use
from expert_store.methods import METHODS
from expert_store.plan import MatrixPlan
from expert_store.sampling import MAX_WHOLE, Sample, choose_samples, curves_by_layer, probe
from expert_store.types import PROJECTIONS, ExpertKey, Projection

LOW, MIDDLE = MatrixPlan(2, "symmetric"), MatrixPlan(3, "symmetric")
REPAIRED = MatrixPlan(3, "symmetric", ("rank",))


def uses(layers: Sequence[int], favourite: int = 1) -> dict[ExpertKey, ExpertUse]:
    every = prior_use(4, 2)
    return {
        ExpertKey(layer, expert): replace(every, use_at_K=(0.9, 0.1))
        if expert == favourite
        else every
        for layer in layers
        for expert in range(4)
    }


def curve(middle: float) -> tuple[Choice, ...]:
    return (
        Choice(LOW, 100, 0, 4 * middle, 4 * middle),
        Choice(MIDDLE, 150, 0, middle, middle),
        Choice(REPAIRED, 150, 20, middle, middle / 2),
    )


def curves(middle: float) -> Mapping[Projection, Sequence[Choice]]:
    return {name: curve(middle * (i + 1)) for i, name in enumerate(PROJECTIONS)}


def point(middle: float) -> Mapping[Projection, Sequence[Choice]]:
    return {name: (curve(middle)[1],) for name in PROJECTIONS}


def test_every_layer_gives_its_most_used_expert_and_few_are_whole() -> None:
    samples = choose_samples(range(1, 31), uses(range(1, 31)))
    assert [sample.key for sample in samples] == [ExpertKey(layer, 1) for layer in range(1, 31)]
    whole = [sample.key.layer for sample in samples if sample.whole]
    assert len(whole) == MAX_WHOLE
    assert (whole[0], whole[-1]) == (1, 30)
    assert all(sample.whole for sample in choose_samples([0, 7], uses([0, 7])))


def test_a_probe_is_one_choice_of_the_recipe() -> None:
    for name in ("best", "fast", "mixed"):
        one = probe(METHODS[name])
        assert (len(one.bits), len(one.grids), one.repairs) == (1, 1, ())
        assert one.bits[0] in METHODS[name].bits
    assert probe(replace(METHODS["best"], bits=(2,))).bits == (2,)


def test_curves_go_through_the_layers_own_points() -> None:
    samples = [Sample(ExpertKey(0, 0), True), Sample(ExpertKey(1, 2), False)]
    samples += [Sample(ExpertKey(9, 0), True), Sample(ExpertKey(8, 1), False)]
    found = curves_by_layer(samples, [curves(0.01), point(0.05), curves(0.2), point(0.0)])
    assert found[0] == curves(0.01)
    for i, name in enumerate(PROJECTIONS):
        low, middle, repaired = found[1][name]
        assert (low.plan, repaired.plan) == (LOW, REPAIRED)
        assert middle.low_error == pytest.approx(0.05)
        assert low.low_error == pytest.approx(0.2)
        assert (repaired.low_error, repaired.restored_error) == pytest.approx((0.05, 0.025))
        assert found[9][name][1].low_error == pytest.approx(0.2 * (i + 1))
        assert all(choice.low_error == 0 for choice in found[8][name])


def test_a_sample_without_any_error_is_no_measure() -> None:
    samples = [Sample(ExpertKey(0, 0), True), Sample(ExpertKey(1, 0), False)]
    found = curves_by_layer(samples, [curves(0.0), point(0.05)])
    assert all(choice.low_error == 0 for name in PROJECTIONS for choice in found[1][name])
