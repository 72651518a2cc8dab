"""What `moetier deploy render --set KEY=VALUE` may change, each a pure change of the documents.

The documents given are left as they are; a key that an overlay has no place for is an error.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from cluster.pod_rules import containers, pods, quantity

Document = dict[str, Any]
Change = Callable[[list[Document], str], None]

OUR_IMAGE = "moetier"
DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
REPOSITORY = re.compile(
    r"([a-z0-9][-a-z0-9.]*(:\d+)?/)?[a-z0-9][-a-z0-9._]*(/[a-z0-9][-a-z0-9._]*)*"
)
TAG = re.compile(r"[A-Za-z0-9_][-A-Za-z0-9_.]{0,120}")
MAX_NODES = 1000


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE texts as a mapping. Raises ValueError for a key unknown or doubled, or no value."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--set: got {key!r}, expected one of {', '.join(KEYS)}{hint}")
        if not equals or not value.strip():
            raise ValueError(f"--set {key}: got no value, expected {key}=VALUE")
        if key in found:
            raise ValueError(f"--set {key}: given twice")
        found[key] = value.strip()
    return found


def with_settings(documents: Sequence[Document], settings: Mapping[str, str]) -> list[Document]:
    """The documents with these keys of KEYS changed. Raises ValueError naming the key."""
    changed = copy.deepcopy(list(documents))
    for key in (key for key in KEYS if key in settings):  # the image's name goes after its tag
        try:
            KEYS[key][1](changed, settings[key])
        except ValueError as error:
            raise ValueError(f"--set {key}: {error}") from error
    return changed


def the_service(documents: Sequence[Document]) -> Document:
    """The one RayService. Raises ValueError when there is not exactly one."""
    found = [each for each in documents if each["kind"] == "RayService"]
    if len(found) != 1:
        raise ValueError(f"got {len(found)} RayServices, expected one")
    return found[0]


def group_named(documents: Sequence[Document], name: str) -> Document:
    """A worker group. Raises ValueError when the overlay has none of this name."""
    cluster = the_service(documents)["spec"]["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        if group["groupName"] == name:
            found: Document = group
            return found
    raise ValueError(f"this overlay has no group {name}")


def change_args(documents: Sequence[Document], change: Callable[[Document], None]) -> None:
    """Change the args of the application inside the RayService's text."""
    spec = the_service(documents)["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    change(config["applications"][0]["args"])
    spec["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)


def _namespace(documents: list[Document], value: str) -> None:
    _expect(DNS_1123, value, "a namespace such as moetier")
    for document in documents:
        document["metadata"]["namespace"] = value


def _image(documents: list[Document], value: str) -> None:
    _expect(REPOSITORY, value, "REGISTRY/NAME without a tag")
    for container in _our_containers(documents):
        container["image"] = f"{value}:{container['image'].rpartition(':')[2]}"


def _tag(documents: list[Document], value: str) -> None:
    _expect(TAG, value, "a tag such as 0.1.0; -cpu or -gpu is added")
    for container in _our_containers(documents):
        name, _, old = container["image"].rpartition(":")
        container["image"] = f"{name}:{value}-{old.rpartition('-')[2]}"


def _compress_option(index: int) -> Change:
    def change(documents: list[Document], value: str) -> None:
        if value.startswith("-"):
            raise ValueError(f"got {value!r}, which would be an option")
        jobs = [each for each in documents if each["kind"] == "Job"]
        found = [c for job in jobs for _, pod, _ in pods(job) for c in containers(pod)]
        commands = [c["command"] for c in found if c["name"] == "compress"]
        if len(commands) != 1:
            raise ValueError("this overlay has no job that compresses")
        commands[0][index] = value

    return change


def _nodes(name: str) -> Change:
    def change(documents: list[Document], value: str) -> None:
        number = _count(value)
        group = group_named(documents, name)
        group["replicas"] = group["minReplicas"] = number
        group["maxReplicas"] = max(number, group["maxReplicas"])
        if name == "memory":
            change_args(documents, lambda args: _copies(args, number))

    return change


def _copies(args: Document, number: int) -> None:
    """A node holds one copy, and runs one near-data worker."""
    args["store"]["replicas"] = args["ndp"]["replicas"] = number


def _max_gpu_nodes(documents: list[Document], value: str) -> None:
    number, group = _count(value), group_named(documents, "gpu")
    if number < group["minReplicas"]:
        raise ValueError(f"got {number}, which is under the least, {group['minReplicas']}")
    group["maxReplicas"] = number

    def change(args: Document) -> None:
        args["replicas"]["autoscaling"]["max_replicas"] = number

    change_args(documents, change)


def _memory(documents: list[Document], value: str) -> None:
    quantity(value)
    resources = group_named(documents, "memory")["template"]["spec"]["containers"][0]["resources"]
    resources["requests"]["memory"] = resources["limits"]["memory"] = value


def _storage(documents: list[Document], value: str) -> None:
    quantity(value)
    _claim(documents)["resources"]["requests"]["storage"] = value


def _storage_class(documents: list[Document], value: str) -> None:
    _expect(re.compile(r"[a-z0-9][-a-z0-9.]*"), value, "a storage class")
    _claim(documents)["storageClassName"] = value


def _object_storage(key: str) -> Change:
    def change(documents: list[Document], value: str) -> None:
        for document in documents:
            if document["kind"] == "ConfigMap" and key in (document.get("data") or {}):
                document["data"][key] = value
                return
        raise ValueError("this overlay keeps no store in object storage")

    return change


def _redis(documents: list[Document], value: str) -> None:
    """An address of one's own in place of the Redis beside the cluster, which goes."""
    match = re.fullmatch(r"([a-z0-9][-a-z0-9.]*):(\d{1,5})", value)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ValueError(f"got {value!r}, expected HOST:PORT")
    spec = the_service(documents)["spec"]
    options = spec["rayClusterConfig"].get("gcsFaultToleranceOptions")
    if options is None:
        raise ValueError("this overlay has no Redis")
    old, options["redisAddress"] = options["redisAddress"], value
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(f"redis://{old}/", f"redis://{value}/")
    name = old.partition(":")[0]
    documents[:] = [each for each in documents if each["metadata"]["name"] != name]
    for document in documents:
        if document["metadata"]["name"] == "moetier-ray-to-redis":
            port = {"protocol": "TCP", "port": int(match[2])}
            document["spec"]["egress"] = [{"ports": [port]}]


def _our_containers(documents: Sequence[Document]) -> Iterator[Document]:
    for document in documents:
        for _, pod, _ in pods(document):
            for container in containers(pod):
                name = container["image"].rpartition(":")[0]
                if name.rpartition("/")[2] == OUR_IMAGE:
                    assert isinstance(container, dict)
                    yield container


def _claim(documents: Sequence[Document]) -> Document:
    for document in documents:
        if document["kind"] == "PersistentVolumeClaim":
            spec: Document = document["spec"]
            return spec
    raise ValueError("this overlay has no shared volume")


def _count(value: str) -> int:
    if not value.isdecimal() or not 1 <= int(value) <= MAX_NODES:
        raise ValueError(f"got {value!r}, expected 1 to {MAX_NODES}")
    return int(value)


def _expect(pattern: re.Pattern[str], value: str, what: str) -> None:
    if not pattern.fullmatch(value):
        raise ValueError(f"got {value!r}, expected {what}")


KEYS: dict[str, tuple[str, Change]] = {
    "namespace": ("of everything", _namespace),
    "tag": ("of moetier's image, without -cpu or -gpu", _tag),
    "image": ("registry and name of moetier's image, without a tag", _image),
    "model": ("what the job compresses: a Hub id, or a folder in the image", _compress_option(2)),
    "recipe": ("of the job, as of moetier compress", _compress_option(5)),
    "memory_nodes": ("memory pods; each holds a copy and runs near data", _nodes("memory")),
    "gpu_nodes": ("GPU pods at least", _nodes("gpu")),
    "max_gpu_nodes": ("GPU pods and workers at most", _max_gpu_nodes),
    "memory": ("of each memory pod, such as 64Gi; see --size-for", _memory),
    "storage": ("size of the shared volume", _storage),
    "storage_class": ("of the shared volume", _storage_class),
    "redis": ("HOST:PORT of a Redis of your own, in place of the one beside it", _redis),
    "endpoint": ("URL of the object storage", _object_storage("endpoint")),
    "bucket": ("in the object storage", _object_storage("bucket")),
}


def shm_bytes(documents: Sequence[Document]) -> int:
    """The size of /dev/shm of the memory group."""
    for volume in group_named(documents, "memory")["template"]["spec"]["volumes"]:
        if (volume.get("emptyDir") or {}).get("medium") == "Memory":
            return int(quantity(volume["emptyDir"]["sizeLimit"]))
    raise ValueError("the memory group has no /dev/shm of a size")
