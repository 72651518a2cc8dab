"""Goal: the rendered RayService, run as the operator would run it, answers over HTTP.

Method: no Kubernetes, so its pods are Ray nodes of one local cluster with the manifest's own
labels, CPUs and number of pods: the head first, then serveConfigV2 put to the dashboard, and only
then the worker groups, because that is the order in which pods come up. Changed are ports and
paths; a GPU worker runs on the CPU; object stores are small, and a near-data worker has one thread.
A real Redis stands in for the one beside the cluster, as directory (not for Ray's GCS).
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.manifests import serve_config
from cluster.operator_rules import template
from cluster.pod_rules import quantity
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from models import MIXTRAL_MINI

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("cpu-local", "gpu-small", "gpu-ha")
MAX_STORE_BYTES = 200_000_000
DEADLINE_S = 180
NO_NODE_S = 20
"""How long the memory node stays away; a tier manager on the head would fail meanwhile."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def call(url: str, body: object = None, *, method: str | None = None) -> Any:
    """The JSON answer, or the HTTP status when it is an error."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        return error.code
    return json.loads(text) if text else None


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "model"
    compress(MIXTRAL_MINI, folder, CompressionConfig(recipe="paper"), jobs=2)
    return folder


@pytest.fixture
def redis(tmp_path) -> Iterator[tuple[int, Path]]:
    """(port of a Redis of this machine, the file with its password)."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("redis-server is not installed, and this overlay keeps its directory there")
    port, password = free_port(), tmp_path / "password"
    password.write_text("a-test-password")
    words = [server, "--port", str(port), "--requirepass", password.read_text(), "--save", ""]
    process = subprocess.Popen([*words, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    yield port, password
    process.terminate()
    process.wait(30)


@pytest.fixture(params=OVERLAYS)
def head(request, rendered, monkeypatch):
    """(cluster of the manifest's head alone, the RayService, the dashboard's URL)."""
    documents = rendered[f"deploy/overlays/{request.param}"]
    (rayservice,) = [each for each in documents if each["kind"] == "RayService"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the image has moetier installed
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the operator's token is not there
    from ray.cluster_utils import Cluster

    params = rayservice["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]
    port = free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": int(params["num-cpus"]),
            "object_store_memory": min(MAX_STORE_BYTES, int(params["object-store-memory"])),
            "include_dashboard": True,
            "dashboard_port": port,
        },
    )
    url = f"http://127.0.0.1:{port}"
    yield cluster, rayservice, url
    call(f"{url}/api/serve/applications/", method="DELETE")
    cluster.shutdown()


def add_worker_groups(cluster: Any, rayservice: dict[str, Any]) -> None:
    """Every group with as many nodes as it has pods at least."""
    for group in rayservice["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        limits = template(group)["containers"][0]["resources"]["limits"]
        for _ in range(group["minReplicas"]):
            cluster.add_node(
                num_cpus=int(quantity(limits["cpu"])),
                object_store_memory=min(
                    MAX_STORE_BYTES, int(group["rayStartParams"]["object-store-memory"])
                ),
                labels=group["labels"],
            )


def fit_this_machine(args: dict[str, Any], store: Path, redis: tuple[int, Path] | None) -> None:
    """What of the config a machine without GPU, volume and Kubernetes' names cannot have."""
    args["store"]["path"] = str(store)
    args["ndp"]["num_threads"] = 1
    args["worker"]["device"], args["replicas"]["num_gpus"] = "cpu", 0
    if redis is not None:
        port, password = redis
        args["directory"]["redis_url"] = f"redis://127.0.0.1:{port}/1"
        args["directory"]["password_file"] = str(password)


def until(condition, what: str) -> Any:
    """The first true value of condition(), asked every second."""
    end, seen = time.monotonic() + DEADLINE_S, None
    while time.monotonic() < end:
        seen = condition()
        if seen:
            return seen
        time.sleep(1)
    raise AssertionError(f"{what}: not within {DEADLINE_S} s, last seen {seen!r}")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_manifest_runs_and_answers(head, store, request) -> None:
    cluster, rayservice, dashboard = head
    config = serve_config(rayservice)
    config["http_options"] = {**config["http_options"], "host": "127.0.0.1", "port": free_port()}
    (application,) = config["applications"]
    uses_redis = application["args"].get("directory", {}).get("kind") == "redis"
    redis = request.getfixturevalue("redis") if uses_redis else None
    fit_this_machine(application["args"], store, redis)
    application["args"]["http"]["port"] = config["http_options"]["port"]

    def status() -> dict[str, Any]:
        return call(f"{dashboard}/api/serve/applications/")["applications"].get("moetier", {})

    until(lambda: call(f"{dashboard}/api/serve/applications/") not in (404, 503), "dashboard")
    call(f"{dashboard}/api/serve/applications/", config, method="PUT")
    until(lambda: status().get("status") == "DEPLOYING", "deploying without a worker node")
    time.sleep(NO_NODE_S)
    early = status()
    placed = [r for each in early["deployments"].values() for r in each["replicas"]]
    assert early["status"] == "DEPLOYING", early["message"]
    assert not [r for r in placed if r["node_id"]], "a tier manager without a node can only fail"
    add_worker_groups(cluster, rayservice)

    def running() -> bool:
        now = status()
        assert now.get("status") != "DEPLOY_FAILED", yaml.safe_dump(now)
        return now.get("status") == "RUNNING"

    until(running, "the application")
    deployments = status()["deployments"]
    assert set(deployments) == {"TierManager", "GpuWorker", "Ingress"}
    nodes = {r["node_id"] for each in deployments.values() for r in each["replicas"]}
    assert nodes <= {node.node_id for node in cluster.worker_nodes}, "a workload on the head"

    address = f"http://127.0.0.1:{config['http_options']['port']}"
    (model,) = call(f"{address}/v1/models")["data"]
    body = {"model": model["id"], "prompt": "The if statement", "max_tokens": 8, "temperature": 0}
    answer = call(f"{address}/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["text"].strip()
