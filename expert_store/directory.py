"""The directory: which holders of segments are alive, in Redis.

A holder announces its listing again and again; one that falls silent disappears after `expiry_s`.
Knows no transport; losing it stops no running request (`LastKnownDirectory`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.retry import Retry
from redis.sentinel import Sentinel

from expert_store.errors import DirectoryError
from expert_store.listing import Listing
from expert_store.redis_url import RedisAddress, parse_redis_url

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Directory(Protocol):
    """Who is alive. Thread-safe. Every call raises DirectoryError when the directory is lost."""

    def announce(self, listing: Listing) -> None:
        """Add or renew a listing; it stays for the directory's `expiry_s`."""
        ...

    def withdraw(self, name: str) -> None:
        """Take a listing out at once; nothing happens when it is not there."""
        ...

    def listings(self) -> tuple[Listing, ...]:
        """The live listings, by name."""
        ...

    def close(self) -> None: ...


class RedisDirectory:
    """A directory in Redis: one expiring key per listing, `<prefix>:listing:<name>`.

    `url` is as in `expert_store/redis_url.py`; with Sentinels every connection asks them for the
    master. A password in a file wins over one in the URL and is read anew for every connection:
    a rotated one needs no restart. TLS trusts the CAs in `ca_file`, without it the system's.
    Each call takes at most about `timeout_s` times 2 for the server and 2 for each Sentinel.

    Raises ValueError for a malformed URL or an empty password file; connects only when first used.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "moetier",
        password_file: Path | None = None,
        sentinel_password_file: Path | None = None,
        ca_file: Path | None = None,
        expiry_s: float = 15.0,
        timeout_s: float = 1.0,
    ) -> None:
        _check_expiry(expiry_s)
        self._expiry_ms = max(1, round(expiry_s * 1000))
        self._prefix = f"{prefix}:listing:"
        address = parse_redis_url(url)
        self._where = str(address)
        options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 1),
        }
        if address.is_tls:
            options |= {"ssl": True, "ssl_ca_certs": str(ca_file) if ca_file else None}
        self._client = _open(address, options, password_file, sentinel_password_file)

    def announce(self, listing: Listing) -> None:
        key = self._prefix + listing.name
        self._ask(lambda: self._client.set(key, listing.to_json(), px=self._expiry_ms))

    def withdraw(self, name: str) -> None:
        self._ask(lambda: self._client.delete(self._prefix + name))

    def listings(self) -> tuple[Listing, ...]:
        values = self._ask(self._read_all)
        try:
            found = [Listing.from_json(value) for value in values if value is not None]
        except ValueError as error:
            raise DirectoryError(
                f"Redis at {self._where} holds a malformed listing under {self._prefix}*: {error}; "
                "delete that key or use another prefix"
            ) from error
        return tuple(sorted(found, key=lambda listing: listing.name))

    def close(self) -> None:
        self._client.close()

    def _read_all(self) -> list[bytes | str | None]:
        pattern = _escaped(self._prefix) + "*"
        keys = list(dict.fromkeys(self._client.scan_iter(match=pattern, count=1000)))
        return list(self._client.mget(keys)) if keys else []

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except redis.RedisError as error:
            raise DirectoryError(
                f"Redis at {self._where} did not answer: {error}; check that it runs and that "
                "directory.redis_url and its password are right"
            ) from error


class PasswordFile(CredentialProvider):
    """The password for a new connection: what stands in the file then, or the URL's own user.

    Raises ValueError at once for an empty file, OSError for one that cannot be read.
    """

    def __init__(self, file: Path, username: str | None = None) -> None:
        self._file, self._username = file, username
        self._read()

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._read()
        except (OSError, ValueError) as error:
            # While a secret is exchanged it may be away: as if the server were.
            raise redis.ConnectionError(f"no password: {error}") from error
        return (self._username, password) if self._username else (password,)

    def _read(self) -> str:
        password = self._file.read_text().strip()
        if not password:
            raise ValueError(f"password_file: {self._file} is empty")
        return password


def _open(
    address: RedisAddress,
    options: dict[str, Any],
    password_file: Path | None,
    sentinel_password_file: Path | None,
) -> redis.Redis:
    """A client of the server, or of the master that the Sentinels name."""
    own: dict[str, Any] = {"db": address.database}
    if password_file is not None:
        own["credential_provider"] = PasswordFile(password_file, address.username)
    else:
        own |= {"username": address.username, "password": address.password}
    if address.service is None:
        ((host, port),) = address.hosts
        return redis.Redis(host, port, **own, **options)
    asking = dict(options)
    if sentinel_password_file is not None:
        asking["credential_provider"] = PasswordFile(sentinel_password_file)
    sentinels = Sentinel(address.hosts, sentinel_kwargs=asking)
    client: redis.Redis = sentinels.master_for(address.service, **own, **options)
    return client


class LastKnownDirectory:
    """Another directory, whose last answer is kept and given when it cannot be reached."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._known: tuple[Listing, ...] | None = None
        self._lost = False

    def announce(self, listing: Listing) -> None:
        self._directory.announce(listing)

    def withdraw(self, name: str) -> None:
        self._directory.withdraw(name)

    def listings(self) -> tuple[Listing, ...]:
        """The live listings, or the last ones known. Raises DirectoryError when none ever were."""
        try:
            self._known = self._directory.listings()
        except DirectoryError as error:
            if self._known is None:
                raise
            if not self._lost:
                logger.warning("%s; going on with the last %d listings", error, len(self._known))
            self._lost = True
        else:
            self._lost = False
        return self._known

    def close(self) -> None:
        self._directory.close()


class Announcer:
    """Announces one listing every `interval_s` from a thread of its own, until closed.

    An interval of a third of the directory's expiry survives two lost announcements. A directory
    that cannot be reached is logged once per outage and tried again.
    """

    def __init__(self, directory: Directory, listing: Listing, *, interval_s: float = 5.0) -> None:
        self._directory = directory
        self._listing = listing
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop announcing and take the listing out. Raises DirectoryError when it is lost."""
        self._stopped.set()
        self._thread.join()
        self._directory.withdraw(self._listing.name)

    def _run(self) -> None:
        lost = False
        while not self._stopped.is_set():
            try:
                self._directory.announce(self._listing)
                lost = False
            except DirectoryError as error:
                if not lost:
                    logger.warning("cannot announce %s: %s", self._listing.name, error)
                lost = True
            self._stopped.wait(self._interval_s)


def _check_expiry(expiry_s: float) -> None:
    if expiry_s <= 0:
        raise ValueError(f"expiry_s: got {expiry_s}, expected a positive number of seconds")


def _escaped(text: str) -> str:
    """Text with the characters that SCAN's patterns give a meaning to taken literally."""
    return "".join("\\" + char if char in "*?[]^-\\" else char for char in text)
