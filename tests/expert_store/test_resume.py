"""Goal: whatever stops a compress, the target is never half a store, and the next run finishes it.

Method: the n-th open, write or rename fails, for every n until the run passes; then a run that
nothing disturbs must give the bytes of one that was never stopped.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from expert_store import staging
from expert_store.compress import Progress, compress
from expert_store.config import CompressionConfig
from expert_store.errors import StoreError, StoreFormatError, StoreWriteError
from expert_store.files import Disk
from expert_store.format import is_store, load_manifest
from expert_store.verify import verify
from tests.tiny_checkpoints import write_tiny_checkpoint

CONFIG = CompressionConfig(recipe="paper", avg_rank=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_checkpoint("mixtral", folder, layers=1, hidden=128, ffn=128, experts=3)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    compress(model, folder, CONFIG)
    return tree(folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class FailingDisk(Disk):
    """The n-th operation (opens and writes counted together) finds the disk full, half written."""

    def __init__(self, fail_at: int) -> None:
        self.fail_at, self.count = fail_at, 0
        self.lock = threading.Lock()

    def step(self) -> bool:
        with self.lock:
            self.count += 1
            return self.count == self.fail_at

    def open(self, path: Path) -> IO[bytes]:
        if self.step():
            raise OSError(errno.ENOSPC, "No space left on device")
        return _FailingFile(super().open(path), self)  # type: ignore[return-value]


class _FailingFile:
    def __init__(self, file: IO[bytes], disk: FailingDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> int:
        if self.disk.step():
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __enter__(self) -> _FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def fails(run: Callable[[], Any], store: Path) -> bool:
    """Whether the disk was full; then the message names the folder, bytes needed and free."""
    try:
        run()
    except StoreWriteError as error:
        message = str(error)
    else:
        return False
    found = re.match(r"(.*): the disk is full: .* needs (\d+) bytes, (\d+) are free; ", message)
    assert found is not None, message
    assert Path(found.group(1)).is_relative_to(store)
    return True


def test_every_failing_write(model: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for fail_at in range(1, 1000):
        store, disk = tmp_path / str(fail_at), FailingDisk(fail_at)
        if not fails(lambda: compress(model, store, CONFIG, disk=disk, jobs=1), store):  # noqa: B023
            assert disk.count < fail_at  # nothing was left to fail
            break
        assert not is_store(store)
        with pytest.raises(StoreFormatError):
            load_manifest(store)
        assert not list(store.rglob("*.writing"))
        if fail_at % 4 == 0:  # the next run costs as much as all else here
            compress(model, store, CONFIG)
            assert tree(store) == undisturbed, f"write {fail_at} failed"
    assert fail_at > 30


def test_a_run_stopped_at_each_write_in_turn_still_ends(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    # Every run gets fourteen operations further (the dense file alone takes thirteen).
    store = tmp_path / "store"
    runs = 0
    while runs < 100:
        if not fails(lambda: compress(model, store, CONFIG, disk=FailingDisk(15), jobs=1), store):
            break
        assert not is_store(store)
        runs += 1
    assert 2 < runs < 100
    assert tree(store) == undisturbed


@pytest.mark.parametrize(
    ("fail_at", "force"), [(n, False) for n in range(1, 9)] + [(1, True), (4, True), (7, True)]
)
def test_every_failing_move_of_publish(
    fail_at: int,
    force: bool,
    model: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "store"
    if force:
        compress(model, store, CompressionConfig(recipe="original"))
    moves = 0
    real = os.replace

    def failing(source: Path, target: Path) -> None:
        nonlocal moves
        moves += not str(source).endswith(".writing")
        if moves == fail_at:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(staging.os, "replace", failing)
    if fail_at <= len(undisturbed):
        with pytest.raises(StoreWriteError, match="cannot be written: Input/output error"):
            compress(model, store, CONFIG, force=force)
        assert not is_store(store)
    monkeypatch.setattr(staging.os, "replace", real)
    compress(model, store, CONFIG, force=force)
    assert tree(store) == undisturbed


def test_interrupted_by_the_user(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"

    def interrupt(progress: Progress) -> None:
        if progress.stage == "compress" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, store, CONFIG, progress=interrupt, jobs=1)
    assert not is_store(store)
    done = {path.stem for path in store.rglob("experts/*.json")}
    assert len(done) >= 2
    before = {path: path.stat().st_mtime_ns for path in store.rglob("experts/*.json")}
    again: list[Progress] = []

    def watch(progress: Progress) -> None:
        again.append(progress)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    compress(model, store, CONFIG, progress=watch)
    assert {progress.stage for progress in again} == {"compress"}  # the scan was kept, too
    assert tree(store) == undisturbed


KILLED = """
import sys
from pathlib import Path
from expert_store.compress import compress
from tests.expert_store.test_resume import CONFIG

def report(progress):
    print(progress.stage, progress.done, flush=True)

compress(Path(sys.argv[1]), Path(sys.argv[2]), CONFIG, progress=report, jobs=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", ["scan 2", "compress 1", "compress 3"])
def test_killed(after: str, model: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "store"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(model), str(store)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == after:
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    assert not is_store(store)
    compress(model, store, CONFIG)
    assert tree(store) == undisturbed


def test_a_changed_recipe_does_not_mix(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"

    def interrupt(progress: Progress) -> None:
        if progress.stage == "compress" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, store, CONFIG, progress=interrupt, jobs=1)
    other = CompressionConfig(recipe="paper", bits=4, avg_rank=8)
    compress(model, store, other)
    compress(model, tmp_path / "fresh", other)
    assert tree(store) == tree(tmp_path / "fresh")


def test_a_changed_checkpoint_does_not_mix(tmp_path: Path) -> None:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model", hidden=128, ffn=128)
    store = tmp_path / "store"
    with pytest.raises(StoreWriteError):
        compress(model, store, CONFIG, disk=FailingDisk(20), jobs=1)
    write_tiny_checkpoint("mixtral", model, hidden=128, ffn=128, seed=1)
    compress(model, store, CONFIG)
    compress(model, tmp_path / "fresh", CONFIG)
    assert tree(store) == tree(tmp_path / "fresh")


def test_an_interrupted_force_keeps_the_old_store(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    old = compress(model, store, CompressionConfig(recipe="original"))
    with pytest.raises(StoreWriteError):
        compress(model, store, CONFIG, disk=FailingDisk(20), force=True, jobs=1)
    assert load_manifest(store) == old
    assert verify(store).damage == ()
    new = compress(model, store, CONFIG, force=True)
    assert new.version != old.version
    assert verify(store).damage == ()


def test_a_staged_record_that_the_disk_changed(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"

    def spoil(progress: Progress) -> None:
        if progress.stage == "compress" and progress.done == 1:
            (record,) = store.glob(".partial/*/experts/00000-00000.safetensors")
            data = bytearray(record.read_bytes())
            data[-1] ^= 1
            record.write_bytes(data)

    with pytest.raises(StoreError, match="staged .* of layer 0 expert 0: expected sha256.*delete"):
        compress(model, store, CONFIG, progress=spoil, jobs=1)
    assert not is_store(store)


def test_two_runs_at_once(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / ".partial").mkdir(parents=True)
    with open(store / ".partial" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(StoreWriteError, match="another moetier compress is writing here"):
            compress(model, store, CONFIG)
    compress(model, store, CONFIG)
    assert is_store(store)


def test_a_folder_that_cannot_be_written(model: Path) -> None:
    with pytest.raises(StoreWriteError, match=r"/proc/store/\.partial: cannot be written"):
        compress(model, Path("/proc/store"), CONFIG, disk=_BoundlessDisk())


class _BoundlessDisk(Disk):
    def free_bytes(self, folder: Path) -> int:
        return 1 << 50


def test_the_staging_folder_is_valid_json_and_hidden(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(StoreWriteError):
        compress(model, store, CONFIG, disk=FailingDisk(25), jobs=1)
    assert [path.name for path in store.iterdir()] == [".partial"]
    for path in store.rglob("*.json"):
        json.loads(path.read_text())
