"""Goal: the rendered RayService, run as the operator would run it, answers over HTTP.

Method: no Kubernetes, so each of its pods is a host of its own on this machine (namespaces), with
the manifest's `ray start` parameters, labels, volumes, init containers, Secrets and Serve config;
`python -m benchmarks.deploy_try` does the same for a reader. Changed are the device and threads.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.deploy_parts.asking import Asked
from benchmarks.deploy_parts.pods import (
    Pod,
    Volumes,
    environment,
    fit_this_machine,
    overlay_pods,
    ray_command,
    script,
    service_names,
)
from benchmarks.deploy_parts.trial import Report, Trial
from benchmarks.deploy_try import OVERLAYS, WORK_ROOT, attempt, check_tools, page
from benchmarks.offload_parts.hosts import HostsUnavailable
from cluster.manifests import serve_config
from cluster.stores import bundled_store, compressed_store
from expert_store.config import CompressionConfig
from expert_store.format import load_manifest
from models import MIXTRAL_MINI

HA = "deploy/overlays/gpu-ha"
ROLL_S = 240
SECRETS = {"moetier-redis": {"password": "a-password"}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bundled model's store is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def ha(rendered):
    """(documents of gpu-ha, its RayService, its pods by name)."""
    documents = rendered[HA]
    (service,) = [each for each in documents if each["kind"] == "RayService"]
    return documents, service, {pod.name: pod for pod in overlay_pods(documents, service)}


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    return Volumes(tmp_path, {"moetier-store": tmp_path / "claim"}, SECRETS)


def test_there_are_as_many_pods_as_there_are_at_least(ha) -> None:
    _, _, pods = ha
    assert list(pods) == ["moetier-redis", "head", "memory-1", "memory-2", "gpu-1", "gpu-2"]


def test_a_groups_parameters_labels_and_limits_go_to_ray(ha) -> None:
    _, service, pods = ha
    cluster = service["spec"]["rayClusterConfig"]
    words = ray_command(pods["gpu-1"], cluster, "10.0.0.9").split()
    assert words[:2] == ["ray", "start"]
    assert "--address=head:6379" in words
    assert "--num-gpus=1" in words
    assert "--num-cpus=8" in words
    assert f"--memory={48 << 30}" in words
    assert "--labels=moetier.io/worker=true" in words
    assert "--min-worker-port=10002" in words
    head = ray_command(pods["head"], cluster, "10.0.0.1")
    assert "--num-cpus=0" in head
    assert head.endswith('--redis-password="$REDIS_PASSWORD"'), "from its environment"


def test_the_operators_variables_are_set(ha, volumes) -> None:
    _, service, pods = ha
    cluster = service["spec"]["rayClusterConfig"]
    head = environment(pods["head"], cluster, volumes, "a-token")
    assert head["RAY_REDIS_ADDRESS"] == "moetier-redis:6379"
    assert (head["REDIS_PASSWORD"], head["RAY_AUTH_TOKEN"]) == ("a-password", "a-token")
    assert "RAY_REDIS_ADDRESS" not in environment(pods["gpu-1"], cluster, volumes, "a-token")
    assert environment(pods["moetier-redis"], cluster, volumes, "a-token") == {}


def test_volumes_are_mounted_before_init_containers_run(ha, volumes) -> None:
    _, _, pods = ha
    lines = script(pods["memory-2"], volumes, "ray start").splitlines()
    shared = lines.index(f"mount --bind {volumes.folder}/claim /var/lib/moetier/shared")
    own = lines.index(f"mount --bind {volumes.folder}/disks/memory-2/store /var/lib/moetier/stores")
    copied = next(i for i, line in enumerate(lines) if line.startswith("bash -c"))
    closed = lines.index("mount -o remount,bind,ro /var/lib/moetier/stores")
    assert max(shared, own) < copied < closed
    assert lines[-1] == "exec ray start"
    assert f"mount --bind {volumes.folder}/secrets/moetier-redis /run/secrets/redis" in lines


def test_services_lead_to_their_pods(ha) -> None:
    documents, _, pods = ha
    addresses = {name: f"10.0.0.{number}" for number, name in enumerate(pods)}
    names = service_names(documents, tuple(pods.values()), addresses)
    assert names["moetier-redis"] == addresses["moetier-redis"]
    assert names["memory-2"] == addresses["memory-2"]


def test_only_what_the_machine_lacks_is_changed(ha) -> None:
    _, service, _ = ha
    config = serve_config(service)
    before = yaml.safe_dump(config)
    changes = list(fit_this_machine(config))
    assert changes == ['`args.worker.device` "cuda" to "cpu"', "`args.ndp.num_threads` 6 to 1"]
    config["applications"][0]["args"]["worker"]["device"] = "cuda"
    config["applications"][0]["args"]["ndp"]["num_threads"] = 6
    assert yaml.safe_dump(config) == before


def report(**changed: object) -> Report:
    pod = Pod("head", {}, {"containers": [{}]}, ("headGroupSpec: volumes",))
    whole = {
        "overlay": "cpu-local",
        "pods": (pod,),
        "changes": (),
        "started_s": 12.3,
        "replicas": {"Ingress": ("memory-1",)},
        "asked": (Asked("To be", False, " or"),),
    }
    return Report(**(whole | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, None),
        ({"asked": (Asked("To be", True, problem="status 503"),)}, "status 503"),
        ({"replicas": {"Ingress": ("head",)}}, "a workload on the head"),
        (
            {"asked": (Asked("The return statement", False, "a"),
                       Asked("The return statement", True, "b"))},
            "answered in 2 ways",
        ),
    ],
)  # fmt: skip
def test_a_report_tells_what_is_not_as_promised(changed, problem: str | None) -> None:
    made = report(**changed)
    assert len(made.problems) == (0 if problem is None else 1)
    assert (problem or "| nothing |") in page([made])
    assert "| head | headGroupSpec: volumes |" in page([made])


def skip_where_there_are_no_hosts() -> None:
    try:
        check_tools()
    except HostsUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifest_runs_and_answers(
    overlay: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_there_are_no_hosts()
    monkeypatch.setenv("MOETIER_CACHE", str(cache))
    tried = attempt(overlay, requests=12)
    assert tried.problems == ()
    assert len(tried.asked) == 12
    assert all(each.text for each in tried.asked)
    assert set(tried.replicas) == {"TierManager", "GpuWorker", "Ingress"}
    group = "memory" if overlay == "cpu-local" else "gpu"
    assert all(name.startswith(group) for name in tried.replicas["GpuWorker"])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_what_rollout_prints_rolls_a_store_in_and_fails_no_request(
    rendered, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As deploy/OPERATING.md tells: ask a memory pod, add what it prints, apply; take it out."""
    skip_where_there_are_no_hosts()
    monkeypatch.setenv("MOETIER_CACHE", str(cache))
    documents = rendered["deploy/overlays/gpu-small"]
    with (
        tempfile.TemporaryDirectory(prefix="moetier-deploy-", dir=WORK_ROOT) as folder,
        Trial("gpu-small", documents, bundled_store(), Path(folder)) as trial,
    ):
        trial.start()
        before = trial.model()["version"]
        newer = compressed_store(MIXTRAL_MINI, CompressionConfig("fast"))
        shutil.copytree(newer, Path(folder) / "claim" / "model-2")
        store = "/var/lib/moetier/stores/model-2"
        printed = yaml.safe_load(trial.execute("memory-1", "moetier", "rollout", "--print", store))
        changed = copy.deepcopy(trial.config)
        (application,) = changed["applications"]
        parts = {part["name"]: part for part in application["deployments"]}
        for part in printed["deployments"]:
            parts[part["name"]] = {**parts.get(part["name"], {}), **part}
        application["deployments"] = list(parts.values())

        trial.put(changed)
        after = load_manifest(newer).version
        ask_until_it_serves(trial, after)
        trial.put(trial.config)
        ask_until_it_serves(trial, before)


def ask_until_it_serves(trial: Trial, version: str) -> None:
    """Requests one batch after another, each answered, until that version has answered some."""
    end = time.monotonic() + ROLL_S
    while trial.model()["version"] != version:
        assert time.monotonic() < end, trial.model()
        assert [each.problem for each in trial.ask(4) if each.problem] == []
    assert [each.problem for each in trial.ask(4) if each.problem] == []
