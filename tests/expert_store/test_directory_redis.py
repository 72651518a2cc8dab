"""Goal: the directory outlives what happens to a Redis: it comes back empty, its master changes,
its password is rotated, it speaks TLS.

Method: real servers and Sentinels on free ports, killed with SIGKILL; URLs by table.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from expert_store.directory import Announcer, Directory, LastKnownDirectory, RedisDirectory
from expert_store.errors import DirectoryError
from expert_store.listing import Listing
from expert_store.redis_url import RedisAddress, parse_redis_url
from expert_store.types import ExpertKey
from tests.redis_servers import free_port, running_redis, running_sentinel, wait_until

A = Listing("store-a", "records", "v1", "node-1", ("10.0.0.1:7000",), None)
B = Listing("store-b", "records", "v2", "node-2", ("10.0.0.2:7000",), frozenset({ExpertKey(3, 1)}))

GOOD = {
    "redis://10.0.0.5": RedisAddress((("10.0.0.5", 6379),)),
    "redis://h:1/3": RedisAddress((("h", 1),), 3),
    "rediss://[::1]:7/": RedisAddress((("::1", 7),), is_tls=True),
    "redis://u:p%40w@h:1/0": RedisAddress((("h", 1),), username="u", password="p@w"),
    "redis+sentinel://a,b:5/main": RedisAddress((("a", 26379), ("b", 5)), service="main"),
    "rediss+sentinel://a:1,b:2,c:3/main/4": RedisAddress(
        (("a", 1), ("b", 2), ("c", 3)), 4, "main", is_tls=True
    ),
}
BAD = {
    "h:1": "unknown scheme",
    "http://h:1": "unknown scheme 'http'",
    "redis://": "a host is missing",
    "redis://h:x": "'h:x' is no HOST:PORT",
    "redis://h:0": "'h:0' is no HOST:PORT",
    "redis://h:1/main": "database 'main' is no number",
    "redis://h:1/0/1": "database '0/1' is no number",
    "redis://a:1,b:2": "2 hosts without Sentinels",
    "redis+sentinel://a:1,b:2": "without the name of a service",
    "redis+sentinel://a:1,,b:2/main": "a host is missing in 'a:1,,b:2'",
    "redis+sentinel://a:1/main/x": "database 'x' is no number",
    "redis://h:1?db=3": "options after",
}


@pytest.mark.parametrize("url", GOOD)
def test_urls_are_understood(url: str) -> None:
    assert parse_redis_url(url) == GOOD[url]


@pytest.mark.parametrize("url", BAD)
def test_bad_urls_say_what_is_wrong_and_what_is_expected(url: str) -> None:
    with pytest.raises(ValueError, match=BAD[url]) as caught:
        parse_redis_url(url)
    assert "redis+sentinel://HOST:PORT" in str(caught.value)


def names(directory: Directory) -> list[str]:
    return [listing.name for listing in directory.listings()]


def test_a_redis_that_comes_back_empty_is_filled_again_within_a_heartbeat(tmp_path: Path) -> None:
    port, interval_s = free_port(), 0.2
    url = f"redis://127.0.0.1:{port}/0"
    with ExitStack() as stack:
        directory = stack.enter_context(closing(RedisDirectory(url)))
        reader = LastKnownDirectory(directory)
        with running_redis(tmp_path, port):
            for listing in (A, B):
                own = stack.enter_context(closing(RedisDirectory(url)))
                announcer = Announcer(own, listing, interval_s=interval_s)
                stack.enter_context(closing(announcer))
            wait_until(lambda: len(reader.listings()) == 2)
        with pytest.raises(DirectoryError):
            directory.listings()
        assert reader.listings() == (A, B), "workers go on with the last map"
        with running_redis(tmp_path, port):
            # A busy machine may be late; the server has no other way to know of A and B.
            wait_until(lambda: names(directory) == ["store-a", "store-b"])
            assert directory.listings() == (A, B), "keys and versions too"
            stack.pop_all().close()


def test_a_rotated_password_is_read_for_the_next_connection(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "password"
    file.write_text("old\n")
    url = f"redis://127.0.0.1:{port}"
    with (
        running_redis(tmp_path, port, "--requirepass", "old"),
        closing(RedisDirectory(url, password_file=file)) as directory,
        closing(redis.Redis(port=port, password="old")) as operator,
    ):
        directory.announce(A)
        operator.config_set("requirepass", "new")
        file.write_text("new\n")
        operator.client_kill_filter(skipme=True)
        assert directory.listings() == (A,)
        # While the file is away no new connection can be made, and that is said.
        file.unlink()
        operator.client_kill_filter(skipme=True)
        with pytest.raises(DirectoryError, match=f"no password: .*{file.name}"):
            directory.listings()
        file.write_text("new\n")
        assert directory.listings() == (A,)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A folder with ca.pem, server.pem and server.key for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl on this machine: TLS to Redis is not tested here")

    def call(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=tmp_path, check=True, capture_output=True)

    new_key = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
    for name in ("ca", "other"):
        call("req", "-x509", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj",
             f"/CN={name}")  # fmt: skip
    call("req", *new_key[:3], "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=redis")
    (tmp_path / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    call("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
         "-CAcreateserial", "-extfile", "san", "-out", "server.pem")  # fmt: skip
    return tmp_path


def test_tls_trusts_the_given_authority_and_no_other(authority: Path) -> None:
    port = free_port()
    options = ("--tls-cert-file", str(authority / "server.pem"), "--tls-key-file",
               str(authority / "server.key"), "--tls-auth-clients", "no")  # fmt: skip
    url = f"rediss://127.0.0.1:{port}/0"
    with running_redis(authority, port, *options, is_tls=True):
        with closing(RedisDirectory(url, ca_file=authority / "ca.pem")) as directory:
            directory.announce(B)
            assert directory.listings() == (B,)
        for wrong in (authority / "other.pem", None):
            with (
                closing(RedisDirectory(url, ca_file=wrong)) as directory,
                pytest.raises(DirectoryError, match="certificate verify failed"),
            ):
                directory.listings()


def test_sentinels_lead_to_the_new_master_when_the_old_one_dies(tmp_path: Path) -> None:
    first, second = free_port(), free_port()
    sentinels = [free_port() for _ in range(3)]
    hosts = ",".join(f"127.0.0.1:{port}" for port in sentinels)
    with ExitStack() as stack:
        folders = [tmp_path / name for name in ("first", "second", "sentinels")]
        for folder in folders:
            folder.mkdir()
        master = stack.enter_context(
            running_redis(folders[0], first, "--repl-diskless-sync-delay", "0")
        )
        stack.enter_context(
            running_redis(folders[1], second, "--replicaof", "127.0.0.1", str(first))
        )
        replica = stack.enter_context(closing(redis.Redis(port=second)))
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up")
        for port in sentinels:
            stack.enter_context(running_sentinel(folders[2], port, first, service="main", quorum=2))
        url = f"redis+sentinel://{hosts}/main/0"
        directory = stack.enter_context(closing(RedisDirectory(url)))
        stack.enter_context(closing(Announcer(directory, A, interval_s=0.2)))
        reader = stack.enter_context(closing(RedisDirectory(url)))
        wait_until(lambda: names(reader) == ["store-a"])
        asked = stack.enter_context(closing(redis.Redis(port=sentinels[0])))
        wait_until(lambda: _is_watched(asked))

        master.kill()
        wait_until(lambda: replica.info("replication")["role"] == "master")
        fresh = replace(A, name="store-c")

        def announced() -> bool:
            try:
                reader.announce(fresh)
            except DirectoryError:
                return False
            return names(reader) == ["store-a", "store-c"]

        wait_until(announced)
        assert replica.dbsize() == 2, "the new master holds them"


def _is_watched(sentinel: redis.Redis) -> bool:
    state = sentinel.sentinel_masters()["main"]
    return bool(state["num-slaves"] >= 1 and state["num-other-sentinels"] >= 2)


def test_sentinels_that_know_no_such_service_are_named() -> None:
    port = free_port()
    with (
        closing(RedisDirectory(f"redis+sentinel://127.0.0.1:{port}/main")) as directory,
        pytest.raises(DirectoryError, match=f"Redis at 127.0.0.1:{port}/main did not answer"),
    ):
        directory.listings()
