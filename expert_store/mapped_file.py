"""A file's own pages as a tensor: shared, read-only, unmapped with the last view."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from expert_store.errors import StoreFormatError


def map_file(path: Path, min_bytes: int) -> torch.Tensor:
    """The file as a flat uint8 tensor over a shared read-only mapping, which lives as long as it.

    Raises StoreFormatError when the file is missing or shorter than `min_bytes`.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < min_bytes or size == 0:
                raise StoreFormatError(
                    f"{path} is truncated: expected at least {min_bytes} bytes, got {size}; "
                    f"run `moetier verify {path.parents[1]}`, then restore the file or compress "
                    "again"
                )
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise StoreFormatError(
            f"{path} cannot be mapped: {error}; the manifest names it, so restore the file or "
            "compress again"
        ) from error
    return readonly_tensor(np.frombuffer(mapping, np.uint8))


def readonly_tensor(array: npt.NDArray[np.uint8]) -> torch.Tensor:
    """A tensor over the array's own memory, which it keeps alive. No copy, no warning.

    torch has no read-only tensors and `from_numpy` warns of that; whoever writes to this one
    writes to memory that the operating system protects.
    """
    return torch.from_dlpack(array)
