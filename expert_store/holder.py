"""What a store actor and a near-data actor have in common: a segment and its repair, where they
listen, what they say of themselves, and their announcements. Knows no Ray.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from expert_store.directory import Announcer, Directory
from expert_store.errors import StoreError
from expert_store.listing import Listing, Role
from expert_store.repair import Repairer
from expert_store.rpc import GrpcSource
from expert_store.segment import Segment

PREFIX = "moetier-socket-"
SOCKET = "s"
STALE_S = 60.0

OpenDirectory = Callable[[], Directory]
"""Opens a directory on the holder's own node, for instance `partial(RedisDirectory, url)`; it is
sent to the actor, so it must pickle."""


@dataclass(frozen=True, slots=True)
class HolderStatus:
    """What a running holder says of itself. That records were damaged or repaired makes it no other
    holder: those numbers are not compared.
    """

    listing: Listing
    num_experts: int
    num_bytes: int  # of all records of its segment
    pid: int
    num_quarantined: int = field(default=0, compare=False)
    num_repaired: int = field(default=0, compare=False)


class Server(Protocol):
    """What listens in front of a segment."""

    @property
    def addresses(self) -> tuple[str, ...]: ...

    def close(self) -> None: ...


class Holder:
    """A segment that is served on this node and announced, until closed. Its damaged records are
    found and repaired as `Repairer` does, from the copies that it was told of (`know`) or that the
    directory lists.

    `serve` starts the server on the addresses it is given: a unix socket, then `tcp_address`
    (host:port, 0 for a free one, or host:first-last for the first free one of these). `name` is
    unique among the holders.
    """

    def __init__(
        self,
        segment: Segment,
        role: Role,
        serve: Callable[[tuple[str, str]], Server],
        *,
        tcp_address: str,
        name: str,
        node_id: str,
        directory: OpenDirectory | None,
        scrub_bytes_per_s: float = 0.0,
    ) -> None:
        self._segment = segment
        self._known: tuple[Listing, ...] = ()
        self._socket = SocketFolder()
        self._server = first_free(
            [partial(serve, (self._socket.address, each)) for each in each_port(tcp_address)]
        )
        holds_all = len(segment.keys) == len(segment.manifest.experts)
        listing = Listing(
            name=name,
            role=role,
            version=segment.manifest.version,
            node_id=node_id,
            addresses=self._server.addresses,
            keys=None if holds_all else segment.keys,
        )
        self._presence = Presence(
            listing,
            num_experts=len(segment.keys),
            num_bytes=segment.num_bytes,
            directory=directory,
        )
        others = GrpcSource(segment.manifest, self._others)
        self._repairer = Repairer(segment, others, scrub_bytes_per_s=scrub_bytes_per_s)

    @property
    def status(self) -> HolderStatus:
        return replace(
            self._presence.status,
            num_quarantined=len(self._segment.quarantined),
            num_repaired=self._segment.num_repaired,
        )

    def know(self, listings: Sequence[Listing]) -> None:
        """Which holders of records there are now; this one may be among them."""
        self._known = tuple(listings)

    def _others(self) -> Sequence[Listing]:
        """Raises DirectoryError when it was told of nobody and the directory is lost."""
        own = self._presence.status.listing.name
        return [each for each in self._known or self._presence.listings() if each.name != own]

    def close(self) -> None:
        """Withdraw and stop serving. Raises DirectoryError when the directory is lost; all else is
        closed then too.
        """
        self._repairer.close()
        try:
            self._presence.close()
        finally:
            self._server.close()
            self._socket.close()
            self._segment.close()


class SocketFolder:
    """A private folder for a unix socket, short enough for the 107 bytes that its path may have.

    A killed process leaves its folder behind; making a new one removes those of this user in
    which nobody has listened for `STALE_S`.
    """

    def __init__(self) -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            if _is_stale(folder):
                shutil.rmtree(folder, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))

    @property
    def address(self) -> str:
        return f"unix:{self._folder / SOCKET}"

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _is_stale(folder: Path) -> bool:
    path = folder / SOCKET
    try:
        status = path.lstat()
        # Between bind and listen a socket refuses too: leave new ones alone.
        is_old = time.time() - status.st_mtime >= STALE_S
        if not (is_old and stat.S_ISSOCK(status.st_mode) and status.st_uid == os.getuid()):
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(0.1)
            probe.connect(str(path))
    except ConnectionRefusedError:
        return True
    except OSError:  # gone meanwhile, or too busy to answer
        return False
    return False


class Presence:
    """A holder's listing, announced to a directory as long as the holder lives, if there is one."""

    def __init__(
        self,
        listing: Listing,
        *,
        num_experts: int,
        num_bytes: int,
        directory: OpenDirectory | None,
        interval_s: float = 5.0,
    ) -> None:
        self.status = HolderStatus(listing, num_experts, num_bytes, os.getpid())
        self._directory = directory() if directory else None
        self._announcer = (
            Announcer(self._directory, listing, interval_s=interval_s) if self._directory else None
        )

    def listings(self) -> Sequence[Listing]:
        """All that the directory lists; none without one. Raises DirectoryError when it is lost."""
        return () if self._directory is None else self._directory.listings()

    def close(self) -> None:
        """Withdraw the listing. Raises DirectoryError when the directory is lost."""
        if self._announcer is not None and self._directory is not None:
            self._announcer.close()
            self._directory.close()


def each_port(address: str) -> list[str]:
    """ "host:7000-7002" as one address for each port; any other address alone."""
    host, _, ports = address.rpartition(":")
    first, _, last = ports.partition("-")
    if not last:
        return [address]
    return [f"{host}:{port}" for port in range(int(first), int(last) + 1)]


def first_free(starts: Sequence[Callable[[], Server]]) -> Server:
    """The first server that could listen. Raises the last one's StoreError when none could."""
    for start in starts[:-1]:
        with contextlib.suppress(StoreError):  # its port is taken; there are more
            return start()
    return starts[-1]()
