"""The faults: what is done to a running cluster, how it is undone, and what may be lost by it.

The failure table of the design says what a user may see of each; the targets here are its numbers.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.deployment import Deployment
from benchmarks.faults.hosts import FULL_RATE_MBIT
from benchmarks.faults.outcomes import Spared
from benchmarks.faults.services import GPU, MEMORY, SPARE, STORE, TITLES, Gcs
from expert_store.format import load_manifest
from expert_store.types import RecordInfo

logger = logging.getLogger(__name__)

Act = Callable[[Deployment], None]

TIER_WAIT_S = 1.0
WORKER_WAIT_S = 20.0
THROUGHPUT_LOSS = 0.02
LINK_DOWN_S = 12.0
THROTTLED_S = 10.0
AWAY_S = 10.0
DRAIN_S = 20.0
DAMAGED_EVERY = 3
"""Each so-manieth record of the store is damaged on the one host."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break it. `heal` follows `heal_after_s` later, where it does not heal itself.

    `mend` puts the cluster right for the next fault, after all is measured. `wait_target_s` bounds
    a stream's wait for its next token, None where the issue names no number.
    """

    key: str
    name: str
    inject: Act
    heal: Act | None = None
    heal_after_s: float = 0.0
    mend: Act | None = None
    spared: Spared = "nothing"
    wait_target_s: float | None = None
    keeps_throughput: bool = False
    gcs: Gcs = "redis"


def _kill(part: str, where: Sequence[str]) -> Act:
    return lambda deployment: logger.info("%s on %s", part, deployment.kill_somewhere(part, where))


def _shut(name: str) -> Act:
    return lambda deployment: deployment.shut(name)


def _boot(name: str) -> Act:
    return lambda deployment: deployment.boot(name)


def _end(name: str, title: str) -> Act:
    """SIGKILL a host's own service, which its kubelet then starts again."""
    return lambda deployment: deployment.host(name).kill(title)


def _on_plain_memory(act: Callable[[Deployment, str], None]) -> Act:
    """On the memory node that does not run the tier manager: whose loss is another fault."""

    def choose(deployment: Deployment) -> None:
        manager = deployment.where("tier manager")
        act(deployment, next(name for name in MEMORY if name != manager))

    return choose


def _end_raylet(deployment: Deployment, name: str) -> None:
    deployment.host(name).kill("raylet/raylet")


def _unplug(deployment: Deployment, name: str) -> None:
    deployment.host(name).set_link(is_up=False)


def _throttle(deployment: Deployment, name: str) -> None:
    deployment.host(name).set_rate(FULL_RATE_MBIT // 10)


def _mend_links(deployment: Deployment) -> None:
    for name in MEMORY:
        deployment.host(name).set_link(is_up=True)
        deployment.host(name).set_rate(FULL_RATE_MBIT)


def _boot_missing(deployment: Deployment) -> None:
    for name in MEMORY:
        if not deployment.host(name).is_running:
            deployment.boot(name)


def damaged_records(store: Path) -> list[RecordInfo]:
    """Those that are damaged: codes and factors of some experts of every layer."""
    experts = sorted(load_manifest(store).experts.items())[::DAMAGED_EVERY]
    return [
        record for _, info in experts for record in (info.codes, info.factors) if record is not None
    ]


def _damage(deployment: Deployment) -> None:
    """Some bytes of each chosen record of the first memory host's copy become others."""
    store = deployment.host(MEMORY[0]).folder / STORE.lstrip("/")
    for record in damaged_records(store):
        with (store / record.file).open("r+b") as file:
            file.seek(record.offset + record.num_bytes // 2)
            before = file.read(8)
            file.seek(-len(before), 1)
            file.write(bytes(byte ^ 0xFF for byte in before))


def _reread(deployment: Deployment) -> None:
    """Tier actors of the first memory host, if it has any, end and open their files anew."""
    for part in ("store", "near-data worker"):
        with contextlib.suppress(LookupError):
            deployment.host(MEMORY[0]).kill(TITLES[part])


def _damage_and_reread(deployment: Deployment) -> None:
    _damage(deployment)
    _reread(deployment)


def _restore(deployment: Deployment) -> None:
    """The first memory host gets the second one's copy, and reads it."""
    here, other = (deployment.host(name).folder / STORE.lstrip("/") for name in MEMORY)
    shutil.copytree(other, here, dirs_exist_ok=True)
    _reread(deployment)


def _drain(deployment: Deployment, name: str) -> None:
    """As before a pod is taken away: Ray is told, the node is stopped, and stays away."""
    ray = str(Path(sys.executable).with_name("ray"))
    with deployment.host("client").inside():
        subprocess.run(
            [
                *(ray, "drain-node", "--address", f"{deployment.host('head').address}:6379"),
                *("--node-id", deployment.node_id(name)),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "drained"),
                *("--deadline-remaining-seconds", str(round(DRAIN_S))),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )
    time.sleep(DRAIN_S)
    deployment.shut(name)


ALL = (
    Fault("none", "nothing (the measure's own noise)", lambda deployment: None),
    Fault(
        "store",
        "SIGKILL of a store actor",
        _kill("store", MEMORY),
        wait_target_s=TIER_WAIT_S,
        keeps_throughput=True,
    ),
    Fault(
        "ndp",
        "SIGKILL of a near-data worker",
        _kill("near-data worker", MEMORY),
        wait_target_s=TIER_WAIT_S,
    ),
    Fault(
        "worker",
        "SIGKILL of a GPU worker",
        _kill("GPU worker", GPU),
        spared="started streams",
        wait_target_s=WORKER_WAIT_S,
    ),
    Fault("ingress", "SIGKILL of an ingress", _kill("ingress", GPU), spared="in flight"),
    Fault("manager", "SIGKILL of the tier manager", _kill("tier manager", MEMORY)),
    Fault("raylet", "SIGKILL of a memory node's raylet", _on_plain_memory(_end_raylet)),
    Fault("gcs", "SIGKILL of the GCS", _end("head", "gcs_server")),
    Fault(
        "head",
        f"head off for {AWAY_S:g} s (GCS in Redis)",
        _shut("head"),
        _boot("head"),
        AWAY_S,
    ),
    Fault(
        "rocksdb",
        f"head off for {AWAY_S:g} s (GCS in RocksDB)",
        _shut("head"),
        _boot("head"),
        AWAY_S,
        gcs="rocksdb",
    ),
    Fault("redis", "SIGKILL of Redis", _end("redis", "redis-server")),
    Fault(
        "link",
        f"a memory node's link down for {LINK_DOWN_S:g} s",
        _on_plain_memory(_unplug),
        _mend_links,
        LINK_DOWN_S,
        wait_target_s=TIER_WAIT_S,
    ),
    Fault(
        "throttle",
        f"a memory node's link at a tenth for {THROTTLED_S:g} s",
        _on_plain_memory(_throttle),
        _mend_links,
        THROTTLED_S,
    ),
    Fault(
        "damage",
        "damaged records in a file that is opened again",
        _damage_and_reread,
        mend=_restore,
    ),
    Fault("damage-live", "records damaged while they are served", _damage, mend=_restore),
    Fault("join", "a memory node joins", _boot(SPARE), mend=_shut(SPARE)),
    Fault(
        "drain",
        "a memory node is drained",
        _on_plain_memory(_drain),
        _boot_missing,
        DRAIN_S + AWAY_S,
    ),
)
