"""Goal: Serve, driven by our policy from custom metrics alone, goes up and comes down again.

Method: a real local cluster and a deployment whose gauges the test sets by hand; no request load,
so that only our three metrics can have moved the replica count.
"""

from __future__ import annotations

import time

import pytest

from cluster.autoscaling import (
    POLICY_IMPORT_PATH,
    RUNNING_SEQUENCES,
    WAITING_SEQUENCES,
    WAITING_TOKENS,
)

DEADLINE_S = 40


def wait_for(condition, what: str, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    seen = None
    while time.monotonic() < end:
        seen = condition()
        if seen is True:
            return
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {deadline_s} s, last seen {seen!r}")


@pytest.fixture
def local_ray(monkeypatch):
    """A cluster of this test's own, with metric intervals short enough for a test."""
    import ray
    from ray import serve

    for name in ("REPLICA", "HANDLE"):
        monkeypatch.setenv(f"RAY_SERVE_{name}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    serve.shutdown()
    ray.shutdown()


@pytest.mark.ray
def test_policy_drives_serve_up_and_down(local_ray) -> None:
    from ray import serve

    @local_ray.remote(num_cpus=0)
    class Load:
        """What the replicas report, set by the test."""

        def __init__(self) -> None:
            self.gauges = {RUNNING_SEQUENCES: 0.0, WAITING_SEQUENCES: 0.0, WAITING_TOKENS: 0.0}

        def set(self, **gauges: float) -> None:
            self.gauges.update(gauges)

        def get(self) -> dict[str, float]:
            return self.gauges

    load = Load.remote()

    @serve.deployment(
        ray_actor_options={"num_cpus": 0},
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 2,
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
            "look_back_period_s": 1.5,
            "metrics_interval_s": 0.5,
            "policy": {
                "policy_function": POLICY_IMPORT_PATH,
                "policy_kwargs": {
                    "sequences_per_replica": 4,
                    "waiting_tokens_per_replica": 100,
                    "upscale_delay_s": 0.5,
                    "downscale_delay_s": 0.5,
                },
            },
        },
    )
    class Worker:
        async def __call__(self) -> str:
            return "ok"

        async def record_autoscaling_stats(self) -> dict[str, float]:
            return await load.get.remote()

    handle = serve.run(Worker.bind(), name="policy-test", route_prefix=None)
    assert handle.remote().result(timeout_s=20) == "ok"

    def running_replicas() -> int:
        deployment = serve.status().applications["policy-test"].deployments["Worker"]
        return deployment.replica_states.get("RUNNING", 0)

    assert running_replicas() == 1
    # 3 sequences against a target of 4 would leave one replica; 101 tokens against 100 ask for two.
    local_ray.get(load.set.remote(**{RUNNING_SEQUENCES: 3.0, WAITING_TOKENS: 101.0}))
    wait_for(lambda: running_replicas() == 2 or running_replicas(), "scale up on waiting tokens")

    local_ray.get(load.set.remote(**{RUNNING_SEQUENCES: 0.0, WAITING_TOKENS: 0.0}))
    wait_for(lambda: running_replicas() == 1 or running_replicas(), "scale down when idle")
