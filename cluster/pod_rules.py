"""What we ask of every pod we deploy: restricted security, fixed images, limits, room in /dev/shm.

Pure functions over documents of any kind that holds pod templates. Knows nothing of Ray but two
names: the object store's start parameter and the folder it lives in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from cluster.operator_rules import groups, template

Mapped = Mapping[str, Any]

SHM = "/dev/shm"
UNITS = {
    "m": Decimal("0.001"),
    "": Decimal(1),
    **{name: Decimal(1000) ** power for power, name in enumerate("kMGT", start=1)},
    **{f"{name}i": Decimal(1024) ** power for power, name in enumerate("KMGT", start=1)},
}


def pod_problems(document: Mapped) -> Iterator[str]:
    """Every breach of a rule in the pods of this document, as "place: what is wrong"."""
    for place, pod, params in pods(document):
        for problem in (*security_problems(pod), *container_problems(pod)):
            yield f"{place}: {problem}"
        for problem in shared_memory_problems(pod, params):
            yield f"{place}: {problem}"


def pods(document: Mapped) -> Iterator[tuple[str, Mapped, Mapped]]:
    """(place, pod spec, Ray start parameters) of each pod template of a document."""
    spec = document.get("spec") or {}
    if document["kind"] == "RayService":
        for place, group in groups(spec.get("rayClusterConfig") or {}):
            yield place, template(group), group.get("rayStartParams") or {}
    elif document["kind"] in ("Job", "Deployment", "StatefulSet", "DaemonSet"):
        pod = template(spec)
        claimed = [{"name": c["metadata"]["name"]} for c in spec.get("volumeClaimTemplates") or []]
        if claimed:
            pod = {**pod, "volumes": [*(pod.get("volumes") or []), *claimed]}
        yield "template", pod, {}


def security_problems(pod: Mapped) -> Iterator[str]:
    """The Pod Security Standard "restricted", as far as our pods could break it."""
    whole = pod.get("securityContext") or {}
    if whole.get("runAsNonRoot") is not True:
        yield "securityContext.runAsNonRoot: expected true"
    if (whole.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "securityContext.seccompProfile: expected RuntimeDefault"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name}: expected nothing or false"
    for volume in pod.get("volumes") or []:
        if "hostPath" in volume:
            yield f"volume {volume.get('name')}: hostPath is not restricted"
    for container in containers(pod):
        context = container.get("securityContext") or {}
        place = f"container {container.get('name')}"
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{place}: allowPrivilegeEscalation: expected false"
        if (context.get("capabilities") or {}).get("drop") != ["ALL"]:
            yield f"{place}: capabilities.drop: expected [ALL]"
        if context.get("privileged") or (context.get("capabilities") or {}).get("add"):
            yield f"{place}: privileged or added capabilities"


def container_problems(pod: Mapped) -> Iterator[str]:
    mounts = {volume.get("name") for volume in pod.get("volumes") or []}
    for container in containers(pod):
        place = f"container {container.get('name')}"
        image = str(container.get("image") or "")
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"{place}: image {image!r} has no fixed tag"
        resources = container.get("resources") or {}
        limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
        for name in ("cpu", "memory"):
            if name not in requests or name not in limits:
                yield f"{place}: resources: no request and limit for {name}"
            elif quantity(requests[name]) > quantity(limits[name]):
                yield f"{place}: resources: {name} request is over its limit"
        for mount in container.get("volumeMounts") or []:
            if mount.get("name") not in mounts:
                yield f"{place}: volumeMount {mount.get('name')!r} has no volume"


def shared_memory_problems(pod: Mapped, params: Mapped) -> Iterator[str]:
    """Ray's object store must fit into /dev/shm, and /dev/shm into the container's memory.

    A smaller /dev/shm makes Ray fall back to disk, or kills the process with SIGBUS (ray#14182).
    """
    wanted = params.get("object-store-memory")
    if wanted is None:
        return
    container = (pod.get("containers") or [{}])[0]
    names = [m["name"] for m in container.get("volumeMounts") or [] if m.get("mountPath") == SHM]
    volume: Mapped = next((v for v in pod.get("volumes") or [] if v.get("name") in names), {})
    size = (volume.get("emptyDir") or {}).get("sizeLimit")
    if (volume.get("emptyDir") or {}).get("medium") != "Memory" or size is None:
        yield f"{SHM}: expected an emptyDir of medium Memory with a sizeLimit"
        return
    if quantity(size) < quantity(wanted):
        yield f"{SHM}: sizeLimit {size} is under object-store-memory {wanted}"
    memory = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    if memory is not None and quantity(size) >= quantity(memory):
        yield f"{SHM}: sizeLimit {size} leaves nothing of the memory limit {memory}"


def containers(pod: Mapped) -> list[Mapped]:
    return [*(pod.get("initContainers") or []), *(pod.get("containers") or [])]


def quantity(value: object) -> Decimal:
    """A Kubernetes quantity as a number: "500m" is 0.5, "2Gi" is 2147483648.

    Raises ValueError for text that is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(value))
    if match is None or match[2] not in UNITS:
        raise ValueError(f"quantity: got {value!r}, expected for example 500m, 2 or 4Gi")
    return Decimal(match[1]) * UNITS[match[2]]
