"""What every test shares: one torch thread, no Ray in unit tests, and the interpreter for
Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

# Before any import of triton or torch in a test module.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_ray_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("ray") is None and find_spec("ray") is not None:
        import ray

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("a unit test started Ray; mark it with @pytest.mark.ray")

        monkeypatch.setattr(ray, "init", refuse)
