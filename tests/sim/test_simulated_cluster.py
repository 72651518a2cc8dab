"""Goal: whatever breaks, every request ends by its deadline with the right tokens or a typed error,
nothing is leaked, and the cluster is whole again when all is healed.

Method: seeded runs of the whole cluster in this process on virtual time (`tests/sim/simulation.py`);
a failing seed is named and replayed with `python -m tests.sim --seed N`.
"""

from __future__ import annotations

import pytest

from tests.sim.assets import Assets, make_assets
from tests.sim.running import first_failure, run_seed

NUM_FIXED = 150
NUM_SLOW = 2000


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("sim") / "assets")


def check(seeds: range, assets: Assets) -> None:
    failing = first_failure(seeds, assets)
    if failing is not None:
        seed = failing.plan.seed
        log = "\n".join(failing.events[-40:])
        pytest.fail(
            f"seed {seed} breaks {failing.problems}; replay it with "
            f"`python -m tests.sim --seed {seed} --shrink`\n{log}"
        )


def test_fixed_seeds_keep_every_promise(assets: Assets) -> None:
    check(range(NUM_FIXED), assets)


@pytest.mark.slow
def test_many_seeds_keep_every_promise(assets: Assets) -> None:
    check(range(NUM_FIXED, NUM_FIXED + NUM_SLOW), assets)


def test_a_seed_replays_to_the_same_log(assets: Assets) -> None:
    for seed in (3, 11):
        assert run_seed(seed, assets).events == run_seed(seed, assets).events
