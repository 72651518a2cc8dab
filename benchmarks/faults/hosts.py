"""Several hosts on one machine: namespaces of network, processes, mounts, on one bridge.

Owns the hosts, their links and what runs in them; knows no Ray. Needs root, iproute2, util-linux.
A host has its own address, process ids, /tmp and /dev/shm; it shares the cores and the rest of the
file system. Everything ends with the process that made it, even when that one is killed: namespaces
live as long as their `pause` process, and that one dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.offload_parts.hosts import HostsUnavailable
from cluster.processes import Process, descendants, end

SUBNET = "10.77.0"
TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount", "hostname", "bash")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
CLONE_NEWNET = 0x40000000
START_S = 10.0
STOP_S = 3.0
FULL_RATE_MBIT = 1000
BURST_BYTES = 64_000
"""A token bucket of half a millisecond at the full rate; ten packets of 1500 bytes are 15 KB."""
QUEUE_MS = 200

# Process 1 of a host. It waits for the one thing that the host is for, and collects orphans.
INIT = """
set -e
# Linux shares the cores evenly between sessions, and by niceness only within one.
echo "$3" > /proc/self/autogroup 2> /dev/null || true
hostname "$1"
mount --bind "$2/tmp" /tmp
mount -t tmpfs -o size=2g tmpfs /dev/shm
shift 3
"$@" &
child=$!
trap 'kill -TERM $child' TERM
set +e
wait $child; status=$?
while kill -0 $child 2>/dev/null; do wait $child; status=$?; done
exit $status
"""


def check_machine() -> None:
    """Raises HostsUnavailable when something that is needed is missing."""
    if os.geteuid() != 0:
        raise HostsUnavailable("hosts in namespaces need root; run it as root (sudo -E)")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise HostsUnavailable(
            f"{', '.join(missing)} not found; install iproute2 and util-linux "
            "(apt-get install iproute2 util-linux)"
        )


class Network:
    """Hosts by name, from `with` to its end. `folder` holds each one's /tmp and log."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._names, self._folder = tuple(names), folder
        self._switch: Pause | None = None
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Network:
        check_machine()
        try:
            self._switch = Pause()
            self._switch.call("ip link add br0 type bridge")
            self._switch.call("ip link set br0 up")
            for number, name in enumerate(self._names, start=1):
                self.hosts[name] = Host(
                    name, f"{SUBNET}.{number}", self._folder / name, self._switch
                )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    @property
    def pauses(self) -> tuple[int, ...]:
        """Ids of the processes that hold the namespaces of the switch and the hosts."""
        assert self._switch is not None
        return (self._switch.pid, *(host.pause_pid for host in self.hosts.values()))

    def close(self) -> None:
        """End everything on every host, then the hosts."""
        for host in self.hosts.values():
            host.close()
        if self._switch is not None:
            self._switch.close()


class Pause:
    """A network namespace, held by a process that does nothing else."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([*DIES_WITH_US, "unshare", "--net", "sleep", "infinity"])
        self.pid = self._process.pid
        ours = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + START_S
        while os.readlink(f"/proc/{self.pid}/ns/net") == ours:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise HostsUnavailable(
                    "`unshare --net` failed: this kernel or container allows no network namespaces"
                )
            time.sleep(0.01)
        self.call("ip link set lo up")

    def call(self, command: str) -> None:
        """Run a command of iproute2 here. Raises HostsUnavailable with its words when it fails."""
        prefix = ["nsenter", "-t", str(self.pid), "-n"]
        done = subprocess.run(
            [*prefix, *command.split()], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise HostsUnavailable(
                f"{command!r} failed: {done.stderr.strip()}; this kernel or container does not "
                "allow bridges, veth pairs or token buckets (NET_ADMIN, sch_tbf)"
            )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Host:
    """One host: an address for good, and one main process that can be started again and again."""

    def __init__(self, name: str, address: str, folder: Path, switch: Pause) -> None:
        self.name, self.address, self.folder = name, address, folder
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        (folder / "tmp").chmod(0o1777)
        self._switch, self._pause = switch, Pause()
        self._main: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        switch.call(f"ip link add {name} type veth peer name eth0 netns {self._pause.pid}")
        switch.call(f"ip link set {name} master br0 up")
        self._pause.call(f"ip addr add {address}/24 dev eth0")
        self._pause.call("ip link set eth0 up")
        self.set_rate(FULL_RATE_MBIT)

    @property
    def pause_pid(self) -> int:
        """Of the process that holds its network."""
        return self._pause.pid

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def is_running(self) -> bool:
        return self._main is not None and self._main.poll() is None

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], niceness: int = 0
    ) -> None:
        """Boot it with this as its only service; the host is off when that ends.

        `niceness` is of the whole host against others.
        """
        with self._lock, self.log.open("ab") as log:
            assert not self.is_running, f"{self.name} is up"
            self._main = subprocess.Popen(
                [
                    *DIES_WITH_US,
                    *("nsenter", "-t", str(self._pause.pid), "-n"),
                    *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"),
                    *("--ipc", "bash", "-c", INIT, "init", self.name, str(self.folder)),
                    *(str(niceness), *command),
                ],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def power_off(self) -> None:
        """Everything on it is gone at once."""
        main = self._main
        if main is not None:
            left = self.processes()
            main.kill()  # unshare takes process 1 with it, and that one all others
            main.wait()
            end(left, patience_s=STOP_S)

    def processes(self, title: str = "") -> frozenset[Process]:
        """What runs there, or those whose command line holds `title`."""
        if not self.is_running:
            return frozenset()
        assert self._main is not None
        found = descendants(self._main.pid)
        return frozenset(p for p in found if not title or title in command_line(p))

    def kill(self, title: str, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal to those with this in their command line. Raises LookupError for none."""
        found = self.processes(title)
        if not found:
            raise LookupError(f"{self.name}: no process has {title!r} in its command line")
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def set_link(self, *, is_up: bool) -> None:
        """The cable in, or out: then all packets are lost without a word."""
        self._switch.call(f"ip link set {self.name} {'up' if is_up else 'down'}")

    def set_rate(self, rate_mbit: int) -> None:
        """Bound the link, in each direction."""
        bucket = f"tbf rate {rate_mbit}mbit burst {BURST_BYTES} latency {QUEUE_MS}ms"
        self._pause.call(f"tc qdisc replace dev eth0 root {bucket}")
        self._switch.call(f"tc qdisc replace dev {self.name} root {bucket}")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread's new sockets, and its new child processes, are on that host's network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with (
            Path("/proc/thread-self/ns/net").open() as before,
            Path(f"/proc/{self._pause.pid}/ns/net").open() as there,
        ):
            _enter(libc, there.fileno())
            try:
                yield
            finally:
                _enter(libc, before.fileno())

    def close(self) -> None:
        self.power_off()
        self._pause.close()


def command_line(process: Process) -> str:
    """Its arguments, or its title; empty when it has gone."""
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _enter(libc: ctypes.CDLL, descriptor: int) -> None:
    if libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise HostsUnavailable(f"setns failed: {os.strerror(number)}; it needs SYS_ADMIN")
