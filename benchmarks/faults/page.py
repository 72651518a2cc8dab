"""The fault report: a row for each fault, its targets beside it, and where they are missed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.faults.catalogue import THROUGHPUT_LOSS
from benchmarks.faults.run import CLIENTS, Result
from benchmarks.record import RESULTS, commit, processor, table, today

CSV, PAGE = RESULTS / "faults.csv", RESULTS / "faults.md"

HEAD = """\
# What clients see when parts fail

Written by `python -m benchmarks.faults`. Real Ray, Serve and Redis, every host a set of namespaces
of its own (network, processes, mounts, IPC) on one bridge at 1 Gbit/s; deployed by Serve's REST API
as `deploy/` does: a head without workloads, two memory nodes (each a store actor and a near-data
worker on its own copy of mixtral-mini's store), two GPU nodes (each a GPU worker and an ingress),
Redis beside them for the GCS and the directory. What ends is started again after 2 s, as by a
kubelet. GPU workers run on the CPU and keep no expert, so that every step needs the memory tier.
Load: {clients} independent clients, each with one request after another over both proxies (70 %
streamed, 32 tokens each), who try nothing twice once it was sent.

Requests are all that were under way from the fault until some seconds after everything stood again.
*Could be answered*: failed although another part could have answered; not counted are streams that
had sent a token by a GPU worker that died, and what was in flight at an ingress that died.
*Changed*: undegraded answers that differ from the fault-free ones (temperature 0).
*Wait*: the longest that any stream waited for a token, its first one too, before the fault and
since. *Full quality*: seconds from the fault until all parts stand and no request fails or is
degraded, with the time that the fault was kept up.
All hosts share {hardware} with whatever else ran there: rates and waits are worth their ratio to
those before the fault and in the row "nothing", which shows the noise of the measure itself. The
head and the memory nodes go before the others (niceness), as they would have cores of their own: a
head that starts slows all the rest for some seconds.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One fault of the report, as kept in the CSV file."""

    key: str
    fault: str
    sent: int
    failed: int
    failed_with_alternative: int
    degraded: int
    changed: int
    wait_before_s: float
    wait_s: float
    wait_target_s: float | None
    full_quality_s: float | None
    tokens_per_s_before: float
    tokens_per_s_during: float
    tokens_per_s_after: float
    missed: str
    errors: str
    hardware: str
    commit: str
    date: str


def row(result: Result) -> Row:
    figures, fault = result.figures, result.fault
    counted: dict[str, Any] = {
        name: round(value, 2) if isinstance(value, float) else value
        for name, value in asdict(figures).items()
    }
    return Row(
        key=fault.key,
        fault=fault.name,
        wait_target_s=fault.wait_target_s,
        missed="; ".join(missed(result)),
        hardware=processor(),
        commit=commit(),
        date=today(),
        **counted,
    )


def missed(result: Result) -> list[str]:
    """The targets that were not reached, each with what was measured."""
    figures, fault, found = result.figures, result.fault, []
    if figures.failed_with_alternative:
        found.append(f"{figures.failed_with_alternative} failed that could be answered")
    if figures.changed:
        found.append(f"{figures.changed} answers changed")
    if fault.wait_target_s is not None and figures.wait_s >= fault.wait_target_s:
        found.append(f"waited {figures.wait_s:.2f} s, target below {fault.wait_target_s:g} s")
    if figures.full_quality_s is None:
        found.append("not whole again")
    before, after = figures.tokens_per_s_before, figures.tokens_per_s_after
    if fault.keeps_throughput and after < (1 - THROUGHPUT_LOSS) * before:
        found.append(f"tokens/s {after / before - 1:+.1%}, target above -{THROUGHPUT_LOSS:.0%}")
    return found


def read(path: Path = CSV) -> dict[str, Row]:
    """The rows kept, by key; none when there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {each["key"]: _row(each) for each in csv.DictReader(file)}


def write(rows: Mapping[str, Row], order: Sequence[str]) -> str:
    """Keep the rows and write the page; its text."""
    ordered = [rows[key] for key in order if key in rows]
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(each) for each in ordered)
    text = page(ordered)
    PAGE.write_text(text)
    return text


def page(rows: Sequence[Row]) -> str:
    head = (
        *("fault", "requests", "failed", "could be answered", "degraded", "changed"),
        *("wait before, s", "wait, s", "target, s", "full quality, s"),
        *("tokens/s before", "during", "after", "missed targets", "commit, date"),
    )
    body = [
        (
            each.fault,
            *(str(n) for n in (each.sent, each.failed, each.failed_with_alternative)),
            *(str(n) for n in (each.degraded, each.changed)),
            *(f"{s:.2f}" for s in (each.wait_before_s, each.wait_s)),
            "-" if each.wait_target_s is None else f"< {each.wait_target_s:g}",
            "never" if each.full_quality_s is None else f"{each.full_quality_s:.1f}",
            f"{each.tokens_per_s_before:.1f}",
            f"{each.tokens_per_s_during:.1f}",
            f"{each.tokens_per_s_after:.1f}",
            each.missed or "none",
            f"{each.commit}, {each.date}",
        )
        for each in rows
    ]
    hardware = rows[0].hardware if rows else processor()
    text = HEAD.format(clients=CLIENTS, hardware=hardware) + "\n" + table(head, body) + "\n"
    if failures := [each for each in rows if each.errors]:
        text += "\nHow requests failed:\n\n"
        text += "".join(f"- {each.fault}: {each.errors}.\n" for each in failures)
    return text


def _row(kept: Mapping[str, str]) -> Row:
    def number(name: str) -> float | None:
        return float(kept[name]) if kept[name] else None

    kinds = {f.name: str(f.type) for f in fields(Row)}
    values = {
        name: int(kept[name]) if kind == "int" else number(name) if "float" in kind else kept[name]
        for name, kind in kinds.items()
    }
    return Row(**values)  # type: ignore[arg-type] # by the fields' own types
