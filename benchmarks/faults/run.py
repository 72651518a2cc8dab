"""Breaks a cluster in one way after another under a steady load, and measures what clients see."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.catalogue import Fault
from benchmarks.faults.client import PROMPTS, request
from benchmarks.faults.deployment import Deployment
from benchmarks.faults.outcomes import Figures, Outcome, Times, figures, load
from benchmarks.faults.services import Gcs
from benchmarks.offload_parts.hosts import ROOT
from cluster.processes import uninterrupted
from cluster.stores import bundled_store

logger = logging.getLogger(__name__)

CLIENTS = 4
PREFIX = "moetier-faults-"
WARM_S = 6.0
WHOLE_S = 150.0
ENDED_S = 130.0
"""As long as a client gives a request, and some more."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Seconds of fault-free load that are watched on both sides of a fault."""

    before_s: float = 12.0
    after_s: float = 12.0


@dataclass(frozen=True, slots=True)
class Result:
    """A fault and what was seen of it."""

    fault: Fault
    figures: Figures


class LoadedCluster:
    """A whole cluster and the load on it. `outcomes` is what the clients have seen so far."""

    def __init__(self, deployment: Deployment, out: Path, reference: dict[int, str]) -> None:
        self.deployment, self._out, self._reference = deployment, out, reference

    def outcomes(self) -> list[Outcome]:
        return load(self._out)

    def suffer(self, fault: Fault, windows: Windows) -> Result:
        """Break it, heal it, wait until it is whole, and count. The load goes on all the while."""
        deployment = self.deployment
        from_s = time.monotonic()
        time.sleep(windows.before_s)
        fault_s = time.monotonic()
        fault.inject(deployment)
        if fault.heal is not None:
            time.sleep(max(0.0, fault_s + fault.heal_after_s - time.monotonic()))
            fault.heal(deployment)
        whole_s = deployment.until_full(WHOLE_S)
        time.sleep(windows.after_s)
        times = Times(from_s, fault_s, whole_s, time.monotonic())
        self._until_ended(times.to_s)
        result = Result(fault, figures(self.outcomes(), times, fault.spared, self._reference))
        if fault.mend is not None:
            fault.mend(deployment)
            deployment.until_full(WHOLE_S)
        return result

    def _until_ended(self, began_before_s: float) -> None:
        end = time.monotonic() + ENDED_S
        while time.monotonic() < end:
            asked = [o for o in self.outcomes() if o.started_s < began_before_s]
            if all(outcome.ended_s is not None for outcome in asked):
                return
            time.sleep(0.5)


@contextlib.contextmanager
def loaded_cluster(gcs: Gcs = "redis", *, seed: int = 0) -> Iterator[LoadedCluster]:
    """A cluster with its load, warm. Nothing of it is left afterwards.

    Raises HostsUnavailable where the machine cannot, RuntimeError when it does not start.
    """
    with (
        temporary_folder() as folder,
        Deployment(bundled_store(), folder, gcs=gcs) as deployment,
    ):
        # Before any fault, by a cluster of which nothing is amiss.
        reference = {prompt: answer(deployment, prompt) for prompt in range(len(PROMPTS))}
        client = deployment.host("client")
        out = client.folder / "tmp/outcomes.jsonl"  # /tmp/outcomes.jsonl to the host itself
        client.start(
            [
                *(sys.executable, "-m", "benchmarks.faults.client", *deployment.doors),
                *("--out", "/tmp/outcomes.jsonl", "--clients", str(CLIENTS), "--seed", str(seed)),
            ],
            {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        time.sleep(WARM_S)
        yield LoadedCluster(deployment, out, reference)
        client.kill("benchmarks.faults.client", signal.SIGTERM)


def answer(deployment: Deployment, prompt: int) -> str:
    """What the cluster says to one of the clients' prompts. Raises OSError when it does not."""
    told = deployment.get(f"{deployment.doors[0]}/v1/completions", request(prompt))
    return str(told["choices"][0]["text"])


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """For the hosts' own files. Set MOETIER_KEEP_FAULTS to look at the logs afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        yield folder
    finally:
        with uninterrupted():
            if "MOETIER_KEEP_FAULTS" not in os.environ:
                shutil.rmtree(folder)


def suffer_all(faults: Sequence[Fault], windows: Windows, *, seed: int = 0) -> Iterator[Result]:
    """The faults in turn. A cluster that did not become whole again is replaced by a new one."""
    ahead = list(faults)
    while ahead:
        gcs = ahead[0].gcs
        with loaded_cluster(gcs, seed=seed) as cluster:
            while ahead and ahead[0].gcs == gcs:
                logger.info("-- %s", ahead[0].name)
                yield (result := cluster.suffer(ahead.pop(0), windows))
                logger.info("   %s", result.figures)
                if result.figures.full_quality_s is None:
                    logger.info("   not whole again: going on with a new cluster")
                    break
