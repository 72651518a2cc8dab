"""Sections of a report about lines: front, domains, bytes, duels, ablations. Rows in, sections out.

What a store's manifest tells has its sections in `cluster/report/store_sections.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.report.figures import Interval, Point, interval, on_front, student_quantile
from cluster.report.lines import Duel, Line, best_within, duel, front_of, verdict
from cluster.report.page import Part, Picture, Section, Table
from cluster.report.plots import Dot, scatter

BITS_AXIS = "bits per expert weight moved (one sequence, no cache)"
MOST_BITS = 9.0
"""Lines that move more are in the table only: the original would squeeze all others together."""

Measure = Literal["kl", "more_nats"]
MEASURES: Mapping[Measure, str] = {
    "kl": "KL from the original, nats per token",
    "more_nats": "loss over the original's, nats per token",
}


def measured(line: Line, measure: Measure) -> Interval | None:
    """A line's value with its 95 % interval; None where it was not measured."""
    whole = line.whole
    if measure == "kl":
        return interval(whole.window_kl) if whole.window_kl else None
    if whole.more_nats is None:
        return None
    half, count = 0.0, len(whole.window_nats)
    if whole.more_nats_error is not None:
        half = student_quantile(count - 1) * whole.more_nats_error
    return Interval(whole.more_nats, whole.more_nats - half, whole.more_nats + half, count)


def shown(value: Interval | None, form: str = ".4f") -> str | None:
    """Mean and half the interval; the mean alone of a single value."""
    if value is None:
        return None
    mean = format(value.mean, form)
    return mean if value.num_values < 2 else f"{mean} ± {format(value.half, form.lstrip('+'))}"


def front_section(lines: Sequence[Line], title: str = "Pareto front") -> Section:
    """Plots of KL and of loss against bits moved, and every line's figures."""
    parts: list[Part] = []
    for measure in MEASURES:
        if picture := _front_picture(measure, lines):
            parts.append(picture)
    best = {line.label for line in front_of(lines)}
    parts.append(Table.of([_quality(line, line.label in best) for line in lines]))
    parts.append(
        "Intervals are 95 %, over the windows of all texts together; that of the loss is of the "
        "difference on the same windows. Hollow dots, and lines without a star, are dominated: "
        "another line moves no more bits and loses no more. A perplexity's loss is what it is over "
        "the original's."
    )
    return Section(title, tuple(parts))


def _front_picture(measure: Measure, lines: Sequence[Line]) -> Picture | None:
    values = [(line, measured(line, measure)) for line in lines if line.bits <= MOST_BITS]
    known = [(line, value) for line, value in values if value is not None]
    if not known:
        return None
    points = [Point(line.bits, value.mean) for line, value in known]
    kept = on_front(points)
    groups: dict[str, list[Dot]] = {}
    for (line, value), on in zip(known, kept, strict=True):
        dot = Dot(line.bits, value.mean, value.half, hollow=not on)
        groups.setdefault(line.family, []).append(dot)
    log_y = measure == "kl"
    front = [point for point, on in zip(points, kept, strict=True) if on and point.loss > 0]
    svg = scatter(
        groups, x_label=BITS_AXIS, y_label=MEASURES[measure], joined=True, log_y=log_y, front=front
    )
    words = f"{MEASURES[measure]}, against bits moved; 95 % intervals over windows, hollow dots are"
    tail = " dominated; logarithmic scale." if log_y else " dominated."
    return Picture("front-" + measure.replace("_", "-"), svg, words[0].upper() + words[1:] + tail)


def _quality(line: Line, on_the_front: bool) -> dict[str, str | None]:
    whole = line.whole
    loss = measured(line, "more_nats")
    return {
        "experts": line.label,
        "bits/weight moved": f"{line.bits:.3f}",
        "KL": shown(measured(line, "kl")),
        "more nats": shown(loss, "+.4f"),
        "perplexity": f"{whole.perplexity:.3f}",
        "perplexity loss": None if loss is None else f"{_perplexity_loss(line):+.3f}",
        "agree %": None if whole.agreement is None else f"{100 * whole.agreement:.2f}",
        "restored %": f"{100 * whole.restored_share:.0f}",
        "stored MB": f"{whole.stored_bytes / 1e6:.1f}",
        "front": "*" if on_the_front else "",
    }


def _perplexity_loss(line: Line) -> float:
    whole = line.whole
    if whole.more_nats is None:
        return 0.0
    return whole.perplexity * (1 - math.exp(-whole.more_nats))


def domain_section(lines: Sequence[Line]) -> Section:
    """Perplexity, and KL where it is known, by text."""
    names = [row.text for row in lines[0].rows]
    tables: list[Part] = ["Perplexity by text:"]
    cells: list[dict[str, str | None]] = []
    for line in lines:
        by_text: dict[str, str | None] = {r.text: f"{r.perplexity:.3f}" for r in line.rows}
        cells.append({"experts": line.label, **by_text})
    tables.append(Table.of(cells))
    if any(line.whole.kl for line in lines):
        tables.append("KL from the original by text, with 95 % intervals over its windows:")
        cells = []
        for line in lines:
            known = {r.text: shown(interval(r.window_kl)) for r in line.rows if r.window_kl}
            by_text = {name: known.get(name) for name in names}
            cells.append({"experts": line.label, **by_text})
        tables.append(Table.of(cells))
    return Section("By domain of text", tuple(tables))


def traffic_section(lines: Sequence[Line]) -> Section:
    """Expert KB per token at every size of cache and number of sequences."""
    columns = dict.fromkeys(
        (point.cache_percent, point.batch) for line in lines for point in line.whole.traffic
    )
    cells: list[dict[str, str | None]] = []
    for line in lines:
        moved = {(p.cache_percent, p.batch): p.moved_bytes for p in line.whole.traffic}
        row: dict[str, str | None] = {"experts": line.label}
        for cache, batch in columns:
            value = moved.get((cache, batch))
            name = f"cache {cache:g} %, batch {batch}"
            row[name] = None if value is None else f"{value / 1000:.1f}"
        cells.append(row | {"stored MB": f"{line.whole.stored_bytes / 1e6:.1f}"})
    note = (
        "Expert KB moved per decoded token, counted by the transport; the cache is in per cent of "
        "a line's own codes."
    )
    return Section("Bytes by cache and batch", (Table.of(cells), note))


def duel_section(mine: Sequence[Line], theirs: Sequence[Line], title: str) -> Section | None:
    """Every line of `theirs` against the line of `mine` that moves no more and loses least."""
    duels = []
    for other in theirs:
        if (best := best_within(other.bits, mine)) is not None:
            duels.append(duel(best, other))
    return comparison_section(duels, title) if duels else None


def comparison_section(duels: Sequence[Duel], title: str) -> Section:
    """Lines against lines, paired window by window."""
    won = sum(item.wins for item in duels)
    note = (
        f"Won: {won} of {len(duels)}. A duel is won when ours moves no more bits (up to 1 %) and "
        "the 95 % interval of the difference in KL, paired window by window, excludes 0."
    )
    return Section(title, (Table.of([_duel_cells(item) for item in duels]), note))


def _duel_cells(item: Duel) -> dict[str, str | None]:
    return {
        "control": item.theirs.label,
        "its bits/weight": f"{item.theirs.bits:.3f}",
        "ours": item.mine.label,
        "bits/weight": f"{item.mine.bits:.3f}",
        "control's KL over ours": shown(item.loss, "+.4f"),
        "texts won": f"{item.texts_won} of {item.num_texts}",
        "verdict": _won(item),
    }


def _won(item: Duel) -> str:
    if item.wins:
        return "won"
    return "lost" if item.loss.is_certain and item.loss.mean < 0 else "not won: no difference seen"


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be done or left out, and the two lines that differ by it alone."""

    name: str
    with_it: Line
    without: Line


def items_section(items: Sequence[Item], title: str = "What each item is worth") -> Section | None:
    """Every item with and without, and whether it is kept; see `verdict`."""
    cells: list[dict[str, str | None]] = []
    for item in items:
        found = duel(item.with_it, item.without)
        cells.append(
            {
                "item": item.name,
                "with": item.with_it.label,
                "without": item.without.label,
                "KL without - with": shown(found.loss, "+.5f"),
                "bits/weight without - with": f"{found.bits:+.4f}",
                "texts better with": f"{found.texts_won} of {found.num_texts}",
                "verdict": verdict(found),
            }
        )
    if not cells:
        return None
    note = (
        "The two lines of a row differ by the item alone, at the same budget or the same mean "
        "bytes. The difference is paired over all windows, with its 95 % interval; an item is kept "
        "when the interval excludes 0 and it takes no more bytes (up to 1 %)."
    )
    return Section(title, (Table.of(cells), note))


def claims_section(original: Line, static: Sequence[Line], restored: Sequence[Line]) -> Section:
    """The paper's three claims, for every pair of static codes and the same codes restored."""
    cells: list[dict[str, str | None]] = []
    for plain, line in zip(static, restored, strict=True):
        lost, kept = plain.whole.more_nats, line.whole.more_nats
        won = duel(line, plain)
        back = None
        if plain.whole.kl and line.whole.kl is not None:
            back = f"{100 * (1 - line.whole.kl / plain.whole.kl):.0f} %"
        cells.append(
            {
                "experts": line.label,
                "less traffic than bf16": f"{original.bits / line.bits:.2f} x",
                "perplexity loss": f"{_perplexity_loss(line):+.3f}",
                "within 0.3": "yes" if _perplexity_loss(line) <= 0.3 else "no",
                "codes alone": None if lost is None else f"{lost:+.4f} nats",
                "restored": None if kept is None else f"{kept:+.4f} nats",
                "share of KL won back": back,
                "KL won back": shown(won.loss, "+.4f"),
            }
        )
    note = (
        "The paper (arXiv 2512.17073) claims up to 3.25 times less expert traffic at a perplexity "
        "within 0.3 of FP16, and most of the loss of INT2 and INT3 recovered."
    )
    return Section("The paper's claims on this model", (Table.of(cells), note))
