"""Goal: the rules over a whole deployment catch the mistake each is for, and nothing that we ship.

Method: the rendered gpu-ha overlay, which has every kind of document, changed in one place a case.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from cluster.app import build
from cluster.deploy.checks import all_checks, metric_names, service_checks
from cluster.deploy.network_rules import Flow, Pod, passes
from cluster.deploy.serve_schema import args_config
from cluster.deploy.whole_rules import needed_secrets
from cluster.manifests import serve_config
from cluster.settings import OUTLAST_S

OVERLAY = "deploy/overlays/gpu-ha"
Documents = list[dict[str, Any]]


@pytest.fixture
def whole(rendered) -> Documents:
    return copy.deepcopy(rendered[OVERLAY])


def named(documents: Documents, kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def cluster(documents: Documents) -> dict[str, Any]:
    return named(documents, "RayService", "moetier")["spec"]["rayClusterConfig"]


def memory(documents: Documents) -> dict[str, Any]:
    return cluster(documents)["workerGroupSpecs"][0]


def memory_pod(documents: Documents) -> dict[str, Any]:
    return memory(documents)["template"]["spec"]


def policy(documents: Documents, name: str) -> dict[str, Any]:
    return named(documents, "NetworkPolicy", name)["spec"]


def args(change: Callable[[dict[str, Any]], object]) -> Callable[[Documents], None]:
    def both(documents: Documents) -> None:
        spec = named(documents, "RayService", "moetier")["spec"]
        config = yaml.safe_load(spec["serveConfigV2"])
        change(config["applications"][0]["args"])
        spec["serveConfigV2"] = yaml.safe_dump(config)

    return both


def drop(kind: str, name: str) -> Callable[[Documents], object]:
    return lambda documents: documents.remove(named(documents, kind, name))


def command(documents: Documents) -> list[str]:
    hook = memory_pod(documents)["containers"][0]["lifecycle"]["preStop"]
    words: list[str] = hook["exec"]["command"]
    return words


BREACHES: dict[str, tuple[Callable[[Documents], object], str]] = {
    "no dns": (
        lambda d: policy(d, "moetier-ray")["egress"].pop(1),
        "headGroupSpec cannot reach DNS on UDP 53",
    ),
    "gcs closed": (
        lambda d: policy(d, "moetier-ray")["ingress"][0]["ports"].pop(0),
        "cannot reach headGroupSpec on TCP 6379 (GCS)",
    ),
    "tier ports closed": (
        args(lambda a: a["store"].update(port_range="21000-21010")),
        "on TCP 21000 (store.port_range)",
    ),
    "tier ports free": (args(lambda a: a["ndp"].pop("port_range")), "ndp.port_range: nothing"),
    "port not pinned": (
        lambda d: memory(d)["rayStartParams"].pop("object-manager-port"),
        "workerGroupSpecs[memory]: rayStartParams.object-manager-port",
    ),
    "dashboard open": (
        lambda d: policy(d, "moetier-head")["ingress"][0].pop("from"),
        "any other pod can reach headGroupSpec on TCP 8265 (dashboard)",
    ),
    "operator shut out": (drop("NetworkPolicy", "moetier-head"), "the operator cannot reach"),
    "requests shut out": (
        lambda d: policy(d, "moetier-ray")["ingress"].pop(1),
        "any other pod cannot reach workerGroupSpecs[gpu] on TCP 8000",
    ),
    "metrics shut out": (
        lambda d: policy(d, "moetier-ray")["ingress"].pop(2),
        "Prometheus cannot reach",
    ),
    "redis open": (
        drop("NetworkPolicy", "moetier-redis"),
        "any other pod can reach Redis on TCP 6379",
    ),
    "redis shut out": (
        drop("NetworkPolicy", "moetier-ray-to-redis"),
        "cannot reach Redis on TCP 6379",
    ),
    "no policies of ray's": (drop("NetworkPolicy", "moetier-ray"), "can reach"),
    "budget of nothing": (
        lambda d: named(d, "PodDisruptionBudget", "moetier-gpu")["spec"]["selector"].update(
            matchLabels={"moetier.io/component": "gpus"}
        ),
        "PodDisruptionBudget/moetier-gpu: selects no pod",
    ),
    "budget of none": (
        lambda d: named(d, "PodDisruptionBudget", "moetier-gpu")["spec"].update(maxUnavailable=0),
        "no pod may ever be moved",
    ),
    "grace": (
        lambda d: memory_pod(d).update(terminationGracePeriodSeconds=100),
        "terminationGracePeriodSeconds: got 100, expected 495 or more",
    ),
    "no grace": (
        lambda d: memory_pod(d).pop("terminationGracePeriodSeconds"),
        "terminationGracePeriodSeconds: got 30",
    ),
    "no hook": (
        lambda d: memory_pod(d)["containers"][0].pop("lifecycle"),
        "workerGroupSpecs[memory]: lifecycle.preStop",
    ),
    "short hook": (
        lambda d: command(d).__setitem__(-1, "90"),
        "lifecycle.preStop: --seconds: got 90, expected 245 or more",
    ),
    "cut answers": (
        args(lambda a: a["replicas"].update(drain_s=15)),
        "replicas.drain_s: got 15, expected 204.8 or more",
    ),
    "no seconds": (lambda d: command(d).pop(), "expected --seconds N"),
    "head works": (
        lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].update({"num-cpus": "2"}),
        "headGroupSpec: rayStartParams.num-cpus",
    ),
    "head label": (
        lambda d: cluster(d)["headGroupSpec"].update(labels={"moetier.io/store": "true"}),
        "headGroupSpec: labels",
    ),
    "no home": (lambda d: memory(d)["labels"].pop("moetier.io/ndp"), "ndp: no group with"),
    "more copies": (args(lambda a: a["store"].update(replicas=3)), "store: 3 copies, but fewer"),
    "secret": (
        lambda d: d.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}),
        "Secret/s: a Secret among",
    ),
    "secret in env": (
        lambda d: memory_pod(d)["containers"][0].update(
            env=[{"name": "RAY_AUTH_TOKEN", "value": "x"}]
        ),
        "env RAY_AUTH_TOKEN: use a secretKeyRef",
    ),
    "metric": (
        lambda d: named(d, "ConfigMap", "moetier-dashboard")["data"].update(
            {"dashboard.json": json.dumps({"panels": [{"expr": "rate(moetier_stepz_total[1m])"}]})}
        ),
        "moetier_stepz_total is no metric of ours",
    ),
    "no dashboard": (
        lambda d: named(d, "ConfigMap", "moetier-dashboard")["data"].update(
            {"dashboard.json": "{"}
        ),
        "no Grafana dashboard",
    ),
    "service of nothing": (
        lambda d: named(d, "Service", "moetier-metrics")["spec"].update(selector={"a": "b"}),
        "Service/moetier-metrics: selects nothing",
    ),
    "monitor of nothing": (
        lambda d: named(d, "Service", "moetier-metrics")["metadata"].pop("labels"),
        "ServiceMonitor/moetier: selects nothing",
    ),
    "one ingress": (args(lambda a: a["http"].update(replicas=1)), "http.replicas: got 1"),
    "args": (args(lambda a: a["http"].update(prot=1)), "args: http.prot: unknown field"),
    "import path": (
        lambda d: named(d, "RayService", "moetier")["spec"].update(
            serveConfigV2="applications: [{name: a, import_path: 'm:f'}]"
        ),
        "import_path: got m:f, expected cluster.app:build",
    ),
    "serve's schema": (
        lambda d: named(d, "RayService", "moetier")["spec"].update(
            serveConfigV2="proxy_location: Nowhere\n"
            "applications: [{name: a, import_path: 'cluster.app:build'}]"
        ),
        "serveConfigV2: proxy_location",
    ),
    "no service": (drop("RayService", "moetier"), "got 0 RayServices"),
}


def found(documents: Documents) -> list[str]:
    services = [each for each in documents if each["kind"] == "RayService"]
    return [p for check in service_checks(documents, services) for p in check.problems]


@pytest.mark.parametrize("case", BREACHES)
def test_each_rule_catches_its_breach(whole, case: str) -> None:
    assert found(whole) == []
    change, message = BREACHES[case]
    change(whole)
    assert any(message in problem for problem in found(whole)), found(whole)


def test_what_we_ship_passes_every_check_that_was_run(documents) -> None:
    checks = all_checks(documents, None)
    assert [problem for check in checks for problem in check.problems] == []
    skipped = [check.name for check in checks if check.not_run]
    assert skipped == ["KubeRay's CRDs, strict, defaults applied", "rules of the CRDs in CEL"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[0].update(kind="Confgmap"), "no schema of Kubernetes"),
        (
            lambda d: named(d, "ServiceMonitor", "moetier")["spec"]["endpoints"][0].update(prt=1),
            "'prt' was unexpected",
        ),
        (
            lambda d: named(d, "PodMonitor", "moetier-ray").update(kind="PodMonitr"),
            "does not know",
        ),
        (lambda d: memory_pod(d)["containers"][0].update(imag="x"), "imag"),
    ],
)
def test_schemas_catch(whole, change, message: str) -> None:
    change(whole)
    problems = [p for check in all_checks(whole, None) for p in check.problems]
    assert any(message in problem for problem in problems), problems


def test_the_secrets_that_are_asked_for(rendered, whole) -> None:
    assert needed_secrets(whole) == (
        ("moetier-ray-token", "auth_token"),
        ("moetier-redis", "password"),
    )
    assert needed_secrets(rendered["deploy/overlays/cpu-local"]) == ()
    stored = needed_secrets(rendered["deploy/overlays/gpu-object-storage"])
    assert ("moetier-object-storage", "access_key") in stored


def test_shutdown_time_is_the_apps(whole) -> None:
    from ray.serve._private.build_app import build_app

    config = serve_config(named(whole, "RayService", "moetier"))
    built = build_app(build(config["applications"][0]["args"]), name="test").deployments
    longest = max(each._deployment_config.graceful_shutdown_timeout_s for each in built)
    assert longest == args_config(config).replicas.drain_s + OUTLAST_S


def test_metric_names_are_there() -> None:
    assert {"moetier_tier_up", "moetier_moved_bytes_total"} <= metric_names()


A, B = Pod("a", {"app": "a", "tier": "x"}), Pod("b", {"app": "b"})
OUT = Pod("out", {"app": "a"}, is_ours=False, namespace="other")


def one(way: str, rules: list[dict[str, Any]], selector: dict[str, Any] | None = None) -> Any:
    wanted = {"matchLabels": {"app": "b"}} if selector is None else selector
    return {"spec": {"podSelector": wanted, "policyTypes": [way], way.lower(): rules}}


@pytest.mark.parametrize(
    ("policies", "source", "expected"),
    [
        ([], A, True),
        ([one("Ingress", [])], A, False),
        ([one("Ingress", [{}])], A, True),
        ([one("Ingress", [], {"matchLabels": {"app": "z"}})], A, True),
        ([one("Ingress", [], {})], A, False),
        ([one("Ingress", [{"from": [{"podSelector": {"matchLabels": {"app": "a"}}}]}])], A, True),
        (
            [one("Ingress", [{"from": [{"podSelector": {"matchLabels": {"app": "a"}}}]}])],
            OUT,
            False,
        ),
        ([one("Ingress", [{"from": [{"namespaceSelector": {}}]}])], OUT, True),
        ([one("Ingress", [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}])], A, False),
        ([one("Ingress", [{"ports": [{"port": 80}]}])], A, True),
        ([one("Ingress", [{"ports": [{"port": 70, "endPort": 79}]}])], A, False),
        ([one("Ingress", [{"ports": [{"port": 70, "endPort": 80}]}])], A, True),
        ([one("Ingress", [{"ports": [{"port": 80, "protocol": "UDP"}]}])], A, False),
        ([one("Ingress", []), one("Ingress", [{}])], A, True),
        ([one("Egress", [], {"matchLabels": {"app": "a"}})], A, False),
        (
            [one("Ingress", [], {"matchExpressions": [{"key": "app", "operator": "Exists"}]})],
            A,
            False,
        ),
        (
            [
                one(
                    "Ingress",
                    [],
                    {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["b"]}]},
                )
            ],
            A,
            True,
        ),
    ],
)
def test_the_evaluator_of_policies(policies, source: Pod, expected: bool) -> None:
    assert passes(Flow(source, B, 80, "test"), policies) == expected
