"""What runs on each host: the commands, their environment, and the application's config.

Plain values; `benchmarks/faults/deployment.py` starts them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from benchmarks.offload_parts.hosts import ROOT
from cluster.environment import RAY_DEFAULTS

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
NICENESS = {"head": -15, **dict.fromkeys((*MEMORY, SPARE), -5)}
"""Of all that a host runs against what others run. A raylet whose agent is not up within 15 s ends
itself; a real host has cores of its own for that, these share theirs with the load."""
OBJECT_STORE_BYTES = 100 << 20
APPLICATION = "moetier"
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


def service(name: str, addresses: Mapping[str, str]) -> list[str]:
    """The command that is a host's purpose, given every host's address."""
    if name == "redis":
        return [
            *("redis-server", "--port", str(REDIS_PORT), "--bind", addresses[name]),
            *("--protected-mode", "no", "--dir", "/tmp", "--appendonly", "yes"),
        ]
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
    ray += [f"--node-ip-address={addresses[name]}", "--disable-usage-stats"]
    ray += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    ray += [f"--{kind}-port={number}" for kind, number in AGENT_PORTS.items()]
    if name == "head":
        dashboard = ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"]
        return [*ray, "--head", f"--port={GCS_PORT}", "--num-cpus=0", *dashboard]
    labels = "moetier.io/worker=true" if name in GPU else _MEMORY_LABELS
    gcs = f"{addresses['head']}:{GCS_PORT}"
    return [*ray, f"--address={gcs}", "--num-cpus=2", f"--labels={labels}"]


def environment(name: str, addresses: Mapping[str, str], gcs: Gcs) -> dict[str, str]:
    """What is set for it beside what is set for us."""
    backend: dict[str, str] = {}
    if name == "head" and gcs == "rocksdb":
        backend = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/tmp/gcs"}
    elif name == "head":
        backend = {"RAY_REDIS_ADDRESS": f"{addresses['redis']}:{REDIS_PORT}"}
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
