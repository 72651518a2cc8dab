"""Two hosts on one machine: network namespaces joined by a pair of interfaces of a bounded rate.

Owns the namespaces and what runs in them. Needs root, and `ip` and `tc` of Debian's iproute2.
The two share no network but the link; they do share the file system and the cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
Name = Literal["memory", "gpu"]
ADDRESS: Mapping[Name, str] = {"memory": "10.123.47.1", "gpu": "10.123.47.2"}
MTU_BYTES = 9000
SEGMENT_BYTES = 16384
"""Of one burst of packets that the kernel hands over at a time (GSO)."""
BUCKET_S = 150e-6
MIN_BUCKET_BYTES = 10_000
"""How far ahead of its rate the link may run: 0.15 ms, and a packet. A bucket as large as `tc`'s
manual advises (the rate over the kernel's tick) holds all that a layer fetches: with 256 KB, 0.2 MB
came at 4.9 Gbit/s over a link of 0.25. With too small a one the rate is not reached."""
QUEUE_BYTES = 4 << 20
STOP_S = 10.0


class HostsUnavailable(Exception):
    """This machine cannot have two hosts; the message says what is missing."""


class TwoHosts:
    """The hosts "memory" and "gpu", from `with` to its end. One such pair per process.

    Each is bound to a core of its own where the process may use two.
    """

    def __init__(self) -> None:
        self.names: dict[Name, str] = {
            "memory": f"moetier-mem-{os.getpid()}",
            "gpu": f"moetier-gpu-{os.getpid()}",
        }
        self._nodes: list[Node] = []
        cores = sorted(os.sched_getaffinity(0))
        self.cores: dict[Name, int] = {"memory": cores[0], "gpu": cores[-1]}

    def __enter__(self) -> TwoHosts:
        check_machine()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def set_rate(self, gbit_per_s: float) -> None:
        """Bound the link, in each direction."""
        bits_per_s = round(gbit_per_s * 1e9)
        bucket_bytes = max(MIN_BUCKET_BYTES, round(bits_per_s / 8 * BUCKET_S))
        for host in self.names:
            command = f"tc qdisc replace dev {_device(host)} root tbf rate {bits_per_s} "
            command += f"burst {bucket_bytes} limit {QUEUE_BYTES}"
            self._call(f"ip netns exec {self.names[host]} {command}")

    def start(self, host: Name, module: str, *arguments: str) -> Node:
        """Run a module of this checkout on a host, on that host's core."""
        node = Node(
            ["ip", "netns", "exec", self.names[host], "taskset", "-c", str(self.cores[host])],
            module,
            arguments,
        )
        self._nodes.append(node)
        return node

    def _make(self) -> None:
        memory, gpu = self.names["memory"], self.names["gpu"]
        for name in self.names.values():
            self._call(f"ip netns add {name}")
        self._call(
            f"ip link add {_device('memory')} netns {memory} type veth "
            f"peer name {_device('gpu')} netns {gpu}"
        )
        for host, name in self.names.items():
            device = _device(host)
            self._call(f"ip -n {name} addr add {ADDRESS[host]}/30 dev {device}")
            self._call(f"ip -n {name} link set lo up")
            sizes = f"mtu {MTU_BYTES} gso_max_size {SEGMENT_BYTES} gro_max_size {SEGMENT_BYTES}"
            self._call(f"ip -n {name} link set {device} {sizes} up")

    def _remove(self) -> None:
        """End what runs there, then delete the namespaces, and with them their interfaces."""
        for node in self._nodes:
            node.stop()
        for name in self.names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _call(self, command: str) -> None:
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostsUnavailable(
                f"{command!r} failed: {done.stderr.strip()}; this kernel or container does not "
                "allow network namespaces with a token bucket (NET_ADMIN, sch_tbf)"
            )


class Node:
    """A Python process that is told things as lines of JSON, and answers each with one."""

    def __init__(self, prefix: Sequence[str], module: str, arguments: Sequence[str]) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-u", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,  # a Ctrl-C is for the one that started it, which then ends it
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question. Raises RuntimeError when the process is gone."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `hear` says what became of it
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next line. Raises RuntimeError when the process is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait(STOP_S)
            raise RuntimeError(f"{self._module} ended with status {status}; its words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """Close its input, which ends it; after a while by force."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has gone already
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def check_machine() -> None:
    """Raises HostsUnavailable when something that is needed is missing."""
    if os.geteuid() != 0:
        raise HostsUnavailable("network namespaces need root; run it as root (sudo -E)")
    missing = [tool for tool in ("ip", "tc", "taskset") if shutil.which(tool) is None]
    if missing:
        raise HostsUnavailable(
            f"{', '.join(missing)} not found; install iproute2 and util-linux "
            "(apt-get install iproute2 util-linux)"
        )


def _device(host: Name) -> str:
    return f"mt-{host}"
