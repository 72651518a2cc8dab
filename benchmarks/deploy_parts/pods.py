"""What an overlay's pods run, as a kubelet and KubeRay's operator would have it: plain values.

Each pod becomes a script for a host of its own: volumes mounted where the manifest says, then the
init containers' commands, then `ray start` with the group's parameters, or the container's command.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.deploy.network_rules import pod_labels
from cluster.operator_rules import template
from cluster.pod_rules import quantity

Mapped = Mapping[str, Any]
HEAD = "head"
GCS_PORT = 6379
MOUNT_ROOTS = ("/var/lib", "/run")
"""Folders in which the manifests mount: each host has an empty one of its own."""


@dataclass(frozen=True, slots=True)
class Volumes:
    """Folders of this machine that stand for what a cluster's storage holds."""

    folder: Path  # of all that is made for the pods
    claims: Mapping[str, Path]  # of each PersistentVolumeClaim
    secrets: Mapping[str, Mapping[str, str]]  # keys and values of each Secret


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod. `fields` are the places in the manifest that its start was made from."""

    name: str  # of its host too
    labels: Mapping[str, str]
    spec: Mapped  # of the pod
    fields: tuple[str, ...]
    group: Mapped | None = None  # of the RayService; None for a pod that runs no Ray

    @property
    def container(self) -> Mapped:
        found: Mapped = self.spec["containers"][0]
        return found


def overlay_pods(documents: Sequence[Mapped], rayservice: Mapped) -> tuple[Pod, ...]:
    """All of them, as many as there are at least: those beside Ray, the head, the worker groups."""
    cluster = rayservice["spec"]["rayClusterConfig"]
    found = []
    for document in documents:
        if document["kind"] == "StatefulSet":
            made, name = document["spec"]["template"], document["metadata"]["name"]
            fields = (f"StatefulSet/{name}: command, volumes",)
            found.append(Pod(name, made["metadata"]["labels"], _claimed(document), fields))
    head = cluster["headGroupSpec"]
    fields = ("headGroupSpec: rayStartParams, volumes",)
    found.append(Pod(HEAD, pod_labels(head), template(head), fields, head))
    for group in cluster.get("workerGroupSpecs") or []:
        name = group["groupName"]
        fields = (
            f"workerGroupSpecs[{name}]: rayStartParams, labels, resources.limits, "
            "initContainers, volumes, minReplicas",
        )
        for number in range(1, group["minReplicas"] + 1):
            found.append(Pod(f"{name}-{number}", pod_labels(group), template(group), fields, group))
    return tuple(found)


def service_names(
    documents: Sequence[Mapped], pods: Sequence[Pod], addresses: Mapping[str, str]
) -> dict[str, str]:
    """Name -> address, of every pod and of every Service with the first pod that it selects."""
    names = {pod.name: addresses[pod.name] for pod in pods}
    for document in documents:
        selector = (document.get("spec") or {}).get("selector")
        if document["kind"] == "Service" and selector:
            chosen = [pod for pod in pods if selector.items() <= pod.labels.items()]
            if chosen:
                names[document["metadata"]["name"]] = addresses[chosen[0].name]
    return names


def script(pod: Pod, volumes: Volumes, command: str) -> str:
    """Bash for the pod's host: mounts, init containers one after another, then `command`."""
    lines = ["set -eu", f"mount --bind {shlex.quote(str(volumes.folder / 'hosts'))} /etc/hosts"]
    lines += [f"mount -t tmpfs tmpfs {root}" for root in MOUNT_ROOTS]
    inits = pod.spec.get("initContainers") or []
    mounts = {
        mount["mountPath"]: (mount, mount in pod.container.get("volumeMounts", []))
        for container in [*inits, pod.container]
        for mount in container.get("volumeMounts") or []
    }
    by_name = {volume["name"]: volume for volume in pod.spec.get("volumes") or []}
    for place, (mount, _) in sorted(mounts.items()):
        lines += _mount(pod, by_name[mount["name"]], place, volumes)
    for container in inits:
        lines.append(shlex.join(container["command"]))
    for place, (mount, is_main) in sorted(mounts.items()):
        if is_main and mount.get("readOnly"):
            lines.append(f"mount -o remount,bind,ro {place}")
    return "\n".join([*lines, f"exec {command}", ""])


def ray_command(pod: Pod, cluster: Mapped, address: str) -> str:
    """`ray start` as the operator makes it: the group's parameters, labels and limits."""
    assert pod.group is not None
    params = dict(pod.group.get("rayStartParams") or {})
    limits = pod.container["resources"]["limits"]
    params.setdefault("num-cpus", str(int(quantity(limits["cpu"]))))
    params.setdefault("memory", str(int(quantity(limits["memory"]))))
    if gpus := int(quantity(limits.get("nvidia.com/gpu", 0))):
        params.setdefault("num-gpus", str(gpus))
    words = ["ray", "start", "--block", f"--node-ip-address={address}"]
    if pod.name == HEAD:
        words += ["--head", f"--port={GCS_PORT}", "--dashboard-host=0.0.0.0"]
    else:
        words += [f"--address={HEAD}:{GCS_PORT}"]
    words += [f"--{name}={value}" for name, value in params.items()]
    if labels := pod.group.get("labels"):
        words.append("--labels=" + ",".join(f"{key}={value}" for key, value in labels.items()))
    if pod.name == HEAD and (cluster.get("gcsFaultToleranceOptions") or {}).get("redisPassword"):
        return shlex.join(words) + ' --redis-password="$REDIS_PASSWORD"'
    return shlex.join(words)


def environment(pod: Pod, cluster: Mapped, volumes: Volumes, token: str) -> dict[str, str]:
    """The container's own variables, and those that the operator adds."""
    found: dict[str, str] = {}
    for item in pod.container.get("env") or []:
        found[item["name"]] = str(item["value"]) if "value" in item else _secret(item, volumes)
    if pod.group is None:
        return found
    if (cluster.get("authOptions") or {}).get("mode") == "token":
        found |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    options = cluster.get("gcsFaultToleranceOptions")
    if options and pod.name == HEAD:
        found["RAY_REDIS_ADDRESS"] = options["redisAddress"]
        if password := options.get("redisPassword"):
            found["REDIS_PASSWORD"] = _secret(password, volumes)
    return found


def fit_this_machine(config: dict[str, Any]) -> Iterator[str]:
    """Change in a Serve config what a machine without GPU and with few cores cannot have.

    Yields each change, in words.
    """
    for application in config["applications"]:
        args = application["args"]
        changes: list[tuple[str, str, object]] = [("worker", "device", "cpu")]
        if args.get("ndp", {}).get("enabled"):
            changes.append(("ndp", "num_threads", 1))
        for section, name, value in changes:
            before = args[section].get(name)
            if before != value:
                args[section][name] = value
                yield f"`args.{section}.{name}` {json.dumps(before)} to {json.dumps(value)}"


def _mount(pod: Pod, volume: Mapped, place: str, volumes: Volumes) -> Iterator[str]:
    yield f"mkdir -p {place}"
    memory = (volume.get("emptyDir") or {}).get("medium") == "Memory"
    if memory:
        size = int(quantity(volume["emptyDir"]["sizeLimit"]))
        yield f"mount -t tmpfs -o size={size} tmpfs {place}"
        return
    if "persistentVolumeClaim" in volume:
        source = volumes.claims[volume["persistentVolumeClaim"]["claimName"]]
    elif "secret" in volume:
        source = volumes.folder / "secrets" / volume["secret"]["secretName"]
    else:
        source = volumes.folder / "disks" / pod.name / volume["name"]
    there = shlex.quote(str(source))
    yield f"mkdir -p {there}"
    yield f"mount --bind {there} {place}"


def _claimed(stateful_set: Mapped) -> Mapped:
    """The pod of a StatefulSet, its claims as volumes of its own."""
    spec = stateful_set["spec"]
    own = [
        {"name": claim["metadata"]["name"], "emptyDir": {}}
        for claim in spec.get("volumeClaimTemplates") or []
    ]
    pod = spec["template"]["spec"]
    return {**pod, "volumes": [*(pod.get("volumes") or []), *own]}


def _secret(item: Mapped, volumes: Volumes) -> str:
    reference = item["valueFrom"]["secretKeyRef"]
    return volumes.secrets[reference["name"]][reference["key"]]
