"""Is a Redis there? One PING over a plain socket, so that asking needs no client library.

Knows the first line of the protocol only; the directory itself is `expert_store/directory.py`.
"""

from __future__ import annotations

import socket
import ssl
from urllib.parse import urlsplit

TIMEOUT_S = 1.0


def probe_redis(url: str, timeout_s: float = TIMEOUT_S) -> str:
    """ "ok", or what is wrong, in words, within about `timeout_s` of trying.

    A Redis that wants a password counts as there and is reported as such.
    Raises ValueError for a URL that is not redis://HOST[:PORT] or rediss://HOST[:PORT].
    """
    host, port, tls = parse_url(url)
    try:
        with socket.create_connection((host, port), timeout_s) as plain:
            plain.settimeout(timeout_s)
            if not tls:
                return describe(ping(plain))
            with ssl.create_default_context().wrap_socket(plain, server_hostname=host) as secure:
                return describe(ping(secure))
    except OSError as error:
        return f"not reachable at {host}:{port}: {error}"


def parse_url(url: str) -> tuple[str, int, bool]:
    """(host, port, TLS?)"""
    parts = urlsplit(url)
    try:
        port = parts.port or 6379
    except ValueError:
        port = 0
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or not port:
        raise ValueError(f"redis: got {url!r}, expected redis://HOST:PORT or rediss://HOST:PORT")
    return parts.hostname, port, parts.scheme == "rediss"


def ping(connection: socket.socket) -> bytes:
    connection.sendall(b"PING\r\n")
    return connection.recv(256)


def describe(answer: bytes) -> str:
    if answer.startswith(b"+PONG"):
        return "ok"
    if answer.startswith((b"-NOAUTH", b"-WRONGPASS")):
        return "ok, wants a password"
    line = answer.splitlines()[0].decode(errors="replace") if answer else "nothing"
    return f"answered {line!r} to PING, which is not Redis or a Redis in trouble"
