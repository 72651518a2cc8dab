"""Goal: `moetier deploy` fills in and checks what it is told to, and says what is wrong in a call.

Method: the command itself, in this process, on the shipped overlays and on hostile files; a small
CRD stands for KubeRay's where only its rules in CEL matter.
"""

from __future__ import annotations

import copy
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.deploy.cel_rules import can_evaluate, cel_problems, rules
from cluster.deploy.credentials import write_secrets
from cluster.deploy.sizes import GIBIBYTE, HEADROOM_BYTES, node_memory
from cluster.deploy.values import KEYS, with_settings
from cluster.manifests import parse_documents, raw_crds, serve_config
from cluster.plan.inputs import Recipe
from tests.hand_store import build_store

ROOT = Path(__file__).resolve().parents[2]
CLUSTER_KEYS = {
    "namespace": "prod",
    "image": "reg.example.com:5000/ai/moetier",
    "tag": "0.2.0",
    "model": "org/model",
    "recipe": "balanced",
    "memory_nodes": "3",
    "gpu_nodes": "4",
    "max_gpu_nodes": "9",
    "memory": "100Gi",
    "storage": "300Gi",
    "storage_class": "nfs",
    "redis": "redis.db.svc:6380",
}
STORAGE_KEYS = {"endpoint": "https://s3.local:9000", "bucket": "experts"}


def service(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [each for each in documents if each["kind"] == "RayService"]
    return found


def output(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["deploy", *words]) == code
    caught = capsys.readouterr()
    return caught.out if code == 0 else caught.out + caught.err


def test_every_key_changes_something_and_what_comes_out_is_valid(
    rendered, tmp_path: Path, capsys
) -> None:
    assert set(CLUSTER_KEYS) | set(STORAGE_KEYS) == set(KEYS)
    whole = rendered["deploy/overlays/gpu-ha"]
    for key, value in CLUSTER_KEYS.items():
        assert with_settings(whole, {key: value}) != whole, key
    stored = rendered["deploy/overlays/gpu-object-storage"]
    for key, value in STORAGE_KEYS.items():
        assert with_settings(stored, {key: value}) != stored, key
    file = tmp_path / "out.yaml"
    words = [word for key, value in CLUSTER_KEYS.items() for word in ("--set", f"{key}={value}")]
    output(capsys, "render", "--overlay", "gpu-ha", *words, "--output", str(file))
    assert "0 problems" in output(capsys, "validate", str(file), "--crds", str(tmp_path / "none"))
    documents = parse_documents(file.read_text())
    assert {each["metadata"]["namespace"] for each in documents} == {"prod"}
    cluster = service(documents)["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "redis.db.svc:6380"
    assert [each["kind"] for each in documents if "redis" in each["metadata"]["name"]] == [
        "NetworkPolicy"
    ]
    (application,) = serve_config(service(documents))["applications"]
    args = application["args"]
    assert (args["store"]["replicas"], args["ndp"]["replicas"]) == (3, 3)
    assert args["replicas"]["autoscaling"]["max_replicas"] == 9
    assert args["directory"]["redis_url"] == "redis://redis.db.svc:6380/1"
    memory, gpu = cluster["workerGroupSpecs"]
    assert (memory["minReplicas"], gpu["minReplicas"], gpu["maxReplicas"]) == (3, 4, 9)
    container = memory["template"]["spec"]["containers"][0]
    assert container["image"] == "reg.example.com:5000/ai/moetier:0.2.0-cpu"
    assert container["resources"]["limits"]["memory"] == "100Gi"


def test_memory_is_computed_from_a_store_and_from_a_shape(tmp_path: Path) -> None:
    build_store(tmp_path / "store")
    found = node_memory(str(tmp_path / "store"), Recipe(), shm_bytes=GIBIBYTE)
    on_disk = sum(
        path.stat().st_size
        for folder in ("codes", "factors")
        for path in (tmp_path / "store" / folder).iterdir()
    )
    assert 0 < found.store_bytes <= on_disk
    assert found.total_bytes == found.store_bytes + GIBIBYTE + HEADROOM_BYTES
    assert found.quantity == "6Gi"
    shape = node_memory("Mixtral-8x7B", Recipe(bits=2, rank=0), shm_bytes=0)
    weights = 32 * 8 * 3 * 4096 * 14336
    assert weights * 2 / 8 < shape.store_bytes < weights * 3 / 8


def test_secrets_are_random_once_and_private(tmp_path: Path, capsys) -> None:
    file = tmp_path / "a.secrets.yaml"
    words = ("render", "--overlay", "gpu-small", "--secrets")
    output(capsys, *words, str(file), "--set", "namespace=prod")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    made = parse_documents(file.read_text())
    assert [each["metadata"]["name"] for each in made] == ["moetier-ray-token", "moetier-redis"]
    assert {each["metadata"]["namespace"] for each in made} == {"prod"}
    values = [value for each in made for value in each["stringData"].values()]
    assert len(set(values)) == 2
    assert min(map(len, values)) >= 40
    assert "not written over" in output(capsys, *words, str(file), code=2)
    other = tmp_path / "b.secrets.yaml"
    text = output(capsys, *words, str(other), "--set", "redis=r:1")
    assert not any(value in text for value in values)
    (token,) = parse_documents(other.read_text())
    assert token["metadata"]["name"] == "moetier-ray-token", "a Redis of one's own has a password"
    with pytest.raises(ValueError, match="not written over"):
        write_secrets(other, made)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["render", "--overlay", "gpu-smal"], "expected one of base, cpu-local"),
        (["render", "--set", "modle=x"], "did you mean model"),
        (["render", "--set", "model"], "expected model=VALUE"),
        (["render", "--set", "tag=a", "--set", "tag=b"], "given twice"),
        (["render", "--set", "namespace=A b"], "--set namespace: got 'A b'"),
        (["render", "--set", "image=x:1"], "without a tag"),
        (["render", "--set", "model=--jobs"], "would be an option"),
        (["render", "--set", "memory_nodes=0"], "expected 1 to 1000"),
        (["render", "--set", "memory=many"], "--set memory: quantity"),
        (["render", "--set", "redis=r:6379"], "this overlay has no Redis"),
        (["render", "--set", "bucket=b"], "no store in object storage"),
        (["render", "--overlay", "cpu-local", "--set", "gpu_nodes=2"], "no group gpu"),
        (["render", "--set", "memory=1Gi", "--size-for", "Mixtral-8x7B"], "already given"),
        (["render", "--size-for", "no-such-model"], "no-such-model"),
        (["render", "--overlay", "cpu-local", "--secrets", "x"], "asks for none"),
        (["render", "--folder", "/"], "expected moetier's deploy folder"),
        (["validate", "/no/such.yaml"], "cannot read it"),
        (["validate", "--all", "--overlay", "base"], "give one of"),
    ],
)
def test_a_wrong_call_is_named(words: list[str], message: str, capsys) -> None:
    assert message in output(capsys, *words, code=2)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("", 2, "no documents"),
        ("a: [", 2, "not valid YAML"),
        ("- 1", 2, "expected apiVersion"),
        ("\x00", 2, "not valid YAML"),
        ("{apiVersion: ray.io/v1, kind: RayService, metadata: {name: a}}", 1, "serveConfigV2"),
        (
            "{apiVersion: ray.io/v1, kind: RayService, metadata: {name: a}, spec: 3}",
            1,
            "fix the schema first",
        ),
        (
            "{apiVersion: ray.io/v1, kind: RayService, metadata: {name: a}, "
            "spec: {serveConfigV2: x, rayClusterConfig: [1]}}",
            1,
            "fix the schema first",
        ),
        ("{apiVersion: v1, kind: ConfigMap, metadata: {name: a}}", 1, "got 0 RayServices"),
    ],
)
def test_a_hostile_file_is_refused(
    text: str, code: int, message: str, tmp_path: Path, capsys
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    assert message in output(capsys, "validate", str(file), code=code)


def test_all_overlays_on_one_page(tmp_path: Path, capsys, crds) -> None:
    page = tmp_path / "page.md"
    text = output(capsys, "validate", "--all", "--output", str(page))
    assert "0 problems" in text
    written = page.read_text()
    assert "| check | base | cpu-local | gpu-ha | gpu-object-storage | gpu-small |" in written
    assert "Not checked" in written


CEL = {
    "properties": {
        "spec": {
            "properties": {
                "by": {
                    "x-kubernetes-validations": [
                        {"rule": "self == oldSelf"},
                        {"rule": "self in ['a', 'b']", "message": "a or b"},
                    ]
                },
                "items": {"items": {"x-kubernetes-validations": [{"rule": "self < 5"}]}},
            }
        }
    }
}


def test_cel_rules_are_found_where_they_apply() -> None:
    document = {"spec": {"by": "c", "items": [1, 7]}}
    found = list(rules(document, CEL))
    assert [rule.place for rule in found] == [
        "spec.by",
        "spec.by",
        "spec.items[0]",
        "spec.items[1]",
    ]
    assert [rule.is_of_changes for rule in found] == [True, False, False, False]
    if not can_evaluate():
        pytest.skip("cel-python is not installed, so that the rules were only found")
    assert list(cel_problems(document, CEL)) == ["spec.by: a or b", "spec.items[1]: self < 5"]
    assert list(cel_problems({"spec": {"by": "a"}}, CEL)) == []


def test_kuberays_own_rule_catches_its_breach(rendered, crds) -> None:
    """`crds` skips where they are not; their rules are read raw."""
    if not can_evaluate():
        pytest.skip("cel-python is not installed; it is in the extra test")
    folder = Path(os.environ.get("MOETIER_CRDS", ROOT.parent / "shared" / "kuberay"))
    schema = raw_crds(folder)["ray.io/v1", "RayService"]
    documents = copy.deepcopy(rendered["deploy/overlays/gpu-small"])
    (service,) = [each for each in documents if each["kind"] == "RayService"]
    service["spec"]["managedBy"] = "ray.io/kuberay-operator"
    assert list(cel_problems(service, schema)) == []
    service["spec"]["managedBy"] = "somebody"
    (problem,) = cel_problems(service, schema)
    assert problem.startswith("spec.managedBy: the managedBy field value must be either")


def test_rendered_text_stays_readable(rendered, tmp_path: Path, capsys) -> None:
    text = output(capsys, "render", "--overlay", "gpu-small")
    assert "serveConfigV2: |" in text
    assert list(yaml.safe_load_all(text)) == rendered["deploy/overlays/gpu-small"]
