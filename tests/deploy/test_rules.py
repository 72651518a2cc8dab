"""Goal: each rule of the manifest checks catches the mistake it is for, and says where it is.

Method: one small RayService that passes, changed in one place per case; a little CRD for the schema
conversion; a Job for the pod rules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from cluster.manifests import (
    document_problems,
    load_crds,
    main,
    parse_documents,
    schema_problems,
    serve_config,
    strict_schema,
    with_defaults,
)
from cluster.pod_rules import quantity

Change = Callable[[dict[str, Any]], object]


def container(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "image": "registry:5000/moetier:1.0-cpu",
        "resources": {
            "requests": {"cpu": "1", "memory": "4Gi"},
            "limits": {"cpu": "2", "memory": "4Gi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }


def pod(name: str) -> dict[str, Any]:
    return {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container(name)],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}],
    }


def service() -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "moetier"},
        "spec": {
            "serveConfigV2": "applications: [{name: a, import_path: 'm:f'}]\n",
            "rayClusterConfig": {
                "rayVersion": "2.60.0",
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"version": "v2"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "object-store-memory": "1000000000"},
                    "template": {"spec": pod("head")},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "memory",
                        "replicas": 1,
                        "minReplicas": 1,
                        "maxReplicas": 2,
                        "labels": {"moetier.io/store": "true"},
                        "rayStartParams": {},
                        "template": {"spec": pod("worker")},
                    }
                ],
            },
        },
    }


def cluster(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterConfig"]


def head(document: dict[str, Any]) -> dict[str, Any]:
    return cluster(document)["headGroupSpec"]


def worker(document: dict[str, Any]) -> dict[str, Any]:
    return cluster(document)["workerGroupSpecs"][0]


def head_pod(document: dict[str, Any]) -> dict[str, Any]:
    return head(document)["template"]["spec"]


def worker_pod(document: dict[str, Any]) -> dict[str, Any]:
    return worker(document)["template"]["spec"]


def env(**values: str) -> Change:
    items = [{"name": name, "value": value} for name, value in values.items()]
    return lambda d: head_pod(d)["containers"][0].update(env=items)


def annotate(**values: str) -> Change:
    named = {f"ray.io/{key.replace('_', '-')}": value for key, value in values.items()}
    return lambda d: d["metadata"].update(annotations=named)


def fault_tolerant(change: Change) -> Change:
    def both(document: dict[str, Any]) -> None:
        cluster(document)["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379"}
        change(document)

    return both


STEPS = {"gatewayClassName": "g", "intervalSeconds": 5, "stepSizePercent": 10}


def upgrade(options: dict[str, Any] | None) -> Change:
    kind = {"type": "NewClusterWithIncrementalUpgrade"}
    more = {} if options is None else {"clusterUpgradeOptions": options}
    return lambda d: d["spec"].update(upgradeStrategy=kind | more)


def worker_container(document: dict[str, Any]) -> dict[str, Any]:
    return worker_pod(document)["containers"][0]


RULES: dict[str, tuple[Change, str]] = {
    # KubeRay's operator
    "long name": (lambda d: d["metadata"].update(name="m" * 48), "48 characters, at most 47"),
    "name": (lambda d: d["metadata"].update(name="2moetier"), "no DNS-1035 label"),
    "no container": (lambda d: worker_pod(d).update(containers=[]), "at least one container"),
    "labels in params": (
        lambda d: worker(d)["rayStartParams"].update(labels="a=b"),
        "workerGroupSpecs[memory]: rayStartParams.labels is refused",
    ),
    "resources twice": (
        lambda d: head(d).update(resources={"cpu": "1"}),
        "headGroupSpec: resources are given twice",
    ),
    "label key": (lambda d: worker(d).update(labels={"a/b/c": "x"}), "no Kubernetes label key"),
    "label prefix": (lambda d: worker(d).update(labels={"A_/b": "x"}), "no Kubernetes label key"),
    "label value": (lambda d: worker(d).update(labels={"a": "x y"}), "is no label value"),
    "label bool": (lambda d: worker(d).update(labels={"a": True}), "is no label value"),
    "min over max": (lambda d: worker(d).update(minReplicas=3), "minReplicas 3 is over"),
    "replicas": (lambda d: worker(d).update(replicas=5), "replicas 5 is outside 1 to 2"),
    "two groups": (
        lambda d: cluster(d)["workerGroupSpecs"].append(copy.deepcopy(worker(d))),
        "groupName 'memory' is given twice",
    ),
    "redis address": (env(RAY_REDIS_ADDRESS="r:6379"), "needs gcsFaultToleranceOptions"),
    "redis twice": (fault_tolerant(env(RAY_REDIS_ADDRESS="r:1")), "env RAY_REDIS_ADDRESS"),
    "redis password": (fault_tolerant(env(REDIS_PASSWORD="x")), "env REDIS_PASSWORD"),
    "redis password param": (
        fault_tolerant(lambda d: head(d)["rayStartParams"].update({"redis-password": "x"})),
        "rayStartParams.redis-password",
    ),
    "redis username": (env(REDIS_USERNAME="x"), "redisUsername"),
    "ft annotation": (fault_tolerant(annotate(ft_enabled="true")), "ray.io/ft-enabled"),
    "namespace annotation": (
        fault_tolerant(annotate(external_storage_namespace="x")),
        "external-storage-namespace",
    ),
    "autoscaler twice": (env(RAY_enable_autoscaler_v2="1"), "keep only the former"),
    "autoscaler off": (
        lambda d: (cluster(d).pop("enableInTreeAutoscaling"), env(RAY_enable_autoscaler_v2="1")(d)),
        "needs enableInTreeAutoscaling",
    ),
    "restart policy": (
        lambda d: worker_pod(d).update(restartPolicy="Always"),
        "restartPolicy Always: autoscaler v2",
    ),
    "old ray for tokens": (lambda d: cluster(d).update(rayVersion="2.51.0"), "got '2.51.0'"),
    "no ray for tokens": (lambda d: cluster(d).pop("rayVersion"), "2.52.0 or newer"),
    "kubernetes tokens": (
        lambda d: cluster(d)["authOptions"].update(enableK8sTokenAuth=True),
        "is not for RayService",
    ),
    "head service": (
        lambda d: head(d).update(headService={"metadata": {"name": "x"}}),
        "headService.metadata.name",
    ),
    "upgrade": (lambda d: d["spec"].update(upgradeStrategy={"type": "Soon"}), "'Soon'"),
    "deletion": (lambda d: d["spec"].update(rayClusterDeletionDelaySeconds=-1), "negative"),
    "rocksdb": (
        lambda d: cluster(d).update(gcsFaultToleranceOptions={"backend": "rocksdb"}),
        "GCSFaultToleranceEmbeddedStorage",
    ),
    "no redis": (
        lambda d: cluster(d).update(gcsFaultToleranceOptions={"externalStorageNamespace": "x"}),
        "redisAddress: missing",
    ),
    "storage": (
        fault_tolerant(lambda d: cluster(d)["gcsFaultToleranceOptions"].update(storage={"a": 1})),
        "goes with backend rocksdb",
    ),
    "mtls": (lambda d: cluster(d).update(tlsOptions={"enabled": True}), "RayClusterMTLS"),
    "network policy": (
        lambda d: cluster(d).update(
            networkPolicy={"mode": "DenyAllIngress", "head": {"egressRules": [{}]}}
        ),
        "networkPolicy.head.egressRules: does not go with mode DenyAllIngress",
    ),
    "suspend": (lambda d: worker(d).update(suspend=True), "[memory]: suspend does not go"),
    "idle timeout": (
        lambda d: (
            cluster(d)["autoscalerOptions"].pop("version"),
            worker(d).update(idleTimeoutSeconds=60),
        ),
        "idleTimeoutSeconds needs autoscalerOptions.version v2",
    ),
    "incremental": (upgrade(None), "clusterUpgradeOptions: missing"),
    "surge": (upgrade(STEPS | {"maxSurgePercent": 101}), "maxSurgePercent: got 101"),
    "interval": (upgrade(STEPS | {"intervalSeconds": 0}), "intervalSeconds"),
    "gateway": (upgrade(STEPS | {"gatewayClassName": ""}), "gatewayClassName: missing"),
    "incremental without autoscaler": (
        lambda d: (upgrade(STEPS)(d), cluster(d).pop("enableInTreeAutoscaling")),
        "needs enableInTreeAutoscaling: true",
    ),
    # serveConfigV2
    "serve mapping": (lambda d: d["spec"].update(serveConfigV2={}), "expected a text of YAML"),
    "serve yaml": (lambda d: d["spec"].update(serveConfigV2="a: ["), "not YAML"),
    "serve empty": (lambda d: d["spec"].update(serveConfigV2="{}"), "a list of applications"),
    "serve import": (
        lambda d: d["spec"].update(serveConfigV2="applications: [{name: a}]"),
        "applications[0]: no import_path",
    ),
    # ours
    "root": (
        lambda d: worker_pod(d)["securityContext"].pop("runAsNonRoot"),
        "workerGroupSpecs[memory]: securityContext.runAsNonRoot",
    ),
    "seccomp": (
        lambda d: head_pod(d)["securityContext"].update(seccompProfile={"type": "Unconfined"}),
        "headGroupSpec: securityContext.seccompProfile",
    ),
    "host network": (lambda d: worker_pod(d).update(hostNetwork=True), "hostNetwork"),
    "host path": (
        lambda d: worker_pod(d)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "volume x: hostPath",
    ),
    "escalation": (
        lambda d: worker_container(d)["securityContext"].pop("allowPrivilegeEscalation"),
        "container worker: allowPrivilegeEscalation",
    ),
    "capabilities": (
        lambda d: worker_container(d)["securityContext"].update(capabilities={"drop": []}),
        "capabilities.drop",
    ),
    "privileged": (
        lambda d: worker_container(d)["securityContext"].update(privileged=True),
        "privileged",
    ),
    "init container": (
        lambda d: worker_pod(d).update(initContainers=[container("i") | {"image": "a"}]),
        "container i: image 'a' has no fixed tag",
    ),
    "latest": (lambda d: worker_container(d).update(image="moetier:latest"), "no fixed tag"),
    "no tag": (lambda d: worker_container(d).update(image="host:5000/moetier"), "no fixed tag"),
    "no limit": (
        lambda d: worker_container(d)["resources"]["limits"].pop("memory"),
        "no request and limit for memory",
    ),
    "request over limit": (
        lambda d: worker_container(d)["resources"]["requests"].update(cpu="3"),
        "cpu request is over its limit",
    ),
    "no volume": (lambda d: worker_pod(d).pop("volumes"), "'shm' has no volume"),
    "small shm": (
        lambda d: head_pod(d)["volumes"][0]["emptyDir"].update(sizeLimit="512Mi"),
        "sizeLimit 512Mi is under object-store-memory 1000000000",
    ),
    "shm on disk": (
        lambda d: head_pod(d)["volumes"][0].update(emptyDir={"sizeLimit": "2Gi"}),
        "medium Memory",
    ),
    "shm not mounted": (
        lambda d: head_pod(d)["containers"][0].pop("volumeMounts"),
        "expected an emptyDir",
    ),
    "shm over memory": (
        lambda d: head_pod(d)["volumes"][0]["emptyDir"].update(sizeLimit="4Gi"),
        "leaves nothing of the memory limit",
    ),
}


def test_the_example_passes() -> None:
    assert document_problems([service()], {}) == []


@pytest.mark.parametrize("case", RULES)
def test_each_rule_catches_its_breach_and_nothing_else(case: str) -> None:
    change, message = RULES[case]
    document = service()
    change(document)
    problems = document_problems([document], {})
    assert [problem for problem in problems if message in problem], problems
    assert all(problem.startswith("RayService/") for problem in problems)
    assert len(problems) <= 3, f"one mistake should not hide among others: {problems}"


def test_jobs_pods_are_checked_too() -> None:
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "j"},
        "spec": {"template": {"spec": pod("c")}},
    }
    assert document_problems([job], {}) == []
    job["spec"]["template"]["spec"]["containers"][0]["image"] = "x:latest"
    (problem,) = document_problems([job], {})
    assert problem == "Job/j: template: container c: image 'x:latest' has no fixed tag"


CRD_SCHEMA = {
    "type": "object",
    "required": ["kind", "spec"],
    "properties": {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["replicas"],
            "properties": {
                "replicas": {"type": "integer", "default": 1},
                "port": {"x-kubernetes-int-or-string": True},
                "mode": {"type": "string", "enum": ["a", "b"]},
                "params": {"type": "object", "additionalProperties": {"type": "string"}},
                "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "items": {"type": "array", "items": {"properties": {"x": {"type": "integer"}}}},
            },
        },
    },
}


def test_defaults_come_first_and_nulls_go() -> None:
    schema = strict_schema(CRD_SCHEMA)
    value = {"kind": "T", "spec": {"mode": None, "port": "80%", "open": {"any": [1]}}}
    filled = with_defaults(value, schema)
    assert filled["spec"] == {"port": "80%", "open": {"any": [1]}, "replicas": 1}
    jsonschema.validate(filled, schema)
    assert value["spec"]["mode"] is None, "the input must stay as it was"


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ({"replica": 1}, "'replica'"),
        ({"replicas": "1"}, "spec.replicas"),
        ({"mode": "c"}, "spec.mode"),
        ({"params": {"n": 1}}, "spec.params.n"),
        ({"items": [{"x": 1}, {"y": 1}]}, "spec.items[1]"),
        ({"port": 1.5}, "spec.port"),
    ],
)
def test_strict_schema_catches(spec: dict, place: str) -> None:
    document = {"apiVersion": "t/v1", "kind": "T", "metadata": {"name": "n"}, "spec": spec}
    crds = {("t/v1", "T"): strict_schema(CRD_SCHEMA)}
    (problem,) = schema_problems(document, crds)
    assert problem.startswith("T/n: spec")
    assert place in problem


@pytest.mark.parametrize("change", ["serveConfigV3", "template", "replicas", "restart"])
def test_kuberays_own_schema_catches(crds, change: str) -> None:
    document = service()
    assert schema_problems(document, crds) == []
    if change == "serveConfigV3":
        document["spec"]["serveConfigV3"] = ""
    elif change == "template":
        head(document).pop("template")
    elif change == "replicas":
        worker(document)["replicas"] = "1"
    else:
        worker_pod(document)["restartPolcy"] = "Never"
    (problem,) = schema_problems(document, crds)
    assert {"restart": "restartPolcy"}.get(change, change) in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("a: 1", "document 0"), ("kind: A\n---\n- x", "document 0")],
)
def test_unreadable_documents_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_documents(text)


def test_empty_documents_are_left_out() -> None:
    text = "---\n---\napiVersion: v1\nkind: A\nmetadata: {name: n}\n---\n"
    assert [document["kind"] for document in parse_documents(text)] == ["A"]


def test_folder_without_crds_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="CustomResourceDefinitions"):
        load_crds(tmp_path)


def test_serve_config_returns_the_mapping() -> None:
    assert serve_config(service())["applications"][0]["import_path"] == "m:f"


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("2", 2), ("2Gi", 2 << 30), ("3M", 3_000_000), (4, 4)]
)
def test_quantities(text: object, value: float) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "Gi", "2gi", "-1", "1e3"])
def test_odd_quantities_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="quantity"):
        quantity(text)


def test_command_line(tmp_path, capsys) -> None:
    import yaml

    good = tmp_path / "good.yaml"
    good.write_text(yaml.safe_dump(service()))
    assert main([str(good)]) == 0
    assert "1 documents, 0 problems" in capsys.readouterr().out
    bad = service()
    bad["metadata"]["name"] = "2moetier"
    good.write_text(yaml.safe_dump(bad))
    assert main([str(good)]) == 1
    assert "DNS-1035" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.yaml")]) == 2
