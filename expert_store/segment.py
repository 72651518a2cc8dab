"""One node's part of a store, mapped: records as read-only views of the files' own pages.

Owns the mappings and the checksums. Knows no network, no Ray and not what the bytes mean.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from expert_store.errors import CorruptRecordError, ExpertUnavailableError
from expert_store.format import factors_bytes, load_manifest
from expert_store.mapped_file import map_file
from expert_store.types import ExpertKey, Manifest, RecordInfo, RecordKind, RecordRequest

logger = logging.getLogger(__name__)


class Segment:
    """The records of some experts of a store, read through `mmap`; tier "disk". Thread-safe.

    `keys` are the experts this node holds, all of the store's when None. Opening checks that every
    record lies inside its file; a record's sha256 is checked when it is first read, once. Views
    stay valid after `close()`: a file's mapping goes away with its last view.

    A damaged record is quarantined: it is refused, without being read again, until `repair` is
    given its bytes. Those are kept in memory; the file is left to the operator, because other
    processes map it too and its bytes cannot be replaced under them in one step.

    Raises ValueError for a key that the store does not have, StoreFormatError for a store that
    cannot be opened: no manifest, a missing or a truncated file.
    """

    tier = "disk"

    def __init__(self, store: Path | str, keys: Iterable[ExpertKey] | None = None) -> None:
        self._store = Path(store)
        self._manifest = load_manifest(self._store)
        self._keys = frozenset(self._manifest.experts if keys is None else keys)
        unknown = sorted(self._keys - self._manifest.experts.keys())
        if unknown:
            raise ValueError(
                f"keys: {unknown[0]} and {len(unknown) - 1} more are not in {self._store}, which "
                f"has {len(self._manifest.experts)} experts; see `moetier inspect {self._store}`"
            )
        self._files = self._map_files()
        self._checked: set[tuple[ExpertKey, RecordKind]] = set()
        self._damaged: dict[tuple[ExpertKey, RecordKind], str] = {}
        self._repaired: dict[tuple[ExpertKey, RecordKind], torch.Tensor] = {}
        self._watchers: list[Callable[[ExpertKey], None]] = []
        self._lock = threading.Lock()
        self._served_bytes = 0

    @property
    def store(self) -> Path:
        """The folder that this segment is a part of."""
        return self._store

    @property
    def manifest(self) -> Manifest:
        """The whole store's manifest, not only this segment's part."""
        return self._manifest

    @property
    def keys(self) -> frozenset[ExpertKey]:
        """The experts that this segment holds."""
        return self._keys

    @property
    def num_bytes(self) -> int:
        """Bytes of all records of this segment."""
        return sum(record.num_bytes for record in self._records())

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        """The records' bytes in request order, each a flat uint8 view of the mapped file.

        The views are read-only memory: writing to one ends the process. Raises ValueError for a
        request that no store could answer, ExpertUnavailableError for a record that is not here,
        CorruptRecordError for one whose bytes do not match their checksum.
        """
        views = [self._view(request) for request in requests]
        with self._lock:
            self._served_bytes += sum(view.numel() for view in views)
        return views

    @property
    def served_bytes(self) -> int:
        """Bytes of all records that were fetched since the start."""
        with self._lock:
            return self._served_bytes

    @property
    def quarantined(self) -> frozenset[tuple[ExpertKey, RecordKind]]:
        """The records that are damaged here and were not repaired."""
        with self._lock:
            return frozenset(self._damaged)

    @property
    def num_repaired(self) -> int:
        """Records served from repaired bytes."""
        return len(self._repaired)

    @property
    def repaired_bytes(self) -> int:
        """Memory that the repaired records take."""
        with self._lock:
            return sum(data.numel() for data in self._repaired.values())

    def watch(self, tell: Callable[[ExpertKey], None]) -> None:
        """From now on `tell` hears of each expert with a record newly quarantined or repaired.

        It is called from the thread that found out, which may be inside a `fetch` of the watcher's
        own: it must take no lock that is held there.
        """
        self._watchers.append(tell)

    def recheck(self, request: RecordRequest) -> bool:
        """Hash a record anew that may have been sound when it was first read; whether it still is.

        Reads of it go on meanwhile. Raises as `fetch`, but for damage.
        """
        whole = RecordRequest(request.key, request.kind)
        name, record = (request.key, request.kind), locate(self._manifest, whole)
        view = self._mapped(request.key, record)
        if name in self._repaired:
            return True
        found = self._damaged.get(name) or hashlib.sha256(view.numpy()).hexdigest()
        return self._judge(whole, record, found) is None

    def repair(self, request: RecordRequest, data: torch.Tensor) -> None:
        """Serve a quarantined record from these bytes, the whole of it, from now on.

        Raises CorruptRecordError when they are not the record's either.
        """
        name = (request.key, request.kind)
        record = locate(self._manifest, RecordRequest(request.key, request.kind))
        found = hashlib.sha256(data.numpy()).hexdigest()
        if found != record.sha256:
            raise CorruptRecordError(
                f"{request.kind} record of {request.key}: the copy to repair {self._store} with is "
                f"damaged: expected sha256 {record.sha256}, found {found}; try another copy"
            )
        with self._lock:
            self._repaired[name] = data
            self._damaged.pop(name, None)
        self._tell(request.key)
        logger.warning(
            "%s record of %s in %s is served from another copy's bytes; restore the file",
            request.kind,
            request.key,
            self._store,
        )

    def close(self) -> None:
        """Refuse further reads. Views that are still held stay valid."""
        with self._lock:
            self._files = {}

    def _tell(self, key: ExpertKey) -> None:
        for tell in self._watchers:
            tell(key)

    def _records(self) -> Iterable[RecordInfo]:
        for key in self._keys:
            info = self._manifest.experts[key]
            yield info.codes
            if info.factors is not None:
                yield info.factors

    def _map_files(self) -> dict[str, torch.Tensor]:
        ends: dict[str, int] = {}
        for record in self._records():
            ends[record.file] = max(ends.get(record.file, 0), record.offset + record.num_bytes)
        return {file: map_file(self._store / file, end) for file, end in sorted(ends.items())}

    def _view(self, request: RecordRequest) -> torch.Tensor:
        record = locate(self._manifest, request)
        view = self._mapped(request.key, record)
        repaired = self._repaired.get((request.key, request.kind))
        if repaired is not None:
            return repaired[: record.num_bytes]
        self._check(request)
        return view

    def _mapped(self, key: ExpertKey, record: RecordInfo) -> torch.Tensor:
        """A record's part of its file, checked or not."""
        if key not in self._keys:
            raise ExpertUnavailableError(
                f"{key} of {self._store} is not in this segment, which holds "
                f"{len(self._keys)} of {len(self._manifest.experts)} experts; ask another copy"
            )
        with self._lock:
            data = self._files.get(record.file)
        if data is None:
            raise ExpertUnavailableError(
                f"the segment of {self._store} is closed; {key} was asked of it afterwards"
            )
        return data[record.offset : record.offset + record.num_bytes]

    def _check(self, request: RecordRequest) -> None:
        name = (request.key, request.kind)
        if name in self._checked:
            return
        record = locate(self._manifest, RecordRequest(request.key, request.kind))
        # Two threads may both hash a record that neither has seen: wasteful, never wrong.
        found = (
            self._damaged.get(name)
            or hashlib.sha256(self._mapped(request.key, record).numpy()).hexdigest()
        )
        problem = self._judge(request, record, found)
        if problem is not None:
            raise CorruptRecordError(problem)

    def _judge(self, request: RecordRequest, record: RecordInfo, found: str) -> str | None:
        """Note whether a whole record is sound, by the hash found; what is wrong with it."""
        name = (request.key, request.kind)
        with self._lock:
            if found == record.sha256:
                self._checked.add(name)
                return None
            is_new = name not in self._damaged
            self._checked.discard(name)
            self._damaged[name] = found
        message = (
            f"{request.kind} record of {request.key} in {self._store} is damaged: expected sha256 "
            f"{record.sha256}, found {found} over {record.num_bytes} bytes at {record.offset} of "
            f"{record.file}; run `moetier verify {self._store}`, then restore the file or compress "
            "again"
        )
        if is_new:
            logger.error("%s", message)
            self._tell(request.key)
        return message


def locate(manifest: Manifest, request: RecordRequest) -> RecordInfo:
    """Where the bytes asked for lie: the record's info, `num_bytes` cut to the blocks asked for.

    `sha256` stays that of the whole record. Raises ValueError for an expert the store does not
    have, factors where it has none, or a prefix that the record cannot give.
    """
    info = manifest.experts.get(request.key)
    if info is None:
        raise ValueError(
            f"request: {request.key} is not in store version {manifest.version}, which has "
            f"{len(manifest.experts)} experts in layers {sorted(manifest.model.moe_layers)}"
        )
    record = manifest.record(request)
    if record is None:
        raise ValueError(f"request: {request.key} has no factors record; ask only for its codes")
    if request.num_blocks is None:
        return record
    if request.kind == "codes":
        raise ValueError(
            f"request: num_blocks {request.num_blocks} for the codes of {request.key}; only "
            "factors have blocks"
        )
    total = len(info.repair.blocks)
    if not 0 <= request.num_blocks <= total:
        raise ValueError(
            f"request: num_blocks {request.num_blocks} of {request.key}, which has {total} blocks"
        )
    size = factors_bytes(manifest.model.expert, info.repair.prefix(request.num_blocks))
    return replace(record, num_bytes=size)
