"""Goal: every row of a benchmark's CSV says on what, of which commit and when it was measured.

Method: rows with and without such fields of their own, read back.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.record import commit, processor, today, write_rows


@dataclass(frozen=True, slots=True)
class Plain:
    what: str
    p50: float


@dataclass(frozen=True, slots=True)
class Stamped:
    what: str
    hardware: str
    date: str


def test_rows_are_stamped_unless_they_are_already(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [Plain("a", 1.5), Plain("b", 2.0)])
    made = {"hardware": processor(), "commit": commit(), "date": today()}
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"what": "a", "p50": "1.5"} | made,
            {"what": "b", "p50": "2.0"} | made,
        ]
    write_rows(path, [Stamped("c", "a GPU", "2020-02-02")])
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"what": "c", "hardware": "a GPU", "date": "2020-02-02", "commit": commit()}
    with pytest.raises(ValueError, match="no rows to write"):
        write_rows(path, [])
