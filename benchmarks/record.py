"""Where a benchmark's results go, and what must stand beside a figure: hardware, commit, date."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def processor() -> str:
    """The processor's model name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the platform's own word has to do
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The short commit of this checkout, with "+" when tracked files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        told = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        return told.stdout.strip() if told.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")
    return (head or "unknown") + ("+" if changed else "")


def today() -> str:
    return datetime.date.today().isoformat()


def provenance() -> str:
    """One line for the head of a report."""
    return f"{today()}, {processor()}, Python {platform.python_version()}, commit {commit()}."


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclass rows as CSV with a header. Raises ValueError when there are none.

    Hardware, commit and date stand in every row; rows that have none of their own get them here.
    """
    if not rows:
        raise ValueError(f"{path}: no rows to write")
    names = [field.name for field in dataclasses.fields(rows[0])]
    made = {"hardware": processor(), "commit": commit(), "date": today()}
    more = {name: value for name, value in made.items() if name not in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *more], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) | more for row in rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
