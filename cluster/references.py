"""The original's next-token distributions, kept in the cache folder for all who are compared.

Found again by what they depend on; the least recently used go when the folder is full. How one is
made and read is `gpu_worker/reference.py`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from pathlib import Path

import torch

from gpu_worker.reference import TOP_1, Reference, ReferenceWriter, reference_bytes

logger = logging.getLogger(__name__)

MAX_BYTES = 16 << 30
"""Of all references together: 170,000 tokens of a vocabulary of 49,152 words."""

ABANDONED_AFTER_S = 24 * 3600.0
"""What another process began to write and has not finished by then is removed."""


def reference_key(version: str, windows_WT: torch.Tensor, dtype: torch.dtype) -> str:
    """A name for the distributions of one store version on these windows, run in `dtype`."""
    digest = hashlib.sha256(f"1 {version} {list(windows_WT.shape)} {dtype} ".encode())
    digest.update(windows_WT.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:24]


class References:
    """A folder of references under a limit of bytes; it need not be there."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def find(self, key: str) -> Reference | None:
        """The reference of that name, most recently used from now on; None when it is not there."""
        path = self._folder / key
        try:
            os.utime(path / TOP_1)
            return Reference(path)
        except FileNotFoundError:
            return None

    def writer(self, key: str, shape: tuple[int, int, int]) -> ReferenceWriter:
        """Begin to make one of [W, T, V], after making room for it.

        Raises ValueError when it is larger than the limit, or the disk has no room.
        """
        needed = reference_bytes(*shape)
        described = (
            f"windows: the original's distributions over {shape[0]} windows of {shape[1]} tokens "
            f"take {needed / 1e9:.1f} GB at a vocabulary of {shape[2]}"
        )
        if needed > self._max_bytes:
            raise ValueError(
                f"{described}, more than the {self._max_bytes / 1e9:.1f} GB kept; use fewer windows"
            )
        self._make_room(needed)
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise ValueError(
                f"{described}, but {self._folder} has {free / 1e9:.1f} GB free; use fewer windows, "
                "or another cache folder (MOETIER_CACHE)"
            )
        return ReferenceWriter(self._folder / key, shape)

    def _make_room(self, needed: int) -> None:
        """Remove the least recently used. What a process has mapped stays readable to it."""
        for part in self._folder.glob("*.part"):
            if part.stat().st_mtime < time.time() - ABANDONED_AFTER_S:
                shutil.rmtree(part, ignore_errors=True)
        kept = sorted(self._folder.glob(f"*/{TOP_1}"), key=lambda file: file.stat().st_mtime_ns)
        sizes = {file.parent: _folder_bytes(file.parent) for file in kept}
        total = sum(sizes.values())
        for folder, size in sizes.items():
            if total + needed <= self._max_bytes:
                return
            logger.info("removing the reference %s to make room", folder.name)
            shutil.rmtree(folder)
            total -= size


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
