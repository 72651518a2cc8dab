"""The composition root: one Serve application from a config; and a local Ray for it.

`build` is the import path for `serve run`, `serve deploy` and KubeRay (`cluster.app:build`, the
config as args); `app` is the same for `serve build`, which gives no arguments (MOETIER_CONFIG).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from cluster.config import ClusterConfig, config_from_mapping, load_config
from cluster.deployments import compose, num_gpus
from cluster.door import (
    ClusterStartError,
    check_ray_address,
    check_store,
    check_worker,
    endpoint_url,
    last_line,
    settle_port,
    wait_healthy,
)
from cluster.environment import config_path, prepare_for_ray
from cluster.placement import place, sole_node_cpus, sole_node_labels, tier_needs, worker_need
from cluster.processes import Process, descendants, end, named, uninterrupted
from cluster.ray_launcher import live_nodes

logger = logging.getLogger(__name__)

APP_NAME = "moetier"
START_DEADLINE_S = 300.0
END_PATIENCE_S = 5.0


def build(args: Mapping[str, Any]) -> Application:
    """The application for a config given as plain values, or as {"config_path": FILE}.

    Raises ValueError for a config that is wrong or, where the store can be read, does not fit it,
    naming the field.
    """
    if "config_path" in args:
        if set(args) != {"config_path"}:
            raise ValueError("args: give config_path alone, or the config's own sections")
        return compose(load_config(Path(args["config_path"])), by="serve")
    return compose(config_from_mapping(args, source="args"), by="serve")


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster that answers at `address` (http://HOST:PORT). Close it, or use it in a `with`."""

    address: str
    model: str  # the name to ask for
    config: ClusterConfig  # resolved
    ours: frozenset[Process] | None  # what ran before we started Ray; None when Ray was there
    vital: frozenset[Process] = frozenset()  # what must not end before it is closed

    @property
    def is_alive(self) -> bool:
        """Whether Ray's own processes still run, as far as they are ours."""
        return all(process.is_alive for process in self.vital)

    @uninterrupted()
    def close(self) -> None:
        """Shut down what was started for it: the application, and Ray if it was ours."""
        if self.ours is None:
            serve.delete(APP_NAME)
            ray.shutdown()
        else:
            _end_local(self.ours, politely=self.is_alive)

    def __enter__(self) -> RunningCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_local_cluster(config: ClusterConfig) -> RunningCluster:
    """Ray on this machine, with every label that the config asks for, and the application on it.

    Returns once /health is 200. Nothing is left running when it raises: ValueError for what the
    config or the machine does not allow (port in use, no store), StoreError when a part fails.
    """
    config = config.resolve()
    config = replace(config, http=settle_port(config.http))
    check_worker(config.worker, check_store(config.store), is_here=True)
    prepare_for_ray()
    # Ray warns that it made a token for this cluster, as if that were something to do about.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    before = descendants(os.getpid())
    try:
        _init_ray(
            address="local",
            num_cpus=sole_node_cpus(config.replicas, os.cpu_count() or 1),
            labels=sole_node_labels(config.store, config.ndp, config.replicas),
            include_dashboard=False,
        )
        model = _deploy(config)
    except BaseException as error:
        # Who interrupts a start wants it to end now; half-started replicas take long to be asked.
        _end_local(before, politely=isinstance(error, Exception))
        raise
    vital = named(descendants(os.getpid()) - before, ("gcs_server", "raylet"))
    return RunningCluster(endpoint_url(config.http), model, config, before, vital)


def join_cluster(config: ClusterConfig, address: str) -> RunningCluster:
    """The application on a Ray cluster that runs already ("auto" or HOST:PORT).

    The HTTP address of Serve there is its own if Serve runs already. Raises as
    `start_local_cluster`, and PlacementError when a node with a label is missing.
    """
    check_ray_address(address)
    config = config.resolve()
    check_worker(config.worker, check_store(config.store), is_here=False)
    connect_ray(address)
    try:
        return RunningCluster(endpoint_url(config.http), _deploy(config), config, None)
    except BaseException:
        ray.shutdown()
        raise


def connect_ray(address: str) -> None:
    """Connect to a Ray cluster that runs already. Raises ValueError or ClusterStartError."""
    check_ray_address(address)
    prepare_for_ray()
    try:
        _init_ray(address=address)
    except ConnectionError as error:
        raise ClusterStartError(
            f"cannot join the Ray cluster at {address}: {error}; check that it runs there and, if "
            "it asks for a token, that RAY_AUTH_MODE=token and RAY_AUTH_TOKEN are set"
        ) from error


def _init_ray(**options: Any) -> None:
    """Quietly; and SIGTERM stays the caller's, where Ray's handler would end us without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _deploy(config: ClusterConfig) -> str:
    """Run the application until it is healthy; the model's name."""
    nodes = live_nodes()
    needs = tier_needs(config.store, config.ndp, nodes)
    place([*needs, worker_need(config.replicas, num_gpus(config))], nodes)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly", http_options={"host": config.http.host, "port": config.http.port}
    )
    try:
        serve.run(compose(config), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise ClusterStartError(start_failure(error)) from error
    return wait_healthy(endpoint_url(config.http), START_DEADLINE_S)


def start_failure(error: RuntimeError) -> str:
    """Why `serve.run` gave up, from what Serve tells of each deployment."""
    told = serve.status().applications.get(APP_NAME)
    parts = told.deployments.items() if told else ()
    causes = [f"{name}: {last_line(part.message)}" for name, part in parts if part.message]
    return (
        f"the application did not start: {'; '.join(causes) or last_line(str(error))} "
        "(the whole story is in /tmp/ray/session_latest/logs/serve)"
    )


@uninterrupted()
def _end_local(before: frozenset[Process], *, politely: bool) -> None:
    """End our Ray and every process of it; politely lets them close what they hold first."""
    started = descendants(os.getpid()) - before
    if ray.is_initialized():
        if politely:
            # Not serve.shutdown(): its killed controller makes Ray print an error that is none.
            serve.delete(APP_NAME)
        started |= descendants(os.getpid()) - before
        ray.shutdown()
    level = logging.WARNING if politely else logging.INFO
    with uninterrupted():  # again: ray.shutdown() gives SIGTERM back to the system's default
        for process in end(started, patience_s=END_PATIENCE_S):
            logger.log(level, "process %d did not end by itself and was ended", process.pid)


def __getattr__(name: str) -> Application:
    """`app`, built when it is asked for: importing this module must not need a config."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = config_path()
    return compose(ClusterConfig() if path is None else load_config(path), by="serve")
