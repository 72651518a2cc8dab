"""What KubeRay's operator refuses although the CRD's schema allows it, for the RayService kind.

Rules of kuberay 1.7 (ray-operator/controllers/ray/utils/validation.go), restated. Feature gates are
taken to be at their defaults: what is alpha there is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_NAME_CHARS = 47
"""63 of a DNS label, less "-serve-svc" (10), less the 6 that the operator appends per cluster."""
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
AUTOSCALER_V2_ENV = "RAY_enable_autoscaler_v2"
TOKEN_AUTH_SINCE = (2, 52, 0)

Mapped = Mapping[str, Any]


def rayservice_problems(document: Mapped) -> Iterator[str]:
    """Every rule that this RayService breaks, as "place: what is wrong"."""
    annotations = document["metadata"].get("annotations") or {}
    spec = document.get("spec") or {}
    cluster = spec.get("rayClusterConfig") or {}
    yield from name_problems(document["metadata"]["name"])
    if not all(template(group).get("containers") for _, group in groups(cluster)):
        yield "rayClusterConfig: every group needs at least one container"
        return
    for place, group in groups(cluster):
        for problem in group_problems(group):
            yield f"{place}: {problem}"
    yield from worker_group_problems(cluster)
    yield from fault_tolerance_problems(cluster, annotations)
    yield from autoscaler_problems(cluster)
    yield from auth_problems(cluster)
    yield from gated_problems(cluster)
    yield from upgrade_problems(spec, cluster)
    yield from service_problems(spec, cluster)


def name_problems(name: str) -> Iterator[str]:
    if len(name) > MAX_NAME_CHARS:
        yield f"metadata.name: {len(name)} characters, at most {MAX_NAME_CHARS}"
    if not DNS_1035.fullmatch(name):
        yield f"metadata.name: {name!r} is no DNS-1035 label (a-z first, then a-z, 0-9 and -)"


def group_problems(group: Mapped) -> Iterator[str]:
    params = group.get("rayStartParams") or {}
    if "labels" in params:
        yield "rayStartParams.labels is refused; use the group's own labels field"
    doubled = [name for name in RESOURCE_PARAMS if params.get(name)]
    if doubled and group.get("resources"):
        yield f"resources are given twice, in resources and in rayStartParams ({doubled[0]})"
    for key, value in (group.get("labels") or {}).items():
        prefix, slash, name = key.rpartition("/")
        if not LABEL_NAME.fullmatch(name) or (slash and not LABEL_PREFIX.fullmatch(prefix)):
            yield f"labels: {key!r} is no Kubernetes label key"
        if not isinstance(value, str) or (value and not LABEL_NAME.fullmatch(value)):
            yield f"labels: {value!r} of {key} is no label value (text, so quoted)"


def worker_group_problems(cluster: Mapped) -> Iterator[str]:
    names = [group.get("groupName") for group in cluster.get("workerGroupSpecs") or []]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield f"workerGroupSpecs: groupName {name!r} is given twice"
    for group in cluster.get("workerGroupSpecs") or []:
        least, most = group.get("minReplicas") or 0, group.get("maxReplicas")
        place = f"workerGroupSpecs[{group.get('groupName')}]"
        if most is not None and least > most:
            yield f"{place}: minReplicas {least} is over maxReplicas {most}"
        elif most is not None and not least <= (group.get("replicas") or 0) <= most:
            yield f"{place}: replicas {group.get('replicas')} is outside {least} to {most}"


def fault_tolerance_problems(cluster: Mapped, annotations: Mapped) -> Iterator[str]:
    head = cluster.get("headGroupSpec") or {}
    params, env = head.get("rayStartParams") or {}, head_env(cluster)
    options = cluster.get("gcsFaultToleranceOptions")
    if options is None:
        if annotations.get("ray.io/ft-enabled") != "true" and "RAY_REDIS_ADDRESS" in env:
            yield "headGroupSpec: env RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"
    else:
        if annotations.get("ray.io/ft-enabled"):
            yield "annotation ray.io/ft-enabled does not go with gcsFaultToleranceOptions"
        if annotations.get("ray.io/external-storage-namespace"):
            yield (
                "annotation ray.io/external-storage-namespace does not go with "
                "gcsFaultToleranceOptions; use its externalStorageNamespace"
            )
        for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD"):
            if name in env:
                yield f"headGroupSpec: env {name} does not go with gcsFaultToleranceOptions"
        if params.get("redis-password"):
            yield "headGroupSpec: rayStartParams.redis-password; use gcsFaultToleranceOptions"
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield "headGroupSpec: a redis username belongs in gcsFaultToleranceOptions.redisUsername"


def autoscaler_problems(cluster: Mapped) -> Iterator[str]:
    env, version = head_env(cluster), (cluster.get("autoscalerOptions") or {}).get("version")
    by_env = env.get(AUTOSCALER_V2_ENV) in ("1", "true")
    if not cluster.get("enableInTreeAutoscaling"):
        if by_env:
            yield f"headGroupSpec: env {AUTOSCALER_V2_ENV} needs enableInTreeAutoscaling: true"
        return
    if version and AUTOSCALER_V2_ENV in env:
        yield f"autoscalerOptions.version and head env {AUTOSCALER_V2_ENV}: keep only the former"
    if version == "v2" or by_env:
        for place, group in groups(cluster):
            policy = template(group).get("restartPolicy")
            if policy not in (None, "", "Never"):
                yield f"{place}: restartPolicy {policy}: autoscaler v2 needs Never or nothing"


def auth_problems(cluster: Mapped) -> Iterator[str]:
    options = cluster.get("authOptions") or {}
    if options.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth: is not for RayService"
    if options.get("mode") != "token":
        return
    version = str(cluster.get("rayVersion") or "")
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None or tuple(map(int, match.groups())) < TOKEN_AUTH_SINCE:
        yield f"authOptions.mode: token needs rayVersion 2.52.0 or newer, got {version!r}"


def gated_problems(cluster: Mapped) -> Iterator[str]:
    """Fields that ask for a feature gate, or that only go with another field."""
    options = cluster.get("gcsFaultToleranceOptions") or {}
    if options.get("backend") == "rocksdb":
        yield "gcsFaultToleranceOptions.backend: rocksdb is behind GCSFaultToleranceEmbeddedStorage"
    elif options and not options.get("redisAddress"):
        yield "gcsFaultToleranceOptions.redisAddress: missing"
    if options.get("storage") and options.get("backend") != "rocksdb":
        yield "gcsFaultToleranceOptions.storage: goes with backend rocksdb"
    if (cluster.get("tlsOptions") or {}).get("enabled"):
        yield "tlsOptions: is behind the feature gate RayClusterMTLS, which is off"
    policy = cluster.get("networkPolicy")
    if policy:
        yield "networkPolicy: is behind the feature gate RayClusterNetworkPolicy, which is off"
        unwanted = {"DenyAllIngress": "egressRules", "DenyAllEgress": "ingressRules"}
        refused = unwanted.get(str(policy.get("mode")))
        for place in ("head", "worker"):
            if refused and (policy.get(place) or {}).get(refused):
                yield f"networkPolicy.{place}.{refused}: does not go with mode {policy['mode']}"
    version = (cluster.get("autoscalerOptions") or {}).get("version")
    for group in cluster.get("workerGroupSpecs") or []:
        place = f"workerGroupSpecs[{group.get('groupName')}]"
        if group.get("suspend") and cluster.get("enableInTreeAutoscaling"):
            yield f"{place}: suspend does not go with enableInTreeAutoscaling"
        if group.get("idleTimeoutSeconds") is not None and version != "v2":
            yield f"{place}: idleTimeoutSeconds needs autoscalerOptions.version v2"


def upgrade_problems(spec: Mapped, cluster: Mapped) -> Iterator[str]:
    """Of an incremental upgrade: what it needs, and the range of its steps."""
    strategy = spec.get("upgradeStrategy") or {}
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    if not cluster.get("enableInTreeAutoscaling"):
        yield "upgradeStrategy: an incremental upgrade needs enableInTreeAutoscaling: true"
    options = strategy.get("clusterUpgradeOptions")
    if not options:
        yield "upgradeStrategy.clusterUpgradeOptions: missing"
        return
    for name in ("maxSurgePercent", "stepSizePercent"):
        if not 0 <= options.get(name, 100) <= 100:
            yield f"clusterUpgradeOptions.{name}: got {options[name]}, expected 0 to 100"
    if options.get("intervalSeconds", 0) <= 0:
        yield "clusterUpgradeOptions.intervalSeconds: expected more than 0"
    if not options.get("gatewayClassName"):
        yield "clusterUpgradeOptions.gatewayClassName: missing"


def service_problems(spec: Mapped, cluster: Mapped) -> Iterator[str]:
    service = (cluster.get("headGroupSpec") or {}).get("headService") or {}
    if (service.get("metadata") or {}).get("name"):
        yield "headGroupSpec.headService.metadata.name: must not be set in a RayService"
    upgrade = (spec.get("upgradeStrategy") or {}).get("type")
    if upgrade not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy.type: {upgrade!r} is not known"
    if (spec.get("rayClusterDeletionDelaySeconds") or 0) < 0:
        yield "rayClusterDeletionDelaySeconds: must not be negative"


def groups(cluster: Mapped) -> Iterator[tuple[str, Mapped]]:
    """(place, group) of the head and of every worker group."""
    yield "headGroupSpec", cluster.get("headGroupSpec") or {}
    for group in cluster.get("workerGroupSpecs") or []:
        yield f"workerGroupSpecs[{group.get('groupName')}]", group


def template(group: Mapped) -> Mapped:
    """The pod spec of a group."""
    spec: Mapped = (group.get("template") or {}).get("spec") or {}
    return spec


def head_env(cluster: Mapped) -> dict[str, str]:
    """Environment of the head's Ray container, which is the first one."""
    containers = template(cluster.get("headGroupSpec") or {}).get("containers") or [{}]
    return {item["name"]: str(item.get("value", "")) for item in containers[0].get("env") or []}
