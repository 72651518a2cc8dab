"""Memory, descriptors and threads of every process of a deployment over time, and their slopes."""

from __future__ import annotations

import logging
import os
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.deployment import Deployment
from benchmarks.faults.hosts import command_line
from benchmarks.faults.services import TITLES
from cluster.processes import Process

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
SETTLE_S = 60.0
"""A new process loads libraries, its first requests allocate what is then kept: not a trend. This
at least is left out, more of longer runs."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment. `own_bytes` is its anonymous memory, where a leak shows."""

    time_s: float
    host: str
    process: Process
    role: str
    own_bytes: int
    num_files: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class Trend:
    """Of one process that lived long enough. The slope is a least-squares line's."""

    role: str
    host: str
    seconds: float
    own_bytes: float  # median
    bytes_per_h: float
    error_bytes_per_h: float  # standard error of the slope
    late_bytes_per_h: float  # of the second half alone: a pool that fills up has ended by then
    late_error_bytes_per_h: float
    num_files: tuple[int, int]  # at the beginning, at the end: medians of a fifth of the samples
    num_threads: tuple[int, int]


class Sampler:
    """Looks at all hosts every `INTERVAL_S`, from `with` to its end."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self.samples: list[Sample] = []
        self.shared: list[tuple[float, str, int]] = []  # time, host, bytes used of /dev/shm
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            for host in self._deployment.network.hosts.values():
                processes = host.processes()
                now = time.monotonic()
                for process in processes:
                    if (sample := look(now, host.name, process)) is not None:
                        self.samples.append(sample)
                if (used := _shared_bytes(processes)) is not None:
                    self.shared.append((now, host.name, used))


def look(now: float, host: str, process: Process) -> Sample | None:
    """None for a process that has gone."""
    folder = Path(f"/proc/{process.pid}")
    try:
        text = (folder / "status").read_text()
        num_files = len(os.listdir(folder / "fd"))
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if "RssAnon" not in fields:  # a zombie
        return None
    own_bytes = int(fields["RssAnon"].split()[0]) * 1024
    role = role_of(command_line(process))
    return Sample(now, host, process, role, own_bytes, num_files, int(fields["Threads"]))


def role_of(command: str) -> str:
    """What a process is for, in a word or two, from its command line."""
    for part, title in TITLES.items():
        if title in command:
            return part
    words = command.split() or ["?"]
    if words[0].startswith("ray::"):
        return words[0].split(".")[0].removeprefix("ray::")
    name = Path(words[0]).name
    if name.startswith("python"):
        named = [w for w in words[1:] if w.endswith(".py") or "." in w and not w.startswith("-")]
        return Path(named[0]).name if named else name
    return name


def trends(samples: Iterable[Sample], *, least_s: float, settle_s: float = SETTLE_S) -> list[Trend]:
    """Of every process that was seen for `least_s` seconds after it had settled, by role."""
    by_process: dict[Process, list[Sample]] = {}
    for sample in samples:
        by_process.setdefault(sample.process, []).append(sample)
    found = []
    for seen in by_process.values():
        settled = [s for s in seen if s.time_s - seen[0].time_s >= settle_s]
        # A forked process takes its own name a moment later; its last one is right.
        if len(settled) >= 3 and settled[-1].time_s - settled[0].time_s >= least_s:
            found.append(_trend(settled))
    return sorted(found, key=lambda trend: (trend.role, trend.host))


def slope(times_s: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Least squares: (per second, its standard error). At least three points."""
    fit = statistics.linear_regression(times_s, values)
    mean_s = statistics.fmean(times_s)
    spread = sum((t - mean_s) ** 2 for t in times_s)
    off = sum(
        (v - fit.slope * t - fit.intercept) ** 2 for t, v in zip(times_s, values, strict=True)
    )
    return fit.slope, (off / (len(values) - 2) / spread) ** 0.5


def _trend(seen: Sequence[Sample]) -> Trend:
    per_s, error = _growth(seen)
    late_per_s, late_error = _growth(seen[len(seen) // 2 :] if len(seen) >= 6 else seen)
    return Trend(
        role=seen[-1].role,
        host=seen[-1].host,
        seconds=seen[-1].time_s - seen[0].time_s,
        own_bytes=statistics.median(s.own_bytes for s in seen),
        bytes_per_h=per_s * 3600,
        error_bytes_per_h=error * 3600,
        late_bytes_per_h=late_per_s * 3600,
        late_error_bytes_per_h=late_error * 3600,
        num_files=_ends([s.num_files for s in seen]),
        num_threads=_ends([s.num_threads for s in seen]),
    )


def _growth(seen: Sequence[Sample]) -> tuple[float, float]:
    return slope([s.time_s for s in seen], [float(s.own_bytes) for s in seen])


def _ends(values: Sequence[int]) -> tuple[int, int]:
    part = max(1, len(values) // 5)
    return round(statistics.median(values[:part])), round(statistics.median(values[-part:]))


def shared_ends(shared: Iterable[tuple[float, str, int]]) -> Mapping[str, tuple[int, int]]:
    """Host -> bytes of /dev/shm used at the beginning and at the end."""
    by_host: dict[str, list[int]] = {}
    for _, host, used in shared:
        by_host.setdefault(host, []).append(used)
    return {host: _ends(used) for host, used in by_host.items()}


def _shared_bytes(processes: Iterable[Process]) -> int | None:
    """Of the host that these run on, seen through the root folder of the oldest of them."""
    for process in sorted(processes, key=lambda p: (p.start_ticks, p.pid))[1:]:
        try:
            told = os.statvfs(f"/proc/{process.pid}/root/dev/shm")
        except OSError:
            continue
        return (told.f_blocks - told.f_bfree) * told.f_frsize
    return None
