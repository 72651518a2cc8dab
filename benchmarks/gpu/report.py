"""The report of a run: report.md for people, rows.csv and report.json for programs.

A red gate prints no numbers: a row is shown only when each group it names has checks, all passed,
in steps that ended by themselves.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.recorder import Check, Note, Row
from benchmarks.gpu.runner import Result
from benchmarks.gpu.targets import target_lines

SHOWN_CHECKS = 12
"""Passed checks listed per group; the others are in report.json. Failed ones are all listed."""


@dataclass(frozen=True, slots=True)
class Run:
    """One whole run and what it ran on."""

    results: Sequence[Result]
    hardware: str
    commit: str
    date: str
    tiny: bool

    @property
    def is_green(self) -> bool:
        return all(result.status == "green" for result in self.results)

    @property
    def green_groups(self) -> set[str]:
        """Groups of which every check passed and every step that has one ended by itself."""
        good: dict[str, bool] = defaultdict(lambda: True)
        for result in self.results:
            for check in _of(result, Check):
                good[check.group] &= check.passed and not result.failure
        return {group for group, is_good in good.items() if is_good}

    def shows(self, row: Row) -> bool:
        return set(row.gates) <= self.green_groups


def write(run: Run, folder: Path) -> list[Path]:
    """Write the three files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("report.md", "rows.csv", "report.json")]
    paths[0].write_text(render(run))
    _write_csv(run, paths[1])
    paths[2].write_text(json.dumps(_as_json(run), indent=1) + "\n")
    return paths


def render(run: Run) -> str:
    """The report as Markdown."""
    kind = " (tiny: interpreter on a CPU, nothing was measured)" if run.tiny else ""
    lines = [
        f"# GPU check{kind}",
        "",
        f"{run.hardware}, commit {run.commit}, {run.date}. "
        f"**{'All green' if run.is_green else 'RED'}.**",
        "",
        "| step | status | seconds | checks passed |",
        "| --- | --- | ---: | ---: |",
    ]
    for result in run.results:
        checks = _of(result, Check)
        passed = sum(check.passed for check in checks)
        lines.append(
            f"| {result.step.title} | {result.status} | {result.seconds:.1f} | "
            f"{passed} of {len(checks)} |"
        )
    shown = [row for result in run.results for row in _of(result, Row) if run.shows(row)]
    lines += ["", "## Targets", "", *target_lines(shown, on_gpu=not run.tiny)]
    for result in run.results:
        lines += ["", f"## {result.step.title}", ""]
        if result.failure:
            lines += [f"Failed:\n\n```\n{result.failure}\n```", ""]
        lines += [f"{note.text}\n" for note in _of(result, Note)]
        lines += _check_lines(_of(result, Check))
        lines += _row_lines(run, _of(result, Row))
    return "\n".join(lines).rstrip() + "\n"


def _check_lines(checks: Sequence[Check]) -> list[str]:
    if not checks:
        return []
    groups: dict[str, list[Check]] = defaultdict(list)
    for check in checks:
        groups[check.group].append(check)
    lines = ["| group | check | error | limit | |", "| --- | --- | ---: | ---: | --- |"]
    for group, members in groups.items():
        failed = [check for check in members if not check.passed]
        # The largest errors say the most.
        passed = sorted(
            (check for check in members if check.passed), key=lambda c: -(c.error or 0.0)
        )
        for check in failed + passed[:SHOWN_CHECKS]:
            verdict = "ok" if check.passed else f"**FAILED** {check.detail}"
            lines.append(
                f"| {group} | {check.name} | {_number(check.error)} | {_number(check.limit)} | "
                f"{verdict} |"
            )
        if hidden := len(passed) - SHOWN_CHECKS:
            lines += [f"| {group} | {hidden} more with smaller errors | | | ok |"] * (hidden > 0)
    return [*lines, ""]


def _row_lines(run: Run, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| what | shape | tokens | p20 | p50 | p80 | unit | rate | share | note |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | --- | --- |",
    ]
    withheld: dict[str, int] = defaultdict(int)
    for row in rows:
        if not run.shows(row):
            withheld[", ".join(sorted(set(row.gates) - run.green_groups))] += 1
            continue
        rate = f"{_number(row.rate)} {row.rate_unit}" if row.rate is not None else ""
        share = f"{row.share:.0%} of {row.share_of}" if row.share is not None else ""
        lines.append(
            f"| {row.what} | {row.shape} | {row.tokens} | {_number(row.p20)} | {_number(row.p50)} "
            f"| {_number(row.p80)} | {row.unit} | {rate} | {share} | {row.note} |"
        )
    told = [f"{count} rows withheld: not green: {gates}.\n" for gates, count in withheld.items()]
    return [*(lines if len(lines) > 2 else []), "", *told]


def _write_csv(run: Run, path: Path) -> None:
    shown = [row for result in run.results for row in _of(result, Row) if run.shows(row)]
    extra = {"hardware": run.hardware, "commit": run.commit, "date": run.date}
    with path.open("w", newline="") as file:
        names = [*Row.__dataclass_fields__, *extra]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in shown:
            writer.writerow({**asdict(row), "gates": "; ".join(row.gates), **extra})


def _as_json(run: Run) -> dict[str, object]:
    return {
        "green": run.is_green,
        "tiny": run.tiny,
        "hardware": run.hardware,
        "commit": run.commit,
        "date": run.date,
        "steps": [
            {
                "name": result.step.name,
                "status": result.status,
                "seconds": round(result.seconds, 1),
                "failure": result.failure,
                "notes": [note.text for note in _of(result, Note)],
                "checks": [asdict(check) for check in _of(result, Check)],
                "rows": [asdict(row) for row in _of(result, Row) if run.shows(row)],
            }
            for result in run.results
        ],
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _of(result: Result, kind: type) -> list:
    return [finding for finding in result.findings if isinstance(finding, kind)]
