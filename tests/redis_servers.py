"""Real Redis servers and Sentinels on free ports of this machine, ended with the test."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

START_TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_binary() -> str:
    """redis-server's path; skips the test where it is not installed."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on this machine: what needs a real Redis is not tested here")
    return binary


@contextmanager
def running_redis(
    folder: Path, port: int, *options: str, is_tls: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that keeps nothing on disk, up when this yields. Without TLS on `port`, or with."""
    where = ["--port", "0", "--tls-port", str(port)] if is_tls else ["--port", str(port)]
    command = [redis_binary(), *where, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with _running([*command, "--dir", str(folder), *options], port) as process:
        yield process


@contextmanager
def running_sentinel(
    folder: Path, port: int, master_port: int, *, service: str, quorum: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A Sentinel that gives a silent master up after a second; `redis-server --sentinel`."""
    config = folder / f"sentinel-{port}.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor {service} 127.0.0.1 {master_port} {quorum}\n"
        f"sentinel down-after-milliseconds {service} 1000\n"
        f"sentinel failover-timeout {service} 3000\n"
    )
    with _running([redis_binary(), str(config), "--sentinel"], port) as process:
        yield process


def wait_until(condition: object, timeout_s: float = START_TIMEOUT_S) -> None:
    """Poll until `condition()` is true; a redis.RedisError or OSError counts as not yet."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (redis.RedisError, OSError) as error:
            last = error
        time.sleep(0.02)
    raise AssertionError(f"not so within {timeout_s:g} s (last error: {last})")


@contextmanager
def _running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    def listens() -> bool:
        assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
        with socket.create_connection(("127.0.0.1", port), 1):
            return True

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(listens)
            yield process
        finally:
            process.kill()
            process.wait(timeout=10)
