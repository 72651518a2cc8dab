"""The page of `benchmarks.quality_per_byte`: results in, sections out.

Sections that any report has are `cluster/report`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.per_byte.experiment import ORIGINAL, PAPER, PAPER_3, PAPER_4, PAPER_64, best
from benchmarks.per_byte.experiments import BUDGETS, CACHED
from benchmarks.per_byte.more_sections import study_section, wire_section
from benchmarks.per_byte.runner import Result
from cluster.report.lines import Duel, Line, duel
from cluster.report.page import Part, Picture, Section, Table
from cluster.report.plots import Dot, scatter
from cluster.report.sections import (
    BITS_AXIS,
    MEASURES,
    Item,
    claims_section,
    comparison_section,
    domain_section,
    duel_section,
    front_section,
    items_section,
    measured,
    shown,
    traffic_section,
)
from cluster.report.store_sections import (
    LayerSkew,
    allocation_section,
    kurtosis_section,
    skew_section,
)
from cluster.study import StudyRow
from expert_store.format import load_manifest

DRAWN = (
    "original",
    "paper",
    "best",
    "mixed, best's quantiser",
    "mixed hqq",
    "fast",
    "fast with a calibration",
    "milo",
)
"""Families of the main plot, with the error-bounded codecs and static HQQ."""
WIRED = (best(2.5), PAPER, "static 2-bit, round to nearest", "static 2-bit, clip search")
"""Stores whose wire form is measured."""
MORE_DRAWN = ("sz3", "cuszp", "static, HQQ", "static, error feedback")


def sections(
    results: Mapping[str, Result],
    left: Mapping[str, str],
    skews: Sequence[LayerSkew],
    origin: str,
    about: Sequence[str],
    study: Sequence[StudyRow] = (),
) -> list[Section]:
    """The whole page. `results` by label, the original among them; `study` are rows of
    `benchmarks.study` on the same model."""
    lines = {label: result.line for label, result in results.items()}
    front = _of(results, "front")
    drawn = [line for line in front if line.family in (*DRAWN, *MORE_DRAWN)]
    ours = [line for line in front if line.family == "best"]
    controls = [line for line in front if line.family not in ("original", "best", "paper, other n")]
    found = [
        Section("What was measured", tuple(about)),
        budget_section(lines),
        front_section(drawn, "Pareto front: recipes and controls"),
        duel_section(ours, controls, "Best against every control that moves as much"),
        _claims(lines),
        _experts_restored(results),
        items_section(items(results)),
        _curves(results),
        _against_base(results, "policy", "Which pairs to restore, at equal mean bytes"),
        _against_base(results, "skip", "Skipping experts of little router weight"),
        domain_section([line for line in drawn if line.family in ("original", "paper", "best")]),
        traffic_section([lines[label] for label in CACHED if label in lines]),
        *_allocations(results),
        _kurtosis(results),
        skew_section(skews, origin),
        wire_section({label: results[label].store for label in WIRED if label in results}),
        study_section(study),
        _times(results, left),
    ]
    return [section for section in found if section is not None]


def _of(results: Mapping[str, Result], place: str) -> list[Line]:
    return [result.line for result in results.values() if result.experiment.place == place]


def budget_section(lines: Mapping[str, Line]) -> Section:
    """Whether best is strictly better than every control at each budget; said in words first."""
    duels: list[Duel] = []
    lost: list[str] = []
    for budget in sorted(BUDGETS):
        if (mine := lines.get(best(budget))) is None:
            lost.append(f"{budget:g}: best was not measured")
            continue
        names = (
            f"mixed by best's quantiser {budget:g}",
            f"mixed hqq {budget:g}",
            f"fast {budget:g}",
            f"fast with a calibration {budget:g}",
        )
        here = [duel(mine, lines[name]) for name in names if name in lines]
        duels += here
        lost += [f"{budget:g}: {item.theirs.label}" for item in here if not item.wins]
    for paper in (PAPER, PAPER_3, PAPER_4):
        matched = f"best at the bytes of {paper}"
        if paper in lines and matched in lines:
            duels.append(duel(lines[matched], lines[paper]))
            lost += [paper] if not duels[-1].wins else []
    if not duels:
        return Section("Best at every budget", ("Best and its controls were not measured.",))
    words = (
        "Best is strictly better than every control measured here, at every budget."
        if not lost
        else "Best is strictly better everywhere but: " + "; ".join(lost) + "."
    )
    whole = comparison_section(duels, "Best at every budget")
    return Section(whole.title, (words, *whole.parts))


def _claims(lines: Mapping[str, Line]) -> Section | None:
    pairs = {
        PAPER: "paper 2-bit, rank 16, Top-0",
        "paper 2-bit, rank 32, Top-1": "paper 2-bit, rank 16, Top-0",
        PAPER_64: "paper 2-bit, rank 16, Top-0",
        PAPER_3: "paper 3-bit, rank 16, Top-0",
    }
    known = {a: b for a, b in pairs.items() if a in lines and b in lines}
    if not known:
        return None
    restored, static = [lines[a] for a in known], [lines[b] for b in known.values()]
    return claims_section(lines[ORIGINAL], static, restored)


def _experts_restored(results: Mapping[str, Result]) -> Section | None:
    """The paper's store with other numbers of experts restored, and at random."""
    if PAPER not in results:
        return None
    base = results[PAPER].line
    others = [r.line for r in results.values() if r.line.family == "paper, other n"]
    others = [line for line in others if line.label.startswith("paper 2-bit")]
    cells = [_change(duel(base, line)) for line in others]
    if not cells:
        return None
    cells.insert(0, _itself(base))
    return Section("How many of a token's experts to restore", (Table.of(cells), CHANGE_NOTE))


CHANGE_NOTE = (
    "Differences of KL are over the line that the row names, paired window by window, with their "
    "95 % interval: above 0 is worse."
)


def _itself(line: Line) -> dict[str, str | None]:
    return {
        "experts": line.label,
        "bits/weight moved": f"{line.bits:.3f}",
        "KL": shown(measured(line, "kl")),
        "KL over base": "-",
        "base": "-",
        "restored %": f"{100 * line.whole.restored_share:.0f}",
        "skipped %": f"{100 * line.whole.skipped_share:.0f}",
    }


def _change(item: Duel) -> dict[str, str | None]:
    over = {"KL over base": shown(item.loss, "+.5f"), "base": item.mine.label}
    return _itself(item.theirs) | over


def items(results: Mapping[str, Result]) -> list[Item]:
    """Every experiment that differs from its base by an item."""
    found = []
    for result in results.values():
        name, base = result.experiment.item, result.experiment.base
        if name is not None and base is not None:
            pair = results[base].line, result.line
            found.append(Item(name, *(reversed(pair) if result.experiment.adds else pair)))
    return found


def _against_base(results: Mapping[str, Result], place: str, title: str) -> Section | None:
    cells: list[dict[str, str | None]] = []
    bases: set[str] = set()
    for result in results.values():
        base = result.experiment.base
        if result.experiment.place == place and base is not None:
            if base not in bases:
                bases.add(base)
                cells.append(_itself(results[base].line))
            cells.append(_change(duel(results[base].line, result.line)))
    return Section(title, (Table.of(cells), CHANGE_NOTE)) if cells else None


def _curves(results: Mapping[str, Result]) -> Section | None:
    """KL over prefixes of the compensators, with the whole ones."""
    by_base: dict[str, list[Line]] = {}
    for result in results.values():
        if result.experiment.place == "prefix" and result.experiment.base is not None:
            by_base.setdefault(result.experiment.base, []).append(result.line)
    if not by_base:
        return None
    groups: dict[str, list[Dot]] = {}
    cells: list[dict[str, str | None]] = []
    for base, lines in by_base.items():
        whole = results[base].line
        cells += [_itself(whole), *(_change(duel(whole, line)) for line in lines)]
        for line in (*lines, whole):
            if (value := measured(line, "kl")) is not None:
                groups.setdefault(base, []).append(Dot(line.bits, value.mean, value.half))
    svg = scatter(groups, x_label=BITS_AXIS, y_label=MEASURES["kl"], joined=True, log_y=True)
    caption = "KL over prefixes of each compensator: 0, 25, 50, 75 and 100 % of its bytes."
    parts: tuple[Part, ...] = (Picture("prefixes", svg, caption), Table.of(cells), CHANGE_NOTE)
    return Section("Rank as a knob: prefixes of compensators", parts)


def _allocations(results: Mapping[str, Result]) -> list[Section]:
    shown_stores = {"best-2-5": best(2.5), "best-3": best(3.0), "paper": PAPER}
    return [
        allocation_section(label, name, load_manifest(results[label].store))
        for name, label in shown_stores.items()
        if label in results
    ]


def _kurtosis(results: Mapping[str, Result]) -> Section | None:
    """Codes of one width, errors unweighted: what the paper's claim is about."""
    labels = {PAPER: "HQQ 2-bit", PAPER_3: "HQQ 3-bit"}
    for bits in (2, 3):
        labels |= {
            f"static {bits}-bit, {q}": f"{q} {bits}-bit"
            for q in ("round to nearest", "clip search")
        }
    known = {
        name: load_manifest(results[label].store)
        for label, name in labels.items()
        if label in results
    }
    return kurtosis_section(known) if known else None


def _times(results: Mapping[str, Result], left: Mapping[str, str]) -> Section:
    cells: list[dict[str, str | None]] = []
    for label, result in results.items():
        made = None if result.made_s is None else f"{result.made_s:.0f}"
        measured_s = f"{result.line.whole.seconds:.0f}"
        cells.append({"experts": label, "made in s": made, "measured in s": measured_s})
    parts: list[Part] = [Table.of(cells)]
    if left:
        not_done = [{"experts": label, "why": why} for label, why in left.items()]
        parts += ["Not measured:", Table.of(not_done)]
    return Section("Time taken, and what was not measured", tuple(parts))
