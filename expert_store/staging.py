"""The unfinished store: a hidden folder inside the target that a later run goes on from.

`STORE/.partial/FINGERPRINT/` holds a pair of files per finished expert, finished layer files and
dense files. The fingerprint covers recipe and source, so a changed recipe never mixes. Knows
paths and bytes, no model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from expert_store.errors import CheckpointError, StoreError, StoreWriteError
from expert_store.files import Chunk, Disk, layout, read_bytes, read_header
from expert_store.format import MANIFEST_FILE, is_store
from expert_store.types import ExpertKey, RecordKind

PARTIAL = ".partial"
COPIED = re.compile(
    r"generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*"
    r"|merges\.txt|.*\.tiktoken|.*\.model|chat_template.*|LICENSE.*|NOTICE.*"
)
"""Names of the files that a store takes over from its checkpoint as they are."""
_FILES = "files.json"
_READ_CHUNK = 8 << 20
_STORE_PATTERNS = ("dense*.safetensors", "codes/layer-*.safetensors", "factors/layer-*.safetensors")


class Staging:
    """Owns one run's staging folder. Made by `staging`; thread-safe for different experts."""

    def __init__(self, store: Path, fingerprint: str, disk: Disk) -> None:
        self.store = store
        self.folder = store / PARTIAL / fingerprint
        self.disk = disk

    def write(self, relative: str, num_bytes: int, chunks: Iterable[Chunk]) -> str:
        """Write one staged file atomically; returns its sha256."""
        return self.disk.write_atomic(self.folder / relative, num_bytes, chunks)

    def write_json(self, relative: str, value: Any) -> None:
        text = json.dumps(value).encode()
        self.write(relative, len(text), [text])

    def read_json(self, relative: str) -> Any | None:
        """A staged JSON value; None when it was not written yet."""
        path = self.folder / relative
        return json.loads(path.read_text()) if path.is_file() else None

    def has(self, relative: str) -> bool:
        return (self.folder / relative).is_file()

    def sha256(self, relative: str) -> str:
        """Checksum of a file that is staged already."""
        return file_sha256(self.folder / relative)

    def put_expert(
        self, key: ExpertKey, records: dict[RecordKind, torch.Tensor], info: dict[str, Any]
    ) -> dict[str, Any]:
        """Stage one expert's records; its info file comes last and says that they are whole."""
        data = {kind: memoryview(record.numpy()) for kind, record in records.items()}
        info = info | {
            f"{kind}_sha256": hashlib.sha256(part).hexdigest() for kind, part in data.items()
        }
        header, entries = layout(
            [(kind, "U8", (len(part),), len(part)) for kind, part in data.items()], {}
        )
        total = len(header) + sum(entry.num_bytes for entry in entries)
        self.write(self._records_name(key), total, [header, *data.values()])
        self.write_json(self._info_name(key), info)
        return info

    def expert_info(self, key: ExpertKey) -> dict[str, Any] | None:
        """What `put_expert` was told about a finished expert; None for an unfinished one."""
        return self.read_json(self._info_name(key))

    def expert_record(self, key: ExpertKey, kind: RecordKind, sha256: str) -> torch.Tensor:
        path = self.folder / self._records_name(key)
        entry = read_header(path)[kind]
        data = read_bytes(path, entry.start, entry.num_bytes)
        found = hashlib.sha256(memoryview(data.numpy())).hexdigest()
        if found != sha256:
            raise StoreError(
                f"{path}: staged {kind} of {key}: expected sha256 {sha256}, got {found}; the disk "
                f"changed it: delete {self.folder} and run the same command again"
            )
        return data

    def drop_records(self, keys: Iterable[ExpertKey]) -> None:
        """Delete staged records that a layer file now holds; their info files stay."""
        for key in keys:
            (self.folder / self._records_name(key)).unlink(missing_ok=True)

    def finish(self, files: list[str], manifest: bytes) -> None:
        """Declare the staged files complete, the manifest last. `publish` may follow."""
        self.write_json(_FILES, sorted(files))
        self.write(MANIFEST_FILE, len(manifest), [manifest])

    @property
    def is_finished(self) -> bool:
        return self.has(MANIFEST_FILE)

    def publish(self) -> None:
        """Move the staged files into the store, the manifest last. Safe to repeat after a crash.

        From the first move until the last the folder has no manifest and is no store.
        """
        files: list[str] = self.read_json(_FILES) or []
        try:
            (self.store / MANIFEST_FILE).unlink(missing_ok=True)
            for path in _of_a_store(self.store):
                if path.relative_to(self.store).as_posix() not in files:
                    path.unlink()
            for relative in files:
                if self.has(relative):
                    (self.store / relative).parent.mkdir(exist_ok=True)
                    os.replace(self.folder / relative, self.store / relative)
                assert (self.store / relative).is_file(), f"{relative} is neither staged nor there"
            self.disk.sync_folders([self.store, self.store / "codes", self.store / "factors"])
            os.replace(self.folder / MANIFEST_FILE, self.store / MANIFEST_FILE)
            self.disk.sync_folders([self.store])
        except OSError as error:
            raise self.disk.write_error(self.store / MANIFEST_FILE, error, 0) from error

    @staticmethod
    def _records_name(key: ExpertKey) -> str:
        return f"experts/{key.layer:05d}-{key.expert:05d}.safetensors"

    @staticmethod
    def _info_name(key: ExpertKey) -> str:
        return f"experts/{key.layer:05d}-{key.expert:05d}.json"


@contextmanager
def staging(store: Path, fingerprint: str, *, force: bool, disk: Disk) -> Iterator[Staging]:
    """Open the staging folder of one run, alone; delete it when the run has published a store, or
    failed by its checkpoint: nothing can go on from there.

    Raises ValueError when the target is a finished store (without `force`) or holds other files,
    StoreWriteError when another compress runs there or the folder cannot be made.
    """
    check_target(store, force=force)
    work, is_new = Staging(store, fingerprint, disk), not store.exists()
    try:
        (store / PARTIAL).mkdir(parents=True, exist_ok=True)
        lock = open(store / PARTIAL / "lock", "wb")  # noqa: SIM115
    except OSError as error:
        raise disk.write_error(store / PARTIAL, error, 0) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreWriteError(
                f"{store}: another moetier compress is writing here; wait for it or stop it"
            ) from error
        for other in (store / PARTIAL).iterdir():
            if other.is_dir() and other != work.folder:
                shutil.rmtree(other)
        try:
            yield work
        except CheckpointError:
            shutil.rmtree(store / PARTIAL)
            if is_new:
                store.rmdir()
            raise
        if is_store(store):
            shutil.rmtree(store / PARTIAL)


def check_target(store: Path, *, force: bool) -> None:
    """ValueError unless `store` is free: new, empty, unfinished, or a store and `force`."""
    if is_store(store):
        if not force:
            raise ValueError(
                f"store: {store} holds a finished store; give another folder, or --force to "
                "replace it"
            )
        return
    if store.exists() and not store.is_dir():
        raise ValueError(f"store: {store} is a file, expected a folder or a new path")
    if store.is_dir() and not (store / PARTIAL).is_dir() and any(store.iterdir()):
        raise ValueError(
            f"store: {store} is neither empty nor a moetier store; give a new or an empty folder"
        )


def _of_a_store(folder: Path) -> list[Path]:
    """What a compress has put into the folder, now or before; a user's own files are not."""
    found = [path for pattern in _STORE_PATTERNS for path in folder.glob(pattern)]
    return found + [p for p in folder.iterdir() if p.is_file() and COPIED.fullmatch(p.name)]


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_READ_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
