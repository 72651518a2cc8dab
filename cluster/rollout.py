"""Another store for a running cluster: its GPU workers are replaced one after another.

The tier manager keeps the tiers of both stores meanwhile. What may take whose place is
`cluster/successor.py`; that only workers restart comes from `cluster/deployments.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.app import APP_NAME, connect_ray, start_failure
from cluster.cli import installed_version
from cluster.config import ClusterConfig
from cluster.deployed import Deployed
from cluster.deployments import compose, worker_options
from cluster.door import ClusterStartError
from cluster.successor import (
    check_fit,
    check_release,
    check_successor,
    serve_file_section,
    with_store,
)
from gpu_worker.messages import WorkerStats

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 30.0
POLL_S = 1.0
SETTLE_S = 60.0
"""From when Serve says it is done until every worker has reported so."""
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rolled:
    """A rollout that came through."""

    store: str
    version: str
    num_workers: int
    elapsed_s: float


def roll_out(address: str, store: Path, *, force: bool, tell: Tell) -> Rolled:
    """Serve `store` on the cluster at `address` from now on; returns once all workers do.

    The store that was served is remembered for `roll_back`. Raises ValueError for a store or a
    cluster that does not allow it, StoreError for one that is damaged or does not come up; then
    the store before is served again.
    """
    with _connected(address) as cluster:
        check_release(cluster.deployed, installed_version())
        before = cluster.deployed.config
        config = with_store(before, store)
        tell(f"checking every checksum of {config.store.path} ...")
        manifest = check_successor(config, Path(before.store.path), force=force)
        return cluster.roll(config, manifest.version, tell)


def roll_back(address: str, tell: Tell) -> Rolled:
    """`roll_out` to the store before; another one brings the newer store back.

    Reads no record of it: who goes back is in a hurry, and it was served before.
    """
    with _connected(address) as cluster:
        check_release(cluster.deployed, installed_version())
        previous = cluster.deployed.previous_store
        if previous is None:
            raise ValueError("--back: this cluster has served no other store yet")
        config = with_store(cluster.deployed.config, Path(previous))
        return cluster.roll(config, check_fit(config).version, tell)


def serve_file(address: str, store: Path, *, force: bool) -> str:
    """What a Serve config file says to serve `store`, checked as by `roll_out`. Changes nothing."""
    with _connected(address) as cluster:
        before = cluster.deployed.config
        config = with_store(before, store)
        check_successor(config, Path(before.store.path), force=force)
        return serve_file_section(config, worker_options(config))


class _Cluster:
    """The application that runs, over Serve's handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.deployed: Deployed = handle.deployed.remote().result(timeout_s=ASK_TIMEOUT_S)

    def roll(self, config: ClusterConfig, version: str, tell: Tell) -> Rolled:
        start_s = time.monotonic()
        before = self.deployed
        if config.store.path == before.config.store.path:
            raise ValueError(f"STORE: {config.store.path} is what this cluster serves already")
        tell(f"from {before.config.store.path} to {config.store.path}")
        try:
            with self._watched(version, tell):
                _run(config, before.config.store.path)
        except RuntimeError as error:
            failure = start_failure(error)
            tell(f"{failure}; going back")
            _run(before.config, before.previous_store)
            raise ClusterStartError(
                f"{config.store.path} did not come up, {before.config.store.path} is served again: "
                f"{failure}"
            ) from error
        num_workers = self._settled(version)
        return Rolled(config.store.path, version, num_workers, time.monotonic() - start_s)

    def workers(self) -> Sequence[WorkerStats]:
        """Those that report; none when nobody answers just now."""
        try:
            found: tuple[WorkerStats, ...] = self._handle.workers.remote().result(
                timeout_s=ASK_TIMEOUT_S
            )
            return found
        except (RayError, RayServeException, TimeoutError) as error:
            logger.info("no word of the workers: %s", error)
            return ()

    @contextmanager
    def _watched(self, version: str, tell: Tell) -> Iterator[None]:
        """Tell of every worker that has changed, while Serve is waited for."""
        done = threading.Event()

        def watch() -> None:
            told = ""
            while not done.wait(POLL_S):
                line = progress(self.workers(), version)
                if line != told:
                    tell(line)
                    told = line

        watching = threading.Thread(target=watch, name="rollout-progress", daemon=True)
        watching.start()
        try:
            yield
        finally:
            done.set()
            watching.join()

    def _settled(self, version: str) -> int:
        """Waits until no worker reports another version; how many there are."""
        end_s = time.monotonic() + SETTLE_S
        while True:
            workers = self.workers()
            if workers and all(worker.version == version for worker in workers):
                return len(workers)
            if time.monotonic() > end_s:
                told = progress(workers, version)
                raise ClusterStartError(f"after {SETTLE_S:g} s only {told}; ask /metrics which")
            time.sleep(POLL_S)


def progress(workers: Sequence[WorkerStats], version: str) -> str:
    """How far a rollout is, in words."""
    new = sum(worker.version == version for worker in workers)
    return f"{new} of {len(workers)} workers that report run version {version[:12]}"


@contextmanager
def _connected(address: str) -> Iterator[_Cluster]:
    connect_ray(address)
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            yield _Cluster(serve.get_app_handle(APP_NAME))
        except (RayError, RayServeException, TimeoutError) as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ClusterStartError(
                f"the application {APP_NAME} at {address} does not answer: {told}; is it deployed "
                "there (`moetier serve`)?"
            ) from error
    finally:
        ray.shutdown()


def _run(config: ClusterConfig, previous_store: str | None) -> None:
    serve.run(compose(config, previous_store=previous_store), name=APP_NAME, route_prefix="/")
