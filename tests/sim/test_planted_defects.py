"""Goal: the simulator can fail: it finds every one of some typical defects within a few seeds.

Method: plant one defect at a time in the product's own classes (`tests/sim/mutations.py`).
"""

from __future__ import annotations

import pytest

from tests.sim.assets import Assets
from tests.sim.mutations import MUTATIONS, Mutation
from tests.sim.running import first_failure, run_plan, shrink

WITHIN = 40
"""Seeds."""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_defect_is_found(
    mutation: Mutation, sim_assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(mutation.owner, mutation.attribute)
    monkeypatch.setattr(mutation.owner, mutation.attribute, mutation.make(right))
    found = first_failure(range(WITHIN), sim_assets)
    assert found is not None, f"{WITHIN} seeds do not notice: {mutation.name}"
    monkeypatch.undo()
    assert not run_plan(found.plan, sim_assets).problems, "it fails without the defect too"


def test_a_failing_plan_is_shrunk(sim_assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left still fails, and each fault that is left is needed for that."""
    mutation = MUTATIONS[0]
    right = getattr(mutation.owner, mutation.attribute)
    monkeypatch.setattr(mutation.owner, mutation.attribute, mutation.make(right))
    found = first_failure(range(WITHIN), sim_assets)
    assert found is not None
    smallest = shrink(found, sim_assets)
    assert smallest.problems
    assert len(smallest.plan.faults) <= len(found.plan.faults)
    for fault in smallest.plan.faults:
        assert not run_plan(smallest.plan.without(fault), sim_assets).problems
