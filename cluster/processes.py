"""The processes below this one, read from /proc: to see that what was started has also ended.

Where there is no /proc nothing is found, and Ray's own clean-up is all there is. A process is its
id and its start time: a number that was given again is never taken for the old process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Process:
    """One process, for good."""

    pid: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; a zombie, which only waits to be collected, does not."""
        found = _read(self.pid)
        return found is not None and found.process == self and found.state != "Z"


def descendants(pid: int) -> frozenset[Process]:
    """All processes below `pid`, children of children too."""
    if not PROC.is_dir():
        return frozenset()
    children: dict[int, list[_Stat]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (found := _read(int(entry.name))) is not None:
            children.setdefault(found.parent, []).append(found)
    below: set[Process] = set()
    ahead = [pid]
    while ahead:
        for found in children.get(ahead.pop(), []):
            below.add(found.process)
            ahead.append(found.process.pid)
    return frozenset(below)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM do nothing meanwhile, so that a clean-up is never left half way.

    Off the main thread, which alone gets signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # else it was not set by Python, which cannot set it again
                signal.signal(number, handler)


def named(processes: Collection[Process], names: Collection[str]) -> frozenset[Process]:
    """Those of the processes whose program has one of these names (15 characters at most)."""
    return frozenset(p for p in processes if (found := _read(p.pid)) and found.name in names)


def end(
    processes: Collection[Process],
    *,
    patience_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> frozenset[Process]:
    """Wait for these to end, then end the rest by id. Returns those that had to be ended."""
    left = _wait(processes, patience_s, sleep)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in _wait(left, 0, sleep):
            _signal(process, number)
        if not _wait(left, 2.0, sleep):
            break
    return left


@dataclass(frozen=True, slots=True)
class _Stat:
    process: Process
    name: str
    parent: int
    state: str


def _read(pid: int) -> _Stat | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may hold anything; what follows the last one is numbers.
    front, _, numbers = text.rpartition(")")
    fields = numbers.split()
    name = front.partition("(")[2]
    return _Stat(Process(pid, int(fields[19])), name, int(fields[1]), fields[0])


def _wait(
    processes: Collection[Process], patience_s: float, sleep: Callable[[float], None]
) -> frozenset[Process]:
    """Those still alive after at most so many seconds."""
    for _ in range(round(patience_s / POLL_S)):
        processes = [process for process in processes if process.is_alive]
        if not processes:
            break
        sleep(POLL_S)
    return frozenset(process for process in processes if process.is_alive)


def _signal(process: Process, number: signal.Signals) -> None:
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return
