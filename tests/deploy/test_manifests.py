"""Goal: what deploy/ renders is accepted by KubeRay, Kubernetes and Serve, and matches our code.

Method: kubectl kustomize, then strict schemas (KubeRay's CRDs, Kubernetes' own), the operator's
rules, Ray's ServeDeploySchema, our config parser; then every name and number that stands twice
is compared.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest

from cluster.app import APP_NAME, build
from cluster.autoscaling import POLICY_IMPORT_PATH, GpuWorkerPolicy
from cluster.commands import compress
from cluster.config import ClusterConfig, as_mapping, config_from_mapping
from cluster.manifests import document_problems, schema_problems, serve_config
from cluster.operator_rules import groups, template
from cluster.pod_rules import containers, pods, quantity
from cluster.settings import split_label
from expert_store.config import CompressionConfig
from expert_store.sources import resolve_model

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
THIRD_PARTY = ("redis", "rclone/rclone")
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def cluster_of(rayservice) -> dict:
    return rayservice["spec"]["rayClusterConfig"]


@pytest.fixture
def application(rayservice) -> dict:
    (application,) = serve_config(rayservice)["applications"]
    return application


@pytest.fixture
def config(application) -> ClusterConfig:
    return config_from_mapping(application["args"], source="serveConfigV2").resolve()


def test_nothing_is_found_wrong(documents, crds) -> None:
    assert document_problems(documents, crds) == []


def test_the_ray_document_was_really_checked(rayservice, crds) -> None:
    assert (rayservice["apiVersion"], rayservice["kind"]) in crds
    rayservice = {**rayservice, "spec": {**rayservice["spec"], "serveConfigV3": ""}}
    assert any("serveConfigV3" in problem for problem in schema_problems(rayservice, crds))


def test_core_kinds_pass_kubernetes_strict_schema(documents) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    core = [document for document in documents if "/" not in document["apiVersion"]]
    core += [document for document in documents if document["apiVersion"].endswith("8s.io/v1")]
    core += [document for document in documents if document["kind"] in ("Job", "StatefulSet")]
    assert {document["kind"] for document in core} >= {"NetworkPolicy", "Job"}
    for document in core:
        kubernetes_validate.validate(document, "1.32", strict=True)
    broken = {**core[-1], "spec": {**core[-1]["spec"], "templat": []}}
    with pytest.raises(kubernetes_validate.ValidationError, match="templat"):
        kubernetes_validate.validate(broken, "1.32", strict=True)


def test_pod_templates_pass_kubernetes_strict_schema(documents) -> None:
    """The pods inside the RayService too: this catches what a CRD leaves open."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    seen = 0
    for document in documents:
        for _, pod, _ in pods(document):
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
            kubernetes_validate.validate(whole, "1.32", strict=True)
            seen += 1
    assert seen >= 3


def test_serve_accepts_the_config(rayservice) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(serve_config(rayservice))
    assert [application.name for application in schema.applications] == ["moetier"]


def test_import_path_is_the_app_builder(application) -> None:
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert application["name"] == APP_NAME


def test_every_deployment_keeps_off_the_head_and_scales_by_our_policy(application, config) -> None:
    """The app is built as Serve would build it; the manifest's overrides are laid over it."""
    from ray.serve._private.build_app import build_app

    built = build_app(build(application["args"]), name="test").deployments
    options = {each.name: dict(each.ray_actor_options) for each in built}
    for override in application["deployments"]:
        assert override["name"] in options, "an override of a deployment that the app has not"
        options[override["name"]] = override["ray_actor_options"]
    for name, asked in options.items():
        assert asked["num_cpus"] > 0, f"{name} would also start on the head"
    tiers = options["TierManager"]["label_selector"]
    assert tiers == split_label(config.store.label), "started before a store can be placed"
    (worker,) = [each for each in built if each.name == "GpuWorker"]
    scaling = worker._deployment_config.autoscaling_config
    assert POLICY_IMPORT_PATH.replace(":", ".") in scaling.policy.policy_function.replace(":", ".")
    assert scaling.max_replicas == config.replicas.autoscaling.max_replicas


def test_args_are_a_cluster_config(config) -> None:
    assert config.ndp.enabled
    assert config.worker.near_data == "low_bit"
    assert config.replicas.autoscaling is not None
    assert config.replicas.autoscaling.max_replicas > config.replicas.autoscaling.min_replicas
    assert GpuWorkerPolicy(**as_mapping(config.replicas.autoscaling.targets))


def test_every_actor_finds_a_group_with_its_label_and_room(config, rayservice) -> None:
    needs = {
        "store": (config.store.label, 0, 0),
        "ndp": (config.ndp.label, config.ndp.num_threads or 1, 0),
        "worker": (
            config.replicas.label,
            config.replicas.num_cpus,
            config.replicas.num_gpus if config.worker.device == "cuda" else 0,
        ),
    }
    for actor, (label, num_cpus, num_gpus) in needs.items():
        assert label is not None
        homes = []
        for group in cluster_of(rayservice)["workerGroupSpecs"]:
            limits = template(group)["containers"][0]["resources"]["limits"]
            has_label = split_label(label).items() <= group.get("labels", {}).items()
            has_room = quantity(limits["cpu"]) >= num_cpus and (
                quantity(limits.get("nvidia.com/gpu", 0)) >= (num_gpus or 0)
            )
            if has_label and has_room:
                homes.append(group["groupName"])
        assert homes, f"{actor}: no worker group with {label}, {num_cpus} CPUs, {num_gpus} GPUs"


def test_gpu_workers_ask_for_a_gpu_exactly_where_there_is_one(config, rayservice) -> None:
    limits = [
        template(group)["containers"][0]["resources"]["limits"]
        for group in cluster_of(rayservice)["workerGroupSpecs"]
    ]
    has_gpu = any("nvidia.com/gpu" in each for each in limits)
    assert has_gpu == (config.worker.device == "cuda")
    assert (config.replicas.num_gpus or 0) == (1 if has_gpu else 0)


def test_head_runs_no_workload(rayservice) -> None:
    head = cluster_of(rayservice)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert not head.get("labels"), "a label on the head would draw actors to it"


def test_ports_agree(config, rayservice) -> None:
    http = serve_config(rayservice)["http_options"]
    assert http["port"] == config.http.port
    assert http["host"] == config.http.host == "0.0.0.0"
    assert http["request_timeout_s"] == config.http.request_timeout_s
    for _, group in groups(cluster_of(rayservice)):
        container = template(group)["containers"][0]
        assert {"name": "serve", "containerPort": http["port"]} in container["ports"]
        if container["name"] == "ray-worker":
            assert container["readinessProbe"]["httpGet"]["port"] == http["port"]


def test_the_store_is_where_the_config_looks_and_the_job_writes(
    config, rayservice, documents
) -> None:
    """Whoever fills the folder (a volume, a copy, a download) waits for the manifest in it."""
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    command = compress_container(documents)["command"]
    assert command[:2] == ["moetier", "compress"]
    assert command[3] == config.store.path
    for group in cluster_of(rayservice)["workerGroupSpecs"]:
        pod = template(group)
        (volume,) = [v for v in pod["volumes"] if v["name"] == "store"]
        (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "store"]
        assert PurePosixPath(config.store.path).is_relative_to(mount["mountPath"])
        assert mount["readOnly"]
        (first,) = pod["initContainers"]
        assert "manifest.json" in first["command"][-1]
        assert config.store.path in first["command"][-1]
        if "persistentVolumeClaim" not in volume:
            (filled,) = [m for m in first["volumeMounts"] if m["name"] == "store"]
            assert filled["mountPath"] == mount["mountPath"]
            assert not filled.get("readOnly")
        named = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert {each["claimName"] for each in named} <= claims


def compress_container(documents) -> dict:
    (job,) = [document for document in documents if document["kind"] == "Job"]
    pod = template(job["spec"])
    (found,) = [c for c in containers(pod) if c["name"] == "compress"]
    return found


def test_job_says_what_our_command_understands(documents) -> None:
    container = compress_container(documents)
    parser = argparse.ArgumentParser(exit_on_error=False)
    compress.add_arguments(parser)
    args = parser.parse_args(container["command"][2:])
    assert resolve_model(args.model).is_dir(), "the bundled model needs no download"
    CompressionConfig(recipe=args.recipe, bits=args.bits, avg_rank=args.avg_rank, top_n=args.top_n)
    assert args.jobs <= quantity(container["resources"]["limits"]["cpu"])


def test_images_are_those_of_the_dockerfile_and_of_this_version(documents) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE))
    for document in documents:
        for place, pod, _ in pods(document):
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                name, _, tag = container["image"].partition(":")
                if name in THIRD_PARTY:
                    continue
                version, _, target = tag.rpartition("-")
                assert (name, version) == ("moetier", VERSION), place
                assert target in targets, place
                if "nvidia.com/gpu" in container["resources"]["limits"]:
                    assert target == "gpu", place


def test_user_and_versions_agree_with_dockerfile_and_constraints(documents, rayservice) -> None:
    users = set(re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE))
    for document in documents:
        for place, pod, _ in pods(document):
            context = pod["securityContext"]
            assert {(str(context["runAsUser"]), str(context["runAsGroup"]))} == users, place
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster_of(rayservice)['rayVersion']}" in constraints
