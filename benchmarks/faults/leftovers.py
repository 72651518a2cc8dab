"""What a deployment left behind when it was closed: nothing, if all went well."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.deployment import Deployment
from cluster.processes import Process

GONE_S = 10.0


@dataclass(frozen=True, slots=True)
class Footprint:
    """All by which a running deployment can be found again."""

    folder: Path
    namespaces: frozenset[str]  # as "net:[4026532281]"
    processes: frozenset[Process]


def footprint(deployment: Deployment) -> Footprint:
    """Of one that runs. Every namespace of it is one of the hosts' processes' own."""
    ours = {_namespace("self", kind) for kind in _KINDS}
    processes = frozenset(
        process for host in deployment.network.hosts.values() for process in host.processes()
    )
    found = {_namespace(str(p.pid), kind) for p in processes for kind in _KINDS}
    found |= {_namespace(str(pid), "net") for pid in deployment.network.pauses}
    return Footprint(deployment.folder, frozenset(found - ours - {""}), processes)


def leftovers(footprint: Footprint) -> list[str]:
    """One line for each thing still there after `GONE_S`, when all dead are collected."""
    end = time.monotonic() + GONE_S
    while (found := _found(footprint)) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _found(footprint: Footprint) -> list[str]:
    found = [f"process {p.pid} still runs" for p in footprint.processes if p.is_alive]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            kept = {_namespace(entry.name, kind) for kind in _KINDS} & footprint.namespaces
            found += [f"namespace {each}, held by process {entry.name}" for each in kept]
    if footprint.folder.exists():
        found.append(f"folder {footprint.folder}")
    mark = str(footprint.folder)
    for table in ("/proc/net/unix", "/proc/mounts"):
        found += [
            f"{table}: {line}" for line in Path(table).read_text().splitlines() if mark in line
        ]
    return found


_KINDS = ("net", "pid", "mnt", "ipc")


def _namespace(pid: str, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""
