"""Where the directory's Redis is, as a URL: one server or Sentinels, with TLS or without.

Only parses: knows no client library, so that a config can be checked where none is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

REDIS_PORT = 6379
SENTINEL_PORT = 26379
SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")
EXPECTED = (
    "redis://HOST:PORT/DB, or redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB; rediss instead of "
    "redis is TLS"
)


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Parts of such a URL. `hosts` are (host, port): of the server, or of the Sentinels if there
    is a `service`, the name under which they watch the servers.
    """

    hosts: tuple[tuple[str, int], ...]
    database: int = 0
    service: str | None = None
    is_tls: bool = False
    username: str | None = None
    password: str | None = None

    def __str__(self) -> str:
        """For messages: no user and no password."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{hosts}/{self.service}" if self.service else hosts


def parse_redis_url(url: str) -> RedisAddress:
    """The parts of a URL. Raises ValueError that says what is wrong with it, without its password.

    A user and password may stand before the hosts; with Sentinels they are the servers' own.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme[:32]!r}; expected {EXPECTED}")
    credentials, _, rest = rest.rpartition("@")
    hosts, _, path = rest.partition("/")
    if any(mark in rest for mark in "?#"):
        raise ValueError(f"options after ? or # are not read; expected {EXPECTED}")
    has_sentinels = scheme.endswith("+sentinel")
    named = [_host(host, SENTINEL_PORT if has_sentinels else REDIS_PORT) for host in _split(hosts)]
    parts = [part for part in path.split("/") if part]
    service = unquote(parts.pop(0)) if has_sentinels and parts else None
    if has_sentinels and service is None:
        raise ValueError(f"Sentinels without the name of a service; expected {EXPECTED}")
    if not has_sentinels and len(named) > 1:
        raise ValueError(f"{len(named)} hosts without Sentinels; expected {EXPECTED}")
    if len(parts) > 1 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"database {'/'.join(parts)!r} is no number; expected {EXPECTED}")
    username, _, password = credentials.partition(":")
    return RedisAddress(
        hosts=tuple(named),
        database=int(parts[0]) if parts else 0,
        service=service,
        is_tls=scheme.startswith("rediss"),
        username=unquote(username) or None,
        password=unquote(password) or None,
    )


def _split(hosts: str) -> list[str]:
    found = hosts.split(",")
    if not all(found):
        raise ValueError(f"a host is missing in {hosts!r}; expected {EXPECTED}")
    return found


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts: SplitResult = urlsplit(f"//{text}")
    try:
        port = default_port if parts.port is None else parts.port
    except ValueError:
        port = 0
    if not parts.hostname or not port:
        raise ValueError(f"{text!r} is no HOST:PORT; expected {EXPECTED}")
    return parts.hostname, port
