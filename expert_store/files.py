"""Writing files so that they are there whole or not at all; and safetensors files as byte ranges.

Reads with plain positioned reads, not mappings, so that a reader's memory is what it asked for.
Knows no expert: names, types, shapes and bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import operator
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from expert_store.errors import StoreFormatError, StoreWriteError

MAX_HEADER_BYTES = 100 << 20  # the safetensors library's own limit
HEADER_ALIGNMENT = 64
Chunk = bytes | memoryview
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Disk:
    """The writes of this room. A test passes one whose `open` fails at the n-th write."""

    def open(self, path: Path) -> IO[bytes]:
        return open(path, "wb")

    def free_bytes(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free

    def write_atomic(self, path: Path, num_bytes: int, chunks: Iterable[Chunk]) -> str:
        """Write `num_bytes` in chunks to a temporary name, fsync, rename. Returns the sha256.

        Raises StoreWriteError when the disk is full or the path cannot be written; then neither the
        file nor the temporary one is left.
        """
        temporary = path.with_name(path.name + ".writing")
        digest, written = hashlib.sha256(), 0
        try:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with self.open(temporary) as file:
                    for chunk in chunks:
                        file.write(chunk)
                        digest.update(chunk)
                        written += len(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                _sync_folder(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise self.write_error(path, error, num_bytes) from error
        assert written == num_bytes, f"{path}: wrote {written} bytes, announced {num_bytes}"
        return digest.hexdigest()

    def sync_folders(self, folders: Iterable[Path]) -> None:
        """Make renames in these folders durable; folders that are not there are left out."""
        for folder in folders:
            if folder.is_dir():
                _sync_folder(folder)

    def write_error(self, path: Path, error: OSError, num_bytes: int) -> StoreWriteError:
        """A StoreWriteError that says what, where, how much is free and what to do."""
        folder = path.parent
        if error.errno in _NO_SPACE:
            free = self.free_bytes(folder) if folder.is_dir() else 0
            return StoreWriteError(
                f"{folder}: the disk is full: {path.name} needs {num_bytes} bytes, {free} are "
                "free; free some space and run the same command again: it goes on where it stopped"
            )
        return StoreWriteError(f"{path}: cannot be written: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; `start` counts from the start of the file."""

    name: str
    dtype: str  # safetensors' name: "BF16", "U8", ...
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, list[TensorEntry]]:
    """Header bytes and entries of a file with these (name, dtype, shape, num_bytes), in order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape, num_bytes in tensors:
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [at, at + num_bytes],
        }
        at += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
    start = 8 + len(text)
    entries = []
    for name, dtype, shape, num_bytes in tensors:
        entries.append(TensorEntry(name, dtype, shape, start, num_bytes))
        start += num_bytes
    return len(text).to_bytes(8, "little") + text, entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name.

    Raises StoreFormatError when it is no safetensors file, or shorter than its header says.
    """
    problem = f"{path}: not a whole safetensors file: "
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise StoreFormatError(
                    f"{problem}a header of {length} bytes in {file_bytes} bytes; copy it again"
                )
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise StoreFormatError(f"{problem}{error}; copy it again") from error
    if not isinstance(header, dict):
        raise StoreFormatError(f"{problem}the header is no JSON object; copy it again")
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = map(operator.index, value["data_offsets"])
            shape = tuple(map(operator.index, value["shape"]))
            if min(shape, default=0) < 0:
                raise ValueError("a negative size")
            entry = TensorEntry(name, str(value["dtype"]), shape, 8 + length + begin, end - begin)
        except (TypeError, KeyError, ValueError) as error:
            raise StoreFormatError(f"{problem}tensor {name!r} has a malformed entry") from error
        fits = 0 <= begin <= end and 8 + length + end <= file_bytes
        if entry.dtype in _DTYPES:
            fits = fits and math.prod(shape) * _DTYPES[entry.dtype].itemsize == entry.num_bytes
        if not fits:
            raise StoreFormatError(
                f"{problem}tensor {name!r} reaches past the file's {file_bytes} bytes or does not "
                "match its shape; copy it again"
            )
        entries[name] = entry
    return entries


def read_bytes(path: Path, start: int, num_bytes: int) -> torch.Tensor:
    """A byte range as a flat uint8 tensor. Raises StoreFormatError when the file ends before."""
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    view, done = memoryview(buffer.numpy()), 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while done < num_bytes and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise StoreFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    if done < num_bytes:
        raise StoreFormatError(
            f"{path}: expected {num_bytes} bytes at {start}, the file ends after {done}"
        )
    return buffer


def read_tensor(path: Path, entry: TensorEntry, row: int | None = None) -> torch.Tensor:
    """One tensor, or one row of its first dimension, as a CPU tensor of its stored type."""
    if entry.dtype not in _DTYPES:
        raise StoreFormatError(
            f"{path}: tensor {entry.name!r} has type {entry.dtype}, expected one of {list(_DTYPES)}"
        )
    shape, start, num_bytes = entry.shape, entry.start, entry.num_bytes
    if row is not None:
        num_bytes //= shape[0]
        shape, start = shape[1:], start + row * num_bytes
    data = read_bytes(path, start, num_bytes)
    return data.view(_DTYPES[entry.dtype]).view(shape)
