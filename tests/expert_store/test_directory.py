"""Goal: a directory says who is alive, forgets who falls silent, and fails in a typed way.

Method: one suite for both. Time passes by a virtual clock in memory, and in Redis by shortening
the keys' remaining life; Redis is a real server of its own, started here on a free port.
"""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import redis

from expert_store.directory import (
    Announcer,
    Directory,
    LastKnownDirectory,
    RedisDirectory,
)
from expert_store.errors import DirectoryError
from expert_store.listing import Listing, is_reachable
from expert_store.types import ExpertKey
from tests.memory_directory import MemoryDirectory

EXPIRY_S = 15.0
PASSWORD = "correct horse"
A = Listing("store-a", "records", "v1", "node-1", ("unix:/tmp/a", "10.0.0.1:7000"), None)
B = Listing("ndp-b", "near_data", "v1", "node-2", ("10.0.0.2:7001",), frozenset({ExpertKey(3, 1)}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on this machine: the Redis directory is not tested here")
    port = free_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly"]
    command += ["no", "--requirepass", PASSWORD, "--dir", str(tmp_path_factory.mktemp("redis"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "Ready to accept connections" in line:
                    break
            else:
                raise AssertionError(f"redis-server ended with {process.wait()}")
            yield port
        finally:
            process.terminate()
            process.wait(timeout=10)


class Subject(NamedTuple):
    """A directory and a way to let seconds pass for it."""

    directory: Directory
    advance: Callable[[float], None]


def memory_subject() -> Subject:
    now = [100.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    return Subject(MemoryDirectory(expiry_s=EXPIRY_S, clock=lambda: now[0]), advance)


def redis_url(port: int) -> str:
    return f"redis://:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{port}/0"


def redis_subject(port: int, prefix: str) -> Subject:
    client = redis.Redis(port=port, password=PASSWORD)

    def advance(seconds: float) -> None:
        for key in client.scan_iter(f"{prefix}:*"):
            client.pexpire(key, client.pttl(key) - round(seconds * 1000))

    return Subject(RedisDirectory(redis_url(port), prefix=prefix, expiry_s=EXPIRY_S), advance)


@pytest.fixture(params=["memory", "redis"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "memory":
        made = memory_subject()
    else:
        port = request.getfixturevalue("redis_port")
        made = redis_subject(port, prefix=request.node.name.partition("[")[0])
    with closing(made.directory):
        yield made


def test_announced_listings_come_back_whole_and_by_name(subject: Subject) -> None:
    directory, _ = subject
    assert directory.listings() == ()
    directory.announce(A)
    directory.announce(B)
    assert directory.listings() == (B, A)


def test_a_new_announcement_replaces_the_old(subject: Subject) -> None:
    directory, _ = subject
    directory.announce(A)
    moved = replace(A, addresses=("10.0.0.9:1",), version="v2")
    directory.announce(moved)
    assert directory.listings() == (moved,)


def test_silence_for_the_expiry_ends_a_listing(subject: Subject) -> None:
    directory, advance = subject
    directory.announce(A)
    directory.announce(B)
    advance(0.7 * EXPIRY_S)
    directory.announce(B)
    assert directory.listings() == (B, A)
    advance(0.6 * EXPIRY_S)
    assert directory.listings() == (B,)
    advance(0.6 * EXPIRY_S)
    assert directory.listings() == ()


def test_withdrawing_is_at_once_and_idempotent(subject: Subject) -> None:
    directory, _ = subject
    directory.announce(A)
    directory.withdraw(A.name)
    directory.withdraw(A.name)
    assert directory.listings() == ()


def test_many_threads_announce(subject: Subject) -> None:
    directory, _ = subject
    names = [f"store-{i:02d}" for i in range(16)]
    threads = [
        threading.Thread(target=directory.announce, args=(replace(A, name=name),)) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [listing.name for listing in directory.listings()] == names


def test_an_expiry_must_be_positive() -> None:
    with pytest.raises(ValueError, match="expiry_s: got 0"):
        RedisDirectory("redis://x", expiry_s=0)


def test_prefixes_keep_clusters_apart(redis_port: int) -> None:
    # A prefix with a pattern's characters is taken literally.
    ours = RedisDirectory(redis_url(redis_port), prefix="c*[1]")
    other = RedisDirectory(redis_url(redis_port), prefix="cxx[1]")
    with closing(ours), closing(other):
        ours.announce(A)
        other.announce(B)
        assert ours.listings() == (A,)
        assert other.listings() == (B,)


def test_the_password_from_a_file(redis_port: int, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    url = f"redis://127.0.0.1:{redis_port}"
    with closing(RedisDirectory(url, prefix="pw", password_file=file)) as directory:
        directory.announce(A)
        assert directory.listings() == (A,)
    with (
        closing(RedisDirectory(url)) as directory,
        pytest.raises(DirectoryError, match="password"),
    ):
        directory.listings()
    file.write_text("\n")
    with pytest.raises(ValueError, match=f"{file} is empty"):
        RedisDirectory(url, password_file=file)


def test_a_lost_redis_is_a_typed_error_that_hides_the_password() -> None:
    port = free_port()
    url = f"redis://:secret@127.0.0.1:{port}"
    with closing(RedisDirectory(url, timeout_s=0.2)) as directory:
        for call in (
            directory.listings,
            lambda: directory.announce(A),
            lambda: directory.withdraw("a"),
        ):
            with pytest.raises(DirectoryError, match=f"127.0.0.1:{port} did not answer") as caught:
                call()
            assert "secret" not in str(caught.value)


def test_a_redis_that_hangs_costs_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        with (
            closing(RedisDirectory(url, timeout_s=0.1)) as directory,
            pytest.raises(DirectoryError, match="did not answer"),
        ):
            directory.listings()


def test_a_malformed_listing_in_redis_is_named(redis_port: int) -> None:
    client = redis.Redis(port=redis_port, password=PASSWORD)
    with closing(RedisDirectory(redis_url(redis_port), prefix="bad")) as directory:
        for value in ("nonsense", "{}", '{"keys": 3}', "[1]", A.to_json().replace("records", "x")):
            client.set("bad:listing:a", value)
            with pytest.raises(DirectoryError, match=r"malformed listing under bad:listing:\*"):
                directory.listings()


class Flaky:
    """A directory that is lost when told so."""

    def __init__(self) -> None:
        self.inner = MemoryDirectory()
        self.lost = False
        self.announced = threading.Event()
        self.refused = threading.Event()

    def _check(self) -> None:
        if self.lost:
            self.refused.set()
            raise DirectoryError("away")

    def announce(self, listing: Listing) -> None:
        self._check()
        self.inner.announce(listing)
        self.announced.set()

    def withdraw(self, name: str) -> None:
        self._check()
        self.inner.withdraw(name)

    def listings(self) -> tuple[Listing, ...]:
        self._check()
        return self.inner.listings()

    def close(self) -> None:
        self.inner.close()


def test_the_last_known_map_outlives_the_directory(caplog: pytest.LogCaptureFixture) -> None:
    flaky = Flaky()
    directory = LastKnownDirectory(flaky)
    flaky.lost = True
    with pytest.raises(DirectoryError):
        directory.listings()
    flaky.lost = False
    directory.announce(A)
    assert directory.listings() == (A,)
    flaky.lost = True
    with caplog.at_level(logging.WARNING):
        assert directory.listings() == directory.listings() == (A,)
    assert len(caplog.records) == 1  # said once, not at every step
    with pytest.raises(DirectoryError):
        directory.announce(B)
    flaky.lost = False
    directory.withdraw(A.name)
    assert directory.listings() == ()


def test_the_announcer_announces_and_withdraws(caplog: pytest.LogCaptureFixture) -> None:
    flaky = Flaky()
    announcer = Announcer(flaky, A, interval_s=0.001)
    assert flaky.announced.wait(10)
    with caplog.at_level(logging.WARNING):
        flaky.refused.clear()
        flaky.lost = True
        assert flaky.refused.wait(10)
        flaky.announced.clear()
        flaky.lost = False
        assert flaky.announced.wait(10)  # it goes on after an outage
    assert [record.getMessage() for record in caplog.records] == ["cannot announce store-a: away"]
    assert flaky.listings() == (A,)
    announcer.close()
    assert flaky.listings() == ()


def test_listings_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="role: got 'both'"):
        replace(A, role="both")
    with pytest.raises(ValueError, match="must not be empty"):
        replace(A, addresses=())
    assert B.holds(ExpertKey(3, 1))
    assert not B.holds(ExpertKey(3, 2))
    assert A.holds(ExpertKey(9, 9))


def test_a_unix_socket_of_another_host_is_not_reachable(tmp_path: Path) -> None:
    assert is_reachable("10.0.0.1:1")
    assert is_reachable(f"unix:{tmp_path}")
    assert not is_reachable(f"unix:{tmp_path}/none")
