"""Goal: the machine is read rightly, and nothing that is missing or odd makes the doctor fall over.

Method: a made-up /proc, /sys and /dev in a folder (cgroup v1 and v2, none at all), a fake Redis on
a local socket, a package that cannot be imported, and the command once for real against the clock.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from cluster import machine
from cluster.cli import main
from cluster.commands import doctor
from cluster.machine import read_machine
from cluster.redis_probe import probe_redis

GIBIBYTE = 1 << 30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n"


def test_empty_root_gives_a_report_and_no_exception(tmp_path: Path) -> None:
    found = read_machine(tmp_path / "cache", root=tmp_path / "nothing")
    assert found.cpu.flags == ()
    assert found.cpu.quota_cores is None
    assert found.memory.total_bytes == 0
    assert found.memory.limit_bytes is None
    assert found.bundled_model is None
    assert found.cache is not None, "a cache folder not made yet stands on its parent's disk"


def test_cpuinfo_gives_model_and_relevant_flags(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "model name\t: A CPU\nflags\t\t: fpu avx2 sse avx512_vnni\n"})
    cpu = machine.read_cpu(tmp_path)
    assert (cpu.model, cpu.flags) == ("A CPU", ("avx2", "avx512_vnni"))


def test_cgroup_v2_takes_the_tightest_of_the_nested_groups(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/box/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": str(4 * GIBIBYTE),
            "sys/fs/cgroup/pod/memory.current": str(1 * GIBIBYTE),
        },
    )
    assert machine.read_quota(tmp_path) == 1.5
    memory = machine.read_memory(tmp_path)
    assert memory.total_bytes == 16 * GIBIBYTE
    assert memory.limit_bytes == 4 * GIBIBYTE
    assert memory.available_bytes == 3 * GIBIBYTE


def test_cgroup_v1_no_limit_is_a_huge_number(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/x\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        },
    )
    assert machine.read_quota(tmp_path) == 3.0
    memory = machine.read_memory(tmp_path)
    assert (memory.limit_bytes, memory.available_bytes) == (None, 8 * GIBIBYTE)


@pytest.mark.parametrize("text", ["", "garbage", "MemTotal:\n", "MemTotal: 5 kB\nMemAvailable:\n"])
def test_odd_meminfo_is_no_exception(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"proc/meminfo": text})
    assert machine.read_memory(tmp_path).available_bytes == 0


def test_missing_or_broken_torch_is_told(tmp_path: Path, monkeypatch) -> None:
    def refuse(name: str):
        raise OSError(f"{name}: libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(machine.importlib, "import_module", refuse)
    accelerators = machine.read_accelerators(tmp_path)
    assert accelerators.gpus == ()
    assert "libcudart" in (accelerators.problem or "")
    assert machine.read_native_isa() is None


def test_unknown_package_has_no_version() -> None:
    assert machine.read_version("surely-not-a-package-of-this-name") is None
    assert machine.read_version("torch")


@pytest.fixture
def answering():
    """Starts a server on a local port that answers one connection with the given bytes."""
    threads, sockets = [], []

    def start(answer: bytes) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        sockets.append(server)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                assert connection.recv(64) == b"PING\r\n"
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        threads.append(thread)
        return f"redis://127.0.0.1:{server.getsockname()[1]}/0"

    yield start
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()
    for server in sockets:
        server.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"+PONG\r\n", "ok"),
        (b"-NOAUTH Authentication required.\r\n", "ok, wants a password"),
        (b"HTTP/1.1 400 Bad Request\r\n", "answered 'HTTP/1.1 400 Bad Request' to PING"),
        (b"-LOADING Redis is loading\r\n", "answered '-LOADING Redis is loading' to PING"),
        (b"", "answered 'nothing' to PING"),
    ],
)
def test_redis_answers(answering, answer: bytes, expected: str) -> None:
    assert probe_redis(answering(answer)).startswith(expected)


def test_redis_that_is_not_there_or_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "not reachable" in probe_redis(f"redis://127.0.0.1:{port}", timeout_s=0.1)
    assert "not reachable" in probe_redis(f"redis://127.0.0.1:{port}", timeout_s=0.1)


@pytest.mark.parametrize("url", ["localhost:6379", "http://x", "redis://", "redis://x:99999", ""])
def test_bad_redis_url_is_the_callers_mistake(url: str, capsys) -> None:
    assert main(["doctor", "--redis", url]) == 2
    assert "expected redis://HOST:PORT" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_real_redis(tmp_path: Path) -> None:
    import subprocess

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 10
        while (answer := probe_redis(f"redis://127.0.0.1:{port}")) != "ok":
            assert time.monotonic() < deadline, answer
    finally:
        server.terminate()
        server.wait(timeout=10)


def test_command_runs_here_within_its_time(capsys) -> None:
    """The limit is 5 s from a cold start; torch is imported already: this bounds the rest."""
    started = time.monotonic()
    assert main(["doctor", "--json"]) == 0
    assert time.monotonic() - started < 5
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["versions"]["ray"]
    assert report["machine"]["bundled_model"].endswith("mixtral-mini")
    assert report["advice"]["ndp_threads"] >= 1


def test_table_is_the_default(capsys) -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args([])) == 0
    text = capsys.readouterr().out
    for part in ("instruction sets", "/dev/shm", "near-data workers", "transport"):
        assert part in text


def test_missing_essential_package_is_exit_code_1(monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine, "read_version", lambda name: None if name == "ray" else "1.0")
    assert main(["doctor"]) == 1
    assert "error: Python package ray is not installed" in capsys.readouterr().out
