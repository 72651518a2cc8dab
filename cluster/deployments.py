"""The three Serve deployments of a cluster and which of them gets which: a config made runnable.

A deployment's version is a digest of what it is made of. Serve restarts the replicas of one whose
version changed and leaves the others alone, so that another store replaces the GPU workers, one
after another, and neither the tier manager nor an ingress.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from cluster.cli import installed_version
from cluster.config import ClusterConfig
from cluster.deployed import Deployed, DeployedBy
from cluster.door import check_worker_if_readable
from cluster.ingress import Ingress
from cluster.orchestrator import TierManager, TierSettings
from cluster.settings import OUTLAST_S, split_label
from cluster.tier_link import connect, open_directory
from gpu_worker.actor import GpuWorker, WorkerSettings

logger = logging.getLogger(__name__)

MAX_INGRESS_CALLS = 1024
MAX_TIER_CALLS = 1024
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 10.0
"""Serve replaces a replica that did not answer three times in a row."""


def compose(
    config: ClusterConfig, *, by: DeployedBy = "moetier", previous_store: str | None = None
) -> Application:
    """The application for a config: ingress, GPU workers, tier manager.

    `by` says who deploys it, `previous_store` which store it takes the place of: a rollout asks the
    ingress. Raises ValueError as `cluster.app.build`.
    """
    config = config.resolve()
    check_worker_if_readable(config.worker, config.store)
    logger.info("resolved config: %s", config)
    anywhere = dataclasses.replace(config.store, path="auto")
    settings = TierSettings(anywhere, config.ndp, config.directory)
    tiers = _versioned(
        serve.deployment(
            TierManager,
            name="TierManager",
            num_replicas=1,
            max_ongoing_requests=MAX_TIER_CALLS,
            health_check_period_s=HEALTH_PERIOD_S,
            ray_actor_options={"num_cpus": 0},
            # Not an argument: Serve gives a new user_config to the replica that runs.
            user_config={"store": config.store.path},
            **_shutdown(config.replicas.drain_s + OUTLAST_S),
        ),
        settings,
    ).bind(settings)
    link = partial(
        connect,
        transport=config.store.transport,
        compression=config.store.compression,
        directory=open_directory(config.directory),
    )
    told = WorkerSettings(
        config=config.worker,
        max_waiting=config.replicas.max_waiting,
        name=None if config.model == "auto" else config.model,
        drain_s=config.replicas.drain_s,
    )
    # The store is among its parts: a worker takes another one only as a new process.
    parts = (told, config.store, config.directory)
    worker = _versioned(_worker_deployment(config), *parts).bind(told, tiers, link)
    ingress = _versioned(
        serve.deployment(
            Ingress,
            name="Ingress",
            num_replicas=config.http.replicas,
            max_ongoing_requests=MAX_INGRESS_CALLS,
            max_queued_requests=MAX_INGRESS_CALLS,
            health_check_period_s=HEALTH_PERIOD_S,
            health_check_timeout_s=HEALTH_TIMEOUT_S,
            ray_actor_options={"num_cpus": 0},
            user_config=Deployed(config, by, installed_version(), previous_store).as_mapping(),
            **_shutdown(config.replicas.drain_s + OUTLAST_S),
        ),
        config.http,
    )
    scaling = config.replicas.autoscaling
    needs_worker = scaling is None or scaling.min_replicas > 0
    return ingress.bind(worker, tiers, config.http, needs_worker)


def num_gpus(config: ClusterConfig) -> float:
    """GPUs that Ray sets aside for each GPU worker."""
    if config.replicas.num_gpus is not None:
        return config.replicas.num_gpus
    if config.worker.device != "auto":
        return 1.0 if config.worker.device == "cuda" else 0.0
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def worker_options(config: ClusterConfig) -> dict[str, Any]:
    """What Ray is asked for by each GPU worker."""
    replicas = config.replicas
    options: dict[str, Any] = {"num_cpus": replicas.num_cpus, "num_gpus": num_gpus(config)}
    if label := split_label(replicas.label):
        options["label_selector"] = label
    return options


def _worker_deployment(config: ClusterConfig) -> Any:
    replicas = config.replicas
    # A worker is given what its engine takes; more waits at the ingress, up to http.max_queued.
    capacity = config.worker.max_sequences + replicas.max_waiting
    how_many: dict[str, Any] = {"num_replicas": replicas.num_replicas}
    if replicas.autoscaling is not None:
        scaling = replicas.autoscaling.serve_config(
            slots=config.worker.max_sequences, prefill_chunk=config.worker.prefill_chunk
        )
        how_many = {"autoscaling_config": AutoscalingConfig(**scaling)}
    return serve.deployment(
        GpuWorker,
        name="GpuWorker",
        max_ongoing_requests=capacity,
        max_queued_requests=config.http.max_queued,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options=worker_options(config),
        user_config={"store": config.store.path},
        max_surge_percent=replicas.max_surge_percent,
        **_shutdown(replicas.drain_s),
        **how_many,
    )


def _shutdown(timeout_s: float) -> dict[str, Any]:
    return {"graceful_shutdown_wait_loop_s": 0.5, "graceful_shutdown_timeout_s": timeout_s}


def _versioned(deployment: Any, *parts: object) -> Any:
    """With a version of its own instead of a random one at every `serve.run`.

    Serve has no public way to say it (2.60): `options(version=)` is refused without `_internal`. A
    config file's application (KubeRay) has one version for all, from its import path and args.
    """
    told = repr((deployment.name, installed_version(), *parts))
    digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    return deployment.options(version=digest, _internal=True)
