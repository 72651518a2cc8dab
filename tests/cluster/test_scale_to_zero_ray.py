"""Goal: the last worker ends when nothing is asked, and the next request starts one.

Method: a real local cluster of the mini model with short delays; what it served is recorded and
read back as a trace.
"""

from __future__ import annotations

import time
from pathlib import Path

import httpx2
import pytest
from local_endpoint import wait_until

from cluster.config import config_from_mapping
from cluster.tune.trace_files import read_trace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

BODY = {"model": "mini", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def test_the_last_worker_goes_and_comes_back(
    mini_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cluster.app import start_local_cluster

    monkeypatch.setenv("MOETIER_CACHE", str(mini_cache))
    scaling = {
        "min_replicas": 0,
        "max_replicas": 1,
        "upscale_delay_s": 0,
        "downscale_delay_s": 2,
        "downscale_to_zero_delay_s": 2,
        "look_back_s": 2,
        "metrics_interval_s": 0.5,
    }
    config = config_from_mapping(
        {
            "model": "mini",
            "worker": {"max_sequences": 2, "max_context": 256},
            "replicas": {"autoscaling": scaling},
            "http": {"port": 0, "record_requests": str(tmp_path / "requests")},
        },
        source="test",
    )
    with (
        start_local_cluster(config) as running,
        httpx2.Client(base_url=running.address, timeout=180) as client,
    ):
        first = client.post("/v1/completions", json=BODY)
        assert first.status_code == 200, first.text

        def workers() -> list[str]:
            health = client.get("/health")
            assert health.status_code == 200, health.text
            return list(health.json()["workers"])

        wait_until(lambda: workers() == [], "the last worker has ended", 90)
        asked_at = time.monotonic()
        again = client.post("/v1/completions", json=BODY)
        assert again.status_code == 200, again.text
        assert again.json()["choices"] == first.json()["choices"]
        assert time.monotonic() - asked_at > 1  # it had to be started
        assert len(workers()) == 1
    trace = read_trace(tmp_path / "requests")
    assert [(r.prompt_tokens, r.answer_tokens) for r in trace.requests] == [(3, 4), (3, 4)]
