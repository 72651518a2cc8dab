"""Every checksum of a store, checked: which file, layer and expert is damaged, and how.

Reads each record, dense file and side file once, a record at a time.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from expert_store.errors import CorruptRecordError, StoreFormatError
from expert_store.expert_json import record_name
from expert_store.files import TensorEntry, read_bytes, read_header
from expert_store.format import load_manifest
from expert_store.staging import file_sha256
from expert_store.types import ExpertKey, Manifest, RecordInfo, RecordKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not as the manifest says. `key` is None for a file that is no record."""

    file: str  # relative to the store
    key: ExpertKey | None
    expected: str
    found: str

    def __str__(self) -> str:
        where = self.file if self.key is None else f"{self.file}, {self.key}"
        return f"{where}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. `damage` is empty when the store is whole."""

    store: Path
    version: str
    num_records: int
    num_files: int
    num_bytes: int
    damage: tuple[Damage, ...]


def verify(store: Path, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Check every record, dense file and side file; `progress` gets (bytes done, bytes in all).

    Raises StoreFormatError when the manifest itself is missing, damaged or of a newer version.
    """
    store = Path(store)
    manifest = load_manifest(store)
    report = progress or (lambda done, total: None)
    records = list(_records(manifest))
    files = whole_files(manifest)
    file_bytes = {
        name: (store / name).stat().st_size if (store / name).is_file() else 0 for name in files
    }
    total = sum(record.num_bytes for _, _, record in records) + sum(file_bytes.values())
    # A record's checksum is looked up when it turns up in another's place.
    owners = {record.sha256: (kind, key) for kind, key, record in records}
    damage: list[Damage] = []
    headers = {}
    for file in sorted({record.file for _, _, record in records}):
        headers[file], found = _check_header(store, file)
        damage += found
    done = 0
    for _, key, record in records:
        damage += _check_record(store, key, record, headers[record.file], owners)
        done += record.num_bytes
        report(done, total)
    for name, sha256 in files.items():
        damage += _check_file(store, name, sha256)
        done += file_bytes[name]
        report(done, total)
    return Verification(
        store=store,
        version=manifest.version,
        num_records=len(records),
        num_files=len(headers) + len(files),
        num_bytes=total,
        damage=tuple(damage),
    )


def whole_files(manifest: Manifest) -> dict[str, str]:
    """sha256 by name of the files that have one checksum each: dense and side files, by name."""
    return dict(sorted({**manifest.side_files, **manifest.dense_files}.items()))


def check_files(store: Path, manifest: Manifest) -> None:
    """Check the files that a model is opened from, before it is: dense and side files, no record.

    Costs 0.76 to 0.82 s per GiB, and 1.61 s in one of the runs, against 0.10 to 0.23 s for only
    reading a file that is in memory (one EPYC core with SHA instructions, shared; 2026-11; 1 GiB).
    Raises StoreFormatError for a file that is not there, CorruptRecordError for a changed one.
    """
    started = time.monotonic()
    for name, sha256 in whole_files(manifest).items():
        for damage in _check_file(store, name, sha256):
            error = CorruptRecordError if (store / name).is_file() else StoreFormatError
            raise error(
                f"{store}: {damage}; copy that file again, or compress the model again with --force"
            )
    logger.info("%s: checked dense and side files in %.2f s", store, time.monotonic() - started)


def _records(manifest: Manifest) -> Iterator[tuple[RecordKind, ExpertKey, RecordInfo]]:
    for key, info in sorted(manifest.experts.items()):
        yield "codes", key, info.codes
        if info.factors is not None:
            yield "factors", key, info.factors


def _check_header(store: Path, file: str) -> tuple[dict[str, TensorEntry] | None, list[Damage]]:
    if not (store / file).is_file():
        return None, [Damage(file, None, "a file", "none")]
    try:
        return read_header(store / file), []
    except StoreFormatError as error:
        return None, [Damage(file, None, "a whole safetensors file", str(error))]


def _check_record(
    store: Path,
    key: ExpertKey,
    record: RecordInfo,
    header: dict[str, TensorEntry] | None,
    owners: dict[str, tuple[RecordKind, ExpertKey]],
) -> Iterator[Damage]:
    if not (store / record.file).is_file():
        return  # said once for the file
    if header is not None:
        entry = header.get(record_name(key.expert))
        place = f"tensor {record_name(key.expert)} at {record.offset}, {record.num_bytes} bytes"
        if entry is None:
            yield Damage(record.file, key, place, "no such tensor in the file's header")
        elif (entry.start, entry.num_bytes) != (record.offset, record.num_bytes):
            yield Damage(record.file, key, place, f"{entry.num_bytes} bytes at {entry.start}")
    try:
        data = read_bytes(store / record.file, record.offset, record.num_bytes)
    except StoreFormatError as error:
        yield Damage(record.file, key, f"{record.num_bytes} bytes", f"a truncated file: {error}")
        return
    found = hashlib.sha256(memoryview(data.numpy())).hexdigest()
    if found != record.sha256:
        text = f"sha256 {found}"
        if found in owners:
            kind, other = owners[found]
            text += f", which is the {kind} record of {other}"
        yield Damage(record.file, key, f"sha256 {record.sha256}", text)


def _check_file(store: Path, name: str, sha256: str) -> Iterator[Damage]:
    try:
        found = file_sha256(store / name)
    except OSError as error:
        yield Damage(name, None, f"sha256 {sha256}", error.strerror or str(error))
        return
    if found != sha256:
        yield Damage(name, None, f"sha256 {sha256}", f"sha256 {found}")
