"""What a study found, as people read it: a heat map of KL in text, and a line per cell.

Markdown, which is plain enough for a terminal. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.study import StudyRow
from cluster.study_cells import GROUPS, HEATS
from cluster.table import format_table

SHADES = " ░▒▓█"
SHADES_SPAN = 1000.0
"""From the darkest cell to one without a shade: a factor of this."""


def heat_map(rows: Sequence[StudyRow]) -> str:
    """KL from the original in nats: a line per layer group and heat, a column per treatment."""
    by_place = {(r.cell.group, r.cell.heat, str(r.cell.treatment)): r.row.kl or 0.0 for r in rows}
    treatments = list(dict.fromkeys(str(row.cell.treatment) for row in rows))
    largest = max(by_place.values(), default=0.0)
    lines = [
        f"| layers | experts | {' | '.join(treatments)} |",
        "|---|---|" + "---:|" * len(treatments),
    ]
    for group in GROUPS:
        for heat in HEATS:
            found = [by_place.get((group, heat, name)) for name in treatments]
            if any(value is not None for value in found):
                cells = [_shaded(value, largest) for value in found]
                lines.append(f"| {group} | {heat} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class HeatGrid:
    """The heat map as numbers: log10 of KL in nats, NaN where there is none."""

    values: tuple[tuple[float, ...], ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def heat_grid(rows: Sequence[StudyRow]) -> HeatGrid:
    """A line per layer group and heat, a column per treatment, for whoever draws."""
    kl = {(f"{r.cell.group} {r.cell.heat}", str(r.cell.treatment)): r.row.kl or 0.0 for r in rows}
    names = tuple(f"{group} {heat}" for group in GROUPS for heat in HEATS)
    names = tuple(name for name in names if any(place == name for place, _ in kl))
    columns = tuple(dict.fromkeys(column for _, column in kl))
    values = tuple(
        tuple(
            math.log10(value) if (value := kl.get((name, column), 0.0)) > 0 else math.nan
            for column in columns
        )
        for name in names
    )
    return HeatGrid(values, names, columns)


def lines_of(rows: Sequence[StudyRow]) -> list[dict[str, object]]:
    """A table line per cell."""
    return [
        {
            "treatment": str(row.cell.treatment),
            "layers": row.cell.group,
            "experts": f"{row.cell.heat} ({row.cell.num_experts})",
            "pairs %": f"{100 * row.pair_share:.1f}",
            "more nats": _with_error(row.row.more_nats, row.row.more_nats_error, "+.5f"),
            "KL": _with_error(row.row.kl, row.row.kl_error, ".5f"),
            "agree %": f"{100 * (row.row.agreement or 0):.2f}",
            "bits/weight there": None if row.coded_bits is None else f"{row.coded_bits:.2f}",
            "bits/weight moved": f"{row.row.bits_per_weight_moved:.2f}",
            "stored MB": f"{row.row.stored_bytes / 1e6:.1f}",
        }
        for row in rows
    ]


def markdown(lines: Sequence[Mapping[str, object]]) -> str:
    """Lines with the same columns as a Markdown table."""
    names = list(lines[0])
    shown = [["-" if line[name] is None else str(line[name]) for name in names] for line in lines]
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(head + ["| " + " | ".join(cells) + " |" for cells in shown])


def page(
    rows: Sequence[StudyRow], prior: Mapping[int, float], *, title: str, notes: Sequence[str]
) -> str:
    """The whole page."""
    parts = [
        f"# {title}",
        *notes,
        "KL from the original's next-token distribution, nats per token, shaded by its logarithm:",
        heat_map(rows),
        "Relative sensitivity of each layer at the same bound, 1 on average (the prior for "
        "`moetier compress`; a measured sensitivity overrules it): "
        + ", ".join(f"{layer}: {value:.2f}" for layer, value in prior.items()),
        "Errors are standard errors over windows, of the loss over the original's that of the "
        'paired difference. "pairs" is the share of routed (token, expert) pairs that the cell\'s '
        'experts take; "bits/weight there" what those experts are stored with; "moved" what a '
        "lone sequence without a cache moves per weight of the experts that it uses.",
        markdown(lines_of(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def as_text(rows: Sequence[StudyRow], prior: Mapping[int, float]) -> str:
    """For a terminal."""
    told = ", ".join(f"{layer}: {value:.2f}" for layer, value in prior.items())
    return "\n".join(
        [format_table(lines_of(rows)), "", heat_map(rows), "", f"sensitivity by layer: {told}"]
    )


def _shaded(value: float | None, largest: float) -> str:
    if value is None:
        return "-"
    if value <= 0 or largest <= 0:
        return f"{value:.5f}"
    depth = 1 + math.log(value / largest) / math.log(SHADES_SPAN)  # 1 for the largest
    shade = SHADES[max(0, min(len(SHADES) - 1, math.ceil(depth * (len(SHADES) - 1))))]
    return f"{value:.5f} {shade}".rstrip()


def _with_error(value: float | None, error: float | None, form: str) -> str | None:
    if value is None:
        return None
    shown = format(value, form)
    return shown if error is None else f"{shown} ± {format(error, form.lstrip('+'))}"
