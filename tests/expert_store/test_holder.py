"""Goal: holders' sockets do not pile up, and no living one is ever taken away; a holder says what
it holds and closes all of it.

Method: folders made by hand in a temporary directory: listened on, left behind, new, not ours; a
holder around a real segment with a server and a directory of the test's.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from expert_store.errors import DirectoryError, ExpertUnavailableError
from expert_store.holder import PREFIX, SOCKET, STALE_S, Holder, Presence, SocketFolder
from expert_store.listing import Listing
from expert_store.segment import Segment
from expert_store.types import RecordRequest
from tests.hand_store import build_store
from tests.memory_directory import MemoryDirectory


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_behind(folder: Path, name: str, *, old: bool, listening: bool = False) -> socket.socket:
    (folder / name).mkdir()
    path = folder / name / SOCKET
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    if listening:
        listener.listen()
    if old:
        then = path.stat().st_mtime - 2 * STALE_S
        os.utime(path, (then, then))
    return listener


def test_only_dead_old_sockets_are_swept(folder: Path) -> None:
    held = [
        left_behind(folder, f"{PREFIX}dead", old=True),
        left_behind(folder, f"{PREFIX}new", old=False),
        left_behind(folder, f"{PREFIX}alive", old=True, listening=True),
        left_behind(folder, "other-dead", old=True),
    ]
    held.pop(0).close()
    (folder / f"{PREFIX}empty").mkdir()
    (folder / f"{PREFIX}file").mkdir()
    (folder / f"{PREFIX}file" / SOCKET).write_text("x")
    os.utime(folder / f"{PREFIX}file" / SOCKET, (0, 0))
    sockets = SocketFolder()
    made = Path(sockets.address.removeprefix("unix:")).parent
    assert made.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in folder.iterdir()} == {
        f"{PREFIX}new",
        f"{PREFIX}alive",
        "other-dead",
        f"{PREFIX}empty",
        f"{PREFIX}file",
        made.name,
    }
    sockets.close()
    sockets.close()
    assert not made.exists()
    for listener in held:
        listener.close()


def test_presence_is_announced_and_withdrawn() -> None:
    directory = MemoryDirectory()
    listing = Listing("a", "records", "v", "n", ("127.0.0.1:1",))
    presence = Presence(listing, num_experts=3, num_bytes=5, directory=lambda: directory)
    assert presence.status.pid == os.getpid()
    assert (presence.status.num_experts, presence.status.num_bytes) == (3, 5)
    presence.close()
    assert directory.listings() == ()
    alone = Presence(listing, num_experts=3, num_bytes=5, directory=None)
    assert alone.status.listing == listing
    alone.close()


class Server:
    """Listens nowhere; says where it was told to, and whether it was closed."""

    def __init__(self, addresses: tuple[str, str]) -> None:
        self.addresses = addresses
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class LosableDirectory(MemoryDirectory):
    is_lost = False

    def withdraw(self, name: str) -> None:
        if self.is_lost:
            raise DirectoryError("the directory is gone (test)")
        super().withdraw(name)


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_holder_says_what_it_holds_and_closes_all(folder: Path, is_lost: bool) -> None:
    build_store(folder / "store")
    directory, servers = LosableDirectory(), []

    def serve(addresses: tuple[str, str]) -> Server:
        servers.append(Server(addresses))
        return servers[-1]

    def hold(segment: Segment) -> Holder:
        return Holder(
            segment,
            "records",
            serve,
            tcp_address="10.0.0.1:0",
            name="a",
            node_id="n",
            directory=lambda: directory,
        )

    whole = Segment(folder / "store")
    key = min(whole.keys)
    part = Segment(folder / "store", [key])
    holder, other = hold(part), hold(whole)
    assert other.status.listing.keys is None
    assert other.status.num_experts == len(whole.keys)
    assert other.status.num_bytes == whole.num_bytes
    other.close()
    assert holder.status.listing.keys == frozenset([key])
    unix, tcp = holder.status.listing.addresses
    made = Path(unix.removeprefix("unix:")).parent
    assert (made.is_dir(), tcp) == (True, "10.0.0.1:0")
    directory.is_lost = is_lost
    if is_lost:
        with pytest.raises(DirectoryError):
            holder.close()
    else:
        holder.close()
    assert servers[0].is_closed
    assert not made.exists()
    with pytest.raises(ExpertUnavailableError, match="closed"):
        part.fetch([RecordRequest(key, "codes")])
