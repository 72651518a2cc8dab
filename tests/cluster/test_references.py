"""Goal: a folder of references stays under its limit, keeps what was used last, and a name changes
with all that the content depends on.

Method: small references with set times; limits of a few kilobytes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cluster.references import References, reference_key
from gpu_worker.reference import TOP_1, reference_bytes

SHAPE = (2, 5, 100)
SIZE = reference_bytes(*SHAPE) + 300  # the headers of the two files


def make(references: References, key: str) -> None:
    writer = references.writer(key, SHAPE)
    for window in range(SHAPE[0]):
        writer.see(window, torch.zeros(SHAPE[1:]).log_softmax(dim=1))
    writer.finish()


def test_the_least_recently_used_goes_when_there_is_no_room(tmp_path: Path) -> None:
    references = References(tmp_path, max_bytes=2 * SIZE + 100)
    for age, key in enumerate(("old", "new")):
        make(references, key)
        os.utime(tmp_path / key / TOP_1, (1000 + age, 1000 + age))
    assert references.find("old") is not None, "now the most recently used"
    make(references, "third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "third"]
    assert references.find("new") is None


def test_a_reference_that_goes_stays_readable_to_who_has_it(tmp_path: Path) -> None:
    references = References(tmp_path, max_bytes=SIZE + 100)
    make(references, "first")
    held = references.find("first")
    assert held is not None
    make(references, "second")
    assert references.find("first") is None
    assert held.log_probs(1).shape == SHAPE[1:]


def test_what_is_too_large_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"9 windows of 5 tokens .* use fewer windows"):
        References(tmp_path, max_bytes=1000).writer("key", (9, 5, 100))
    with pytest.raises(ValueError, match="another cache folder"):
        References(tmp_path, max_bytes=1 << 60).writer("key", (10**9, 1000, 100_000))
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_left_half_done_goes_after_a_day(tmp_path: Path) -> None:
    references = References(tmp_path)
    for name, age_s in (("dead.1.part", 2 * 86400), ("alive.2.part", 60)):
        (tmp_path / name).mkdir()
        status = (tmp_path / name).stat()
        os.utime(tmp_path / name, (status.st_atime, status.st_mtime - age_s))
    make(references, "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alive.2.part", "key"]


def test_the_name_depends_on_store_windows_and_dtype() -> None:
    windows = torch.arange(12).reshape(2, 6)
    names = {
        reference_key("v1", windows, torch.float32),
        reference_key("v2", windows, torch.float32),
        reference_key("v1", windows, torch.bfloat16),
        reference_key("v1", windows + 1, torch.float32),
        reference_key("v1", windows.reshape(3, 4), torch.float32),
    }
    assert len(names) == 5
    assert reference_key("v1", windows.int(), torch.float32) in names
