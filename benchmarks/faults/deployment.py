"""A moetier cluster on hosts of its own: Redis, a head, memory nodes, GPU nodes, one application.

Owns what is started where, what is restarted when it ends (as a kubelet would), and whether all of
it stands. Talks to Ray over HTTP alone, as an operator does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from benchmarks.faults.hosts import Host, Network
from benchmarks.offload_parts.hosts import ROOT
from cluster.environment import RAY_DEFAULTS

logger = logging.getLogger(__name__)

Gcs = Literal["redis", "rocksdb"]
MEMORY, GPU = ("memory-1", "memory-2"), ("gpu-1", "gpu-2")
SPARE = "memory-3"
NAMES = ("redis", "head", *MEMORY, *GPU, "client", SPARE)
STORE = "/tmp/store"
"""On every host: its own copy, since each has a /tmp of its own."""
GCS_PORT, DASHBOARD_PORT, HTTP_PORT, REDIS_PORT = 6379, 8265, 8000, 6390
AGENT_PORTS = {
    "metrics-export": 8080,
    "dashboard-agent-grpc": 52364,
    "dashboard-agent-listen": 52365,
    "runtime-env-agent": 52366,
}
OBJECT_STORE_BYTES = 100 << 20
APPLICATION = "moetier"
START_S = 400.0
CALL_S = 8.0
RESTART_S = 2.0
"""From the end of a host's service to its next start, as after a kubelet's first back-off."""
TITLES: Mapping[str, str] = {
    "store": "ray::StoreActor",
    "near-data worker": "ray::NdpActor",
    "GPU worker": f"ray::ServeReplica:{APPLICATION}:GpuWorker",
    "ingress": f"ray::ServeReplica:{APPLICATION}:Ingress",
    "tier manager": f"ray::ServeReplica:{APPLICATION}:TierManager",
}
WANTED: Mapping[str, int] = {
    "store": 2,
    "near-data worker": 2,
    "GPU worker": 2,
    "ingress": 2,
    "tier manager": 1,
}


@dataclass(frozen=True, slots=True)
class State:
    """What stands at one moment. `problems` is empty when everything does."""

    problems: tuple[str, ...]
    processes: Mapping[str, int] = field(default_factory=dict)


class Deployment:
    """The cluster, from `with` to its end. `store` is copied to every host that needs it."""

    def __init__(self, store: Path, folder: Path, *, gcs: Gcs = "redis") -> None:
        self._store, self._gcs = store, gcs
        self.folder = folder
        self.network = Network(NAMES, folder)
        self._supervised: set[str] = set()
        self._ended = threading.Event()
        self._kubelet = threading.Thread(target=self._supervise, daemon=True)

    def __enter__(self) -> Deployment:
        self.network.__enter__()
        try:
            self._kubelet.start()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Everything off; nothing is left but the folder, which is the caller's."""
        self._ended.set()
        if self._kubelet.ident is not None:
            self._kubelet.join()
        self.network.close()

    def host(self, name: str) -> Host:
        return self.network[name]

    @property
    def doors(self) -> tuple[str, ...]:
        """URLs of the proxies in front of the ingress replicas."""
        return tuple(f"http://{self.host(name).address}:{HTTP_PORT}" for name in GPU)

    @property
    def dashboard(self) -> str:
        return f"http://{self.host('head').address}:{DASHBOARD_PORT}"

    def boot(self, name: str) -> None:
        """Start a host's service, and again whenever it ends."""
        self.host(name).start(self._service(name), self._environment(name))
        self._supervised.add(name)

    def shut(self, name: str) -> None:
        """Off, and not started again until `boot`."""
        self._supervised.discard(name)
        self.host(name).power_off()

    def kill_somewhere(self, part: str, names: Sequence[str] = NAMES) -> str:
        """SIGKILL a part on the first of the hosts that has it; that host's name."""
        for name in names:
            if self.host(name).processes(TITLES[part]):
                self.host(name).kill(TITLES[part])
                return name
        raise LookupError(f"no {part} on {', '.join(names)}")

    def where(self, part: str) -> str:
        """The first host that has such a process. Raises LookupError."""
        for name in NAMES:
            if self.host(name).processes(TITLES[part]):
                return name
        raise LookupError(f"no {part} on any host")

    def state(self) -> State:
        """Asked of the processes, of Serve and of the application; never raises."""
        counts = {
            part: sum(len(self.host(name).processes(title)) for name in NAMES)
            for part, title in TITLES.items()
        }
        problems = [
            f"{counts[part]} of {wanted} processes of {part}"
            for part, wanted in WANTED.items()
            if counts[part] != wanted
        ]
        if not problems:
            problems += [*self._serve_problems(), *self._health_problems()]
        return State(tuple(problems), counts)

    def until_full(self, deadline_s: float, *, times: int = 3) -> float | None:
        """When all stood for the first of `times` looks in a row; None if not in time."""
        end = time.monotonic() + deadline_s
        since, seen, told = 0.0, 0, ""
        while time.monotonic() < end:
            now, problems = time.monotonic(), self.state().problems
            if problems:
                seen = 0
                if told != problems[0]:
                    logger.info("not whole: %s", told := problems[0])
            else:
                since = since if seen else now
                seen += 1
                if seen == times:
                    return since
            time.sleep(0.3)
        return None

    def get(self, url: str, body: object = None, *, method: str | None = None) -> Any:
        """The JSON answer over the client's network. Raises OSError, or ValueError for no JSON."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, headers, method=method)
        with (
            self.host("client").inside(),
            urllib.request.urlopen(request, timeout=CALL_S) as answer,
        ):
            text = answer.read()
        return json.loads(text) if text else None

    def _start(self) -> None:
        for name in (*MEMORY, *GPU, SPARE):
            shutil.copytree(self._store, self.host(name).folder / "tmp/store")
        # Serve builds the application, and so reads the store, on whichever node it likes.
        shutil.copytree(self._store, self.host("head").folder / "tmp/store")
        self.boot("redis")
        time.sleep(0.5)
        self.boot("head")
        self._until(lambda: self._serve() is not None, "the dashboard")
        for name in (*MEMORY, *GPU):
            self.boot(name)
        self._until(lambda: len(self._alive_nodes()) == 1 + len(MEMORY) + len(GPU), "the nodes")
        url = f"{self.dashboard}/api/serve/applications/"
        self.get(url, serve_config(self.host("redis").address), method="PUT")
        if self.until_full(START_S) is None:
            raise RuntimeError(f"not whole within {START_S:g} s: {self.state().problems}")

    def _until(self, condition: Any, what: str) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError):
                if condition():
                    return
            time.sleep(0.5)
        raise RuntimeError(f"{what}: not there within {START_S:g} s; logs are in {self.folder}")

    def _serve(self) -> Any:
        return self.get(f"{self.dashboard}/api/serve/applications/")

    def _alive_nodes(self) -> list[Any]:
        nodes = self.get(f"{self.dashboard}/api/v0/nodes")["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def node_id(self, name: str) -> str:
        """Ray's id of the live node on that host. Raises OSError, LookupError."""
        for node in self._alive_nodes():
            if node["node_ip"] == self.host(name).address:
                return str(node["node_id"])
        raise LookupError(f"Ray has no live node on {name}")

    def _serve_problems(self) -> Iterator[str]:
        try:
            application = self._serve()["applications"].get(APPLICATION, {})
        except (OSError, ValueError) as error:
            yield f"Serve's REST API: {error}"
            return
        if application.get("status") != "RUNNING":
            yield f"the application is {application.get('status')}"
        for name, each in application.get("deployments", {}).items():
            running = [r for r in each["replicas"] if r["state"] == "RUNNING"]
            wanted = each["target_num_replicas"]
            if len(each["replicas"]) != wanted or len(running) != wanted:
                yield f"{name}: {len(running)} of {wanted} replicas run"

    def _health_problems(self) -> Iterator[str]:
        for door in self.doors:
            try:
                health = self.get(f"{door}/health")
            except (OSError, ValueError) as error:
                told = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
                yield f"{door}: {error} {told}"
                continue
            if len(health["workers"]) != WANTED["GPU worker"]:
                yield f"{door}: {len(health['workers'])} GPU workers report"

    def _supervise(self) -> None:
        ended_at: dict[str, float] = {}
        while not self._ended.wait(0.2):
            for name in tuple(self._supervised):
                if self.host(name).is_running:
                    ended_at.pop(name, None)
                elif time.monotonic() - ended_at.setdefault(name, time.monotonic()) >= RESTART_S:
                    logger.info("%s has ended: started again", name)
                    with contextlib.suppress(AssertionError):
                        self.host(name).start(self._service(name), self._environment(name))

    def _service(self, name: str) -> list[str]:
        host = self.host(name)
        if name == "redis":
            return [
                *("redis-server", "--port", str(REDIS_PORT), "--bind", host.address),
                *("--protected-mode", "no", "--dir", "/tmp", "--appendonly", "yes"),
            ]
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        ray += [f"--node-ip-address={host.address}", "--disable-usage-stats"]
        ray += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        # Given, or else a raylet that waits in vain for its agent to choose some on a machine that
        # is busy (more than 20 s at a load of 20 on two cores) ends itself.
        ray += [f"--{kind}-port={number}" for kind, number in AGENT_PORTS.items()]
        if name == "head":
            dashboard = ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"]
            return [*ray, "--head", f"--port={GCS_PORT}", "--num-cpus=0", *dashboard]
        labels = "moetier.io/worker=true" if name in GPU else _MEMORY_LABELS
        gcs = f"{self.host('head').address}:{GCS_PORT}"
        return [*ray, f"--address={gcs}", "--num-cpus=2", f"--labels={labels}"]

    def _environment(self, name: str) -> dict[str, str]:
        if name == "head" and self._gcs == "rocksdb":
            backend = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/tmp/gcs"}
        elif name == "head":
            backend = {"RAY_REDIS_ADDRESS": f"{self.host('redis').address}:{REDIS_PORT}"}
        else:
            backend = {}
        return {
            **RAY_DEFAULTS,
            **backend,
            "PYTHONPATH": str(ROOT),  # an image has moetier installed
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "disabled",  # the operator's token is not there
            # Raylets wait that long for a GCS; a head takes a minute to return on a busy machine.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
        }


_MEMORY_LABELS = "moetier.io/store=true,moetier.io/ndp=true"


def serve_config(redis_address: str) -> dict[str, Any]:
    """As deploy/base/rayservice.yaml has it, with two of each and sizes for two cores.

    One GPU worker and one ingress to a node. A GPU worker keeps no expert, so that every step needs
    the memory tier: a part of it that fails is felt at once.
    """
    on_gpu = {"num_cpus": 0.1, "label_selector": {"moetier.io/worker": "true"}}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": HTTP_PORT, "request_timeout_s": 600},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "cluster.app:build",
                "deployments": [
                    {
                        "name": "TierManager",
                        "ray_actor_options": {
                            "num_cpus": 0.1,
                            "label_selector": {"moetier.io/store": "true"},
                        },
                    },
                    {"name": "Ingress", "ray_actor_options": on_gpu, "max_replicas_per_node": 1},
                    {"name": "GpuWorker", "max_replicas_per_node": 1},
                ],
                "args": {
                    "model": "mini",
                    "store": {"path": STORE, "replicas": 2, "transport": "grpc"},
                    "ndp": {"enabled": True, "replicas": 2, "num_threads": 1},
                    "worker": {
                        "device": "cpu",
                        "max_sequences": 4,
                        "max_context": 512,
                        "cache_bytes": 0,
                    },
                    "replicas": {"num_replicas": 2, "num_cpus": 1, "max_waiting": 16},
                    "http": {"host": "0.0.0.0", "port": HTTP_PORT, "replicas": 2},
                    "directory": {
                        "kind": "redis",
                        "redis_url": f"redis://{redis_address}:{REDIS_PORT}/1",
                    },
                },
            }
        ],
    }
