"""What this machine can do at most on one thread: read memory, multiply and add small integers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("roofline.c")
BALLAST_BYTES = 256 << 20
READ_BYTES = 4 << 20
"""One read: near a low-bit expert's size, so that interruptions fall on both alike."""
READS = 4
AHEAD_BYTES = 8192  # the last read's prefetches stay inside the ballast
ROUNDS = 20000


class Roofline:
    """Measures a single read or a run of products at each call; each read is of other memory.

    Raises SystemExit without a C compiler: shares of the roofline are half of the report.
    """

    def __init__(self) -> None:
        self._functions = _compiled()
        self._ballast = torch.ones(BALLAST_BYTES + AHEAD_BYTES, dtype=torch.uint8)
        self._at = 0

    def read_bandwidth(self) -> float:
        """Bytes per second of a read out of memory: the best of some in a row.

        After seconds of other work the first ones also wait for page tables and clock rate.
        """
        return max(self._read() for _ in range(READS))

    def _read(self) -> float:
        pointer = self._ballast.data_ptr() + self._at
        self._at = (self._at + READ_BYTES) % BALLAST_BYTES
        started = time.perf_counter()
        self._functions.read_all(pointer, READ_BYTES)
        return READ_BYTES / (time.perf_counter() - started)

    def dot_peak(self) -> float:
        """u8 x s8 multiply-adds per second, out of registers."""
        started = time.perf_counter()
        self._functions.dot_products(ROUNDS)
        return self._functions.num_products(ROUNDS) / (time.perf_counter() - started)


def _compiled() -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("cpu_kernels: no C compiler; install one (Debian: apt-get install gcc)")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roofline.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o"]
        subprocess.run([*command, str(library)], check=True)
        functions = ctypes.CDLL(str(library))  # stays mapped when the file is gone
    functions.read_all.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    functions.dot_products.argtypes = functions.num_products.argtypes = (ctypes.c_int64,)
    functions.num_products.restype = ctypes.c_int64
    return functions
