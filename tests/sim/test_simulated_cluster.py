"""Goal: whatever breaks, every request ends by its deadline with the right tokens or a typed error,
nothing is leaked, and the cluster is whole again when all is healed.

Method: seeded runs of the whole cluster in this process on virtual time; a failing seed is named
and replayed with `python -m tests.sim --seed N`.
"""

from __future__ import annotations

import pytest

from tests.sim.assets import PROMPTS, Assets
from tests.sim.fault_plan import WEIGHTS, draw
from tests.sim.running import first_failure, run_seed

NUM_FIXED = 150
NUM_SLOW = 2000


def check(seeds: range, assets: Assets) -> None:
    failing = first_failure(seeds, assets)
    if failing is not None:
        seed = failing.plan.seed
        log = "\n".join(failing.events[-40:])
        pytest.fail(
            f"seed {seed} breaks {failing.problems}; replay it with "
            f"`python -m tests.sim --seed {seed} --shrink`\n{log}"
        )


def test_fixed_seeds_keep_every_promise(sim_assets: Assets) -> None:
    check(range(NUM_FIXED), sim_assets)


@pytest.mark.slow
def test_many_seeds_keep_every_promise(sim_assets: Assets) -> None:
    check(range(NUM_FIXED, NUM_FIXED + NUM_SLOW), sim_assets)


def test_a_seed_replays_to_the_same_log(sim_assets: Assets) -> None:
    for seed in (3, 11):
        first, again = run_seed(seed, sim_assets), run_seed(seed, sim_assets)
        assert first.events == again.events
        assert first.num_steps > 0


def test_fixed_seeds_have_faults_of_every_kind() -> None:
    plans = [draw(seed, num_prompts=len(PROMPTS)) for seed in range(NUM_FIXED)]
    assert {fault.kind for plan in plans for fault in plan.faults} == set(WEIGHTS)
    assert any(plan.spared and plan.faults for plan in plans)
    assert any(not plan.spared for plan in plans)
