"""Goal: who gets a governed answer is told with what quality, and the operator sees the governor.

Method: the HTTP surface over a real engine whose governor was put on its last rung; a rendered
snapshot of made-up counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from cluster.metrics import render
from cluster.snapshot import ClusterSnapshot
from expert_store.types import RecordKind
from gpu_worker.config import WorkerConfig
from gpu_worker.cost_model import LayerCosts, LinkCost, RunCost
from gpu_worker.cost_table import CostTable
from gpu_worker.counters import StepCounters
from gpu_worker.governor import Governor
from gpu_worker.messages import WorkerStats
from gpu_worker.quality_ladder import quality_ladder
from tests.cluster.local_endpoint import Endpoint, running_endpoint
from tests.hand_store import build_store

BODY = {"model": "mini", "prompt": "The", "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def governor(tmp_path_factory: pytest.TempPathFactory) -> Governor:
    """On the last rung, with a target that nothing keeps."""
    folder: Path = tmp_path_factory.mktemp("store")
    manifest = build_store(folder, layers=(0,), experts=2, ffn=64)
    config = WorkerConfig(device="cpu", target_step_s=1e-9).resolve(manifest)
    table = CostTable(LayerCosts(LinkCost(1e6), RunCost(0.0)))
    governor = Governor(quality_ladder(config, manifest), table, target_s=1e-9)
    for _ in range(50):
        moved: dict[tuple[str, RecordKind], int] = {("disk", "factors"): 10**6}
        governor.decoded(1.0, StepCounters(wait_s=1.0, moved_bytes=moved), 1)
    assert governor.rung == governor.num_rungs - 1
    return governor


@pytest.fixture(scope="module")
def endpoint(governor: Governor) -> Iterator[Endpoint]:
    with running_endpoint(governor=governor) as running:
        yield running


def test_a_governed_answer_says_so(endpoint: Endpoint, governor: Governor) -> None:
    with httpx2.Client(base_url=endpoint.url, timeout=60) as http:
        whole = http.post("/v1/completions", json=BODY)
        stream = http.post("/v1/completions", json={**BODY, "stream": True})
        metrics = http.get("/metrics").text
    assert whole.headers["x-moetier-quality"] == str(governor.setting)
    assert f'"quality":"{governor.setting}"' in stream.text
    assert 'moetier_governor_knob{replica="local",knob="top_n"} 0' in metrics
    governed = next(line for line in metrics.splitlines() if line.startswith("moetier_governed_t"))
    assert float(governed.split()[-1]) > 0


def test_waiting_for_near_data_alone_costs_no_quality(tmp_path: Path) -> None:
    """Fewer compensators would send near data more pairs, not fewer."""
    manifest = build_store(tmp_path, layers=(0,), experts=2, ffn=64)
    config = WorkerConfig(device="cpu", target_step_s=1e-3).resolve(manifest)
    table = CostTable(LayerCosts(LinkCost(1e6), RunCost(0.0)))
    governor = Governor(quality_ladder(config, manifest), table, target_s=1e-3)
    for _ in range(50):
        governor.decoded(1.0, StepCounters(wait_s=0.9, near_wait_s=0.9), 1)
    assert governor.rung == 0


@pytest.mark.parametrize("fetches_itself", [False, True])
def test_whose_own_thread_fetches_waits_as_long_as_its_copies_take(
    tmp_path: Path, fetches_itself: bool
) -> None:
    """It waits some microseconds at most: what it fetched is there when it asks for it."""
    manifest = build_store(tmp_path, layers=(0,), experts=2, ffn=64)
    config = WorkerConfig(device="cpu", target_step_s=1e-3).resolve(manifest)
    table = CostTable(LayerCosts(LinkCost(1e6), RunCost(0.0)))
    governor = Governor(
        quality_ladder(config, manifest), table, target_s=1e-3, fetches_itself=fetches_itself
    )
    counters = StepCounters(wait_s=2e-6, moved_bytes={("disk", "factors"): 10**6})
    for _ in range(50):
        governor.decoded(1.0, counters, 1)
    assert (governor.rung > 0) == fetches_itself


def test_predicted_and_real_seconds_are_metrics_side_by_side() -> None:
    stats = WorkerStats("r", 0, 0, 0, counters={"predicted_s": 1.5, "layer_s": 2.0})
    text = render(ClusterSnapshot((), (stats,), ()))
    assert 'moetier_predicted_seconds_total{replica="r"} 1.5' in text
    assert 'moetier_layer_seconds_total{replica="r"} 2' in text
    assert "moetier_governor_knob{" not in text
