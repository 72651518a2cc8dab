"""What a cluster can be told, section by section: frozen, checked at the door, without torch.

The whole is `cluster/config.py`; a GPU worker's own fields are `gpu_worker/config.py`. Each class's
docstring is its documentation in `deploy/cluster.example.yaml`, field by field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cluster.autoscaling_settings import AutoscalingSettings
from cluster.memory_scaling_settings import MemoryScalingSettings
from cluster.strict import within
from expert_store.redis_url import RedisAddress, parse_redis_url

Transport = Literal["object_store", "grpc"]
Compression = Literal["none", "zstd"]
Placement = Literal["auto", "full", "spread"]
DirectoryKind = Literal["memory", "redis"]

_LABEL = re.compile(r"{0}(/{0})?={0}".format(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"))


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The expert store and the actors that hold it.

    - path: folder of the store, the same on every node that holds it; "auto" is `make demo`'s.
    - placement: full (every actor holds all), spread (every node with the label holds a part, so
      that copies of each expert lie on several and hot ones on more), or auto: spread where some
      node has no room for all but all together have room for the copies, else full.
    - replicas: with full, copies, one actor each, spread over the nodes that carry the label; null
      is two where two nodes carry it, else one.
    - autoscaling: with full, replicas and near-data workers by use of links; null is as many as
      replicas says.
    - copies: with spread, of every expert, on different nodes; fewer where there are fewer nodes.
    - node_bytes: with spread or auto, bytes of records that a node may hold; null is 60 % of the
      memory that Ray knows of it.
    - transport: how records reach a GPU worker: object_store (Ray, zero copy on one node) or grpc.
    - compression: of records on their way over grpc: none, or zstd (min/max and HQQ codes lose 10
      to 25 % of their bytes, searched grids 6 to 9 %; a GB takes each host up to 2 s of a core, the
      sender only once). For links under 1 Gbit/s, or where bytes are paid for.
    - label: Ray node label, "key=value", that a node must carry to hold a copy; null is any node.
    - start_timeout_s: seconds a tier actor may take until it answers, before that is an error.
    - lease_s: seconds after which a tier actor that no tier manager asks any more ends by itself;
      until then workers read from it, and a manager that is restarted takes it over.
    - scrub_mb_per_s: MB of records that each tier actor hashes anew a second, over and over, to
      find damage that came after a record was first read; 0 leaves that out.
    - port_range: TCP ports, "first-last", of which each actor takes the first free one to serve
      records on, so that a firewall can let them through; null is any free port.
    """

    path: str = "auto"
    placement: Placement = "auto"
    replicas: int | None = None
    autoscaling: MemoryScalingSettings | None = None
    copies: int = 2
    node_bytes: int | None = None
    transport: Transport = "object_store"
    compression: Compression = "none"
    label: str | None = "moetier.io/store=true"
    start_timeout_s: float = 60.0
    lease_s: float = 300.0
    scrub_mb_per_s: float = 4.0
    port_range: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: got an empty text, expected a folder or auto")
        if self.compression != "none" and self.transport != "grpc":
            raise ValueError(
                f"compression: got {self.compression} with transport {self.transport}; only grpc "
                "compresses: set transport grpc, or compression none"
            )
        within("replicas", self.replicas, 1, 64)
        if self.autoscaling is not None and (self.replicas or self.placement != "full"):
            raise ValueError(
                "autoscaling: given together with replicas, or with a placement that is not full; "
                "set placement full and leave replicas out, or set autoscaling to null"
            )
        within("copies", self.copies, 1, 16)
        within("node_bytes", self.node_bytes, 1 << 20, 1 << 50)
        _check_label(self.label)
        within("start_timeout_s", self.start_timeout_s, 1, 3600)
        within("lease_s", self.lease_s, 10, 86400)
        within("scrub_mb_per_s", self.scrub_mb_per_s, 0, 10_000)
        split_ports(self.port_range)


@dataclass(frozen=True, slots=True)
class NdpSettings:
    """Near-data workers: they run experts beside the store, so only activations travel.

    - enabled: whether they are started; worker.near_data then becomes low_bit if it is off.
    - replicas: number of workers, spread over the nodes that carry the label; null is two where two
      nodes carry it, else one. Where the store is spread, one on every node of it with the label.
    - num_threads: compute threads of each; null is the cores of its node.
    - label: Ray node label, "key=value", that a node must carry; null is any node.
    - port_range: TCP ports, "first-last", as store.port_range; null is any free port.
    """

    enabled: bool = False
    replicas: int | None = None
    num_threads: int | None = None
    label: str | None = "moetier.io/ndp=true"
    port_range: str | None = None

    def __post_init__(self) -> None:
        within("replicas", self.replicas, 1, 64)
        within("num_threads", self.num_threads, 1, 1024)
        _check_label(self.label)
        split_ports(self.port_range)


OUTLAST_S = 5.0
"""The ingress and the tiers stand so much longer than a worker may drain: they still tell of a
worker that had to be ended, and its last requests still find their experts."""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """The GPU workers as a Serve deployment: how many, where, and how much each may have waiting.

    - num_replicas: fixed number of workers; ignored when autoscaling is given.
    - label: Ray node label, "key=value", that a node must carry; null is any node.
    - num_cpus: CPUs that Ray sets aside for each worker, and its threads when it runs on the CPU.
    - num_gpus: GPUs that Ray sets aside for each; null is 1, or 0 with worker.device cpu or
      where the cluster has no GPU.
    - max_waiting: requests that one worker keeps waiting for a slot; more wait at the ingress.
    - drain_s: seconds a worker that is told to stop may take to end the requests it has; streams
      that are not done by then end with an error event.
    - max_surge_percent: workers that may start beyond their number before old ones stop, when
      another version rolls in. 0 stops one first, and needs no room; with a single worker requests
      then wait until the new one is up.
    - autoscaling: see below; null keeps num_replicas.
    """

    num_replicas: int = 1
    label: str | None = "moetier.io/worker=true"
    num_cpus: float = 1.0
    num_gpus: float | None = None
    max_waiting: int = 32
    drain_s: float = 15.0
    max_surge_percent: int = 0
    autoscaling: AutoscalingSettings | None = None

    def __post_init__(self) -> None:
        within("num_replicas", self.num_replicas, 1, 1000)
        _check_label(self.label)
        within("num_cpus", self.num_cpus, 0, 1024)
        within("num_gpus", self.num_gpus, 0, 64)
        within("max_waiting", self.max_waiting, 0, 100_000)
        within("drain_s", self.drain_s, 1, 3600)
        within("max_surge_percent", self.max_surge_percent, 0, 100)


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """The HTTP endpoint.

    - host: address to listen on; 127.0.0.1 is this machine only, 0.0.0.0 is every network.
    - port: TCP port; 0 picks a free one.
    - replicas: ingress replicas; two or more keep answering while one is replaced. Requests inside
      one that dies are lost: a stream breaks off (incomplete chunked read), others are 500.
    - max_body_bytes: largest request body; larger is answered 413.
    - request_timeout_s: seconds a request may take in all; then it is cancelled and answered 408.
    - max_queued: requests that wait at one ingress for busy workers; more are answered 429.
    - retry_after_s: what a 429 or 503 tells the client to wait, in seconds.
    - record_requests: folder on each ingress' machine where times and token counts of requests,
      never their text, are written for `moetier tune`; null writes none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 2
    max_body_bytes: int = 4 << 20
    request_timeout_s: float = 600.0
    max_queued: int = 64
    retry_after_s: int = 1
    record_requests: str | None = None

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("host: got an empty text, expected an address such as 127.0.0.1")
        within("port", self.port, 0, 65535)
        within("replicas", self.replicas, 1, 1000)
        within("max_body_bytes", self.max_body_bytes, 1024, 1 << 30)
        within("request_timeout_s", self.request_timeout_s, 0.1, 86400)
        within("max_queued", self.max_queued, 1, 100_000)
        within("retry_after_s", self.retry_after_s, 1, 3600)


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """Who knows which endpoint serves which part of the store.

    - kind: memory (inside the tier manager; one cluster) or redis (outlives it).
    - redis_url: redis://HOST:PORT/DB, or redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB where
      Sentinels know the master; rediss instead of redis is TLS. Without user or password.
    - password_file: file that holds the Redis password and nothing else, read for every new
      connection, so that it can be rotated; null is no password.
    - sentinel_password_file: the same for the Sentinels' own password.
    - ca_file: PEM file of the CAs that TLS trusts; null is the system's.
    """

    kind: DirectoryKind = "memory"
    redis_url: str | None = None
    password_file: str | None = None
    sentinel_password_file: str | None = None
    ca_file: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "memory" and (self.redis_url or self.password_file):
            raise ValueError("kind: got memory together with redis_url or password_file; use redis")
        if self.kind == "redis" and not self.redis_url:
            raise ValueError("redis_url: got nothing, kind redis needs redis://HOST:PORT/DB")
        self._check_url()

    def _check_url(self) -> None:
        url = self.redis_url or ""
        if "@" in url:
            raise ValueError(
                "redis_url: expected no user or password in it (it is logged); the password goes "
                "into password_file"
            )
        address = _parse_redis_url(url) if url else None
        if self.sentinel_password_file and (address is None or address.service is None):
            raise ValueError(
                "sentinel_password_file: given without Sentinels; use redis+sentinel://, or null"
            )
        if self.ca_file and (address is None or not address.is_tls):
            raise ValueError("ca_file: given without TLS; use rediss:// in redis_url, or null")


def _parse_redis_url(url: str) -> RedisAddress:
    """As `parse_redis_url`, its ValueError naming the field."""
    try:
        return parse_redis_url(url)
    except ValueError as error:
        raise ValueError(f"redis_url: {error}") from error


def split_label(label: str | None) -> dict[str, str]:
    """ "key=value" as a Ray label selector; None selects any node."""
    if label is None:
        return {}
    key, _, value = label.partition("=")
    return {key: value}


def split_ports(ports: str | None) -> tuple[int, int] | None:
    """ "20000-20031" as first and last port; None stays None.

    Raises ValueError for another form, ports below 1024 or above 65535, and a last below a first.
    """
    if ports is None:
        return None
    match = re.fullmatch(r"(\d{4,5})-(\d{4,5})", ports)
    if match is None or not 1024 <= int(match[1]) <= int(match[2]) <= 65535:
        raise ValueError(
            f"port_range: got {ports!r}, expected FIRST-LAST within 1024 to 65535, such as "
            "20000-20031"
        )
    return int(match[1]), int(match[2])


def _check_label(label: str | None) -> None:
    if label is not None and not _LABEL.fullmatch(label):
        raise ValueError(
            f"label: got {label!r}, expected key=value as for Kubernetes labels, "
            "for example moetier.io/store=true"
        )
