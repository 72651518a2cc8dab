"""The store, the models and the right answers, made once for all simulated runs."""

from __future__ import annotations

import pytest

from tests.sim.assets import Assets, make_assets


@pytest.fixture(scope="session")
def sim_assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("sim") / "assets")
