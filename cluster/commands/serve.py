"""`moetier serve`: the cluster with its HTTP endpoint, up until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from cluster.app import RunningCluster, join_cluster, start_local_cluster
from cluster.config import ClusterConfig, load_config
from cluster.environment import default_store
from cluster.settings import Transport
from expert_store.errors import StoreError
from expert_store.format import is_store

HELP = """Start the cluster with its OpenAI-style HTTP endpoint and keep it up until Ctrl-C.

Without --address a Ray cluster is started on this machine and shut down at the end; nothing is left
running. Without --config every setting has its default, and without a store the bundled model's is
used (made on first use). deploy/cluster.example.yaml documents every setting.

Exit codes: 0 after Ctrl-C or SIGTERM, 130 when they come before it is up, 1 when a part fails, 2
for a setting that cannot be used."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; each one given wins over the config file."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML config of the cluster")
    parser.add_argument("--store", metavar="DIR", help="the store to serve (store.path)")
    parser.add_argument("--model", metavar="NAME", help="name that clients ask for (model)")
    parser.add_argument("--host", help="address to listen on (http.host; default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="TCP port, 0 for a free one (http.port)")
    parser.add_argument(
        "--transport",
        choices=("object_store", "grpc"),
        help="how expert records reach the GPU worker (store.transport)",
    )
    parser.add_argument(
        "--ndp",
        action=argparse.BooleanOptionalAction,
        help="run low-bit experts near their bytes (ndp.enabled)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a running Ray cluster to use, or auto to find it; the application is removed from it "
        "at the end",
    )


def run(args: argparse.Namespace) -> int:
    """Start, tell where, wait, shut down."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, _interrupt)
    # A shell that starts a command in the background lets it ignore Ctrl-C's signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = configured(args)
    start_s = time.monotonic()
    print("starting the cluster ...", file=sys.stderr, flush=True)
    try:
        cluster = (
            join_cluster(config, args.address) if args.address else start_local_cluster(config)
        )
        with cluster:
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
            print(greeting(cluster, time.monotonic() - start_s), flush=True)
            wait(stop, cluster)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("shutting down ...", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    return 0


def configured(args: argparse.Namespace) -> ClusterConfig:
    """The config file with the options in place; the bundled store where none is named.

    Raises ValueError naming the field or option that is wrong.
    """
    config = load_config(args.config) if args.config else ClusterConfig()
    store = replace(
        config.store,
        path=args.store or config.store.path,
        transport=transport(args, config),
    )
    http = replace(
        config.http,
        host=args.host or config.http.host,
        port=config.http.port if args.port is None else args.port,
    )
    ndp = config.ndp if args.ndp is None else replace(config.ndp, enabled=args.ndp)
    worker = config.worker
    if args.ndp is False:
        worker = replace(worker, near_data="off")
    config = replace(
        config, model=args.model or config.model, store=store, http=http, ndp=ndp, worker=worker
    )
    if config.store.path == "auto" and not is_store(default_store()):
        make_bundled_store()
    return config


def make_bundled_store() -> None:
    """Compress the bundled model. The compressor is loaded only for that: it takes seconds."""
    from cluster.stores import bundled_store

    print("compressing the bundled model, once ...", file=sys.stderr, flush=True)
    bundled_store()


def transport(args: argparse.Namespace, config: ClusterConfig) -> Transport:
    chosen: Transport = args.transport or config.store.transport
    return chosen


def greeting(cluster: RunningCluster, start_s: float) -> str:
    """Where it answers, and a line to try it with."""
    body = json.dumps({"model": cluster.model, "prompt": "The return statement", "max_tokens": 32})
    return (
        f"serving {cluster.model} at {cluster.address}/v1 (up in {start_s:.0f} s)\n"
        f"try: curl {cluster.address}/v1/completions -H 'content-type: application/json' "
        f"-d '{body}'\n"
        "Ctrl-C shuts it down"
    )


def wait(stop: threading.Event, cluster: RunningCluster) -> None:
    """Until SIGTERM sets the event or Ctrl-C comes. Raises StoreError when Ray itself ends."""
    try:
        while not stop.wait(1.0):
            if not cluster.is_alive:
                raise StoreError("a process of Ray has ended; its logs are in /tmp/ray")
    except KeyboardInterrupt:
        return


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
