"""The page and the CSV of a run: one table per link, what stands behind it, and how it was made."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.offload_parts.beside import Beside
from benchmarks.offload_parts.contestants import Contestant
from benchmarks.offload_parts.quality import INTERVAL, Judgement, Quality, difference
from benchmarks.offload_parts.rows import MEASURES, NO_LINK, Repetition, Results, Spread
from benchmarks.offload_parts.work import WorkSizes
from benchmarks.record import RESULTS, commit, processor, provenance, table, today, write_rows
from cluster.eval_settings import EvalSettings

ANCHORS = (
    "Anchors: over fp16 offloading, arXiv 2512.17073 reports up to 7.64x on a GPU alone and up to\n"
    "6.69x with NDP. Its hardware, its models and its baseline are others; the column x (a) is\n"
    "ours, on this machine."
)


BESIDE_MEASURES = ("decode, batch 1", "decode, batch 8", "prefill", "first token", "codes, batch 1")


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all rows of a run have in common."""

    model: str
    texts: list[str]
    settings: EvalSettings
    sizes: WorkSizes
    cores: Mapping[str, int]
    load: float  # 1-minute load average before the turns


@dataclass(frozen=True, slots=True)
class CsvRow:
    """One figure. `against_a`, `against_b`: its ratio, repetition by repetition; empty where that
    contestant did not run."""

    link_gbit: float
    link_measured_gbit: float
    key: str
    experts: str
    what: str
    low: float
    median: float
    high: float
    unit: str
    against_a: float | str
    against_b: float | str
    repetitions: int
    perplexity: float | str
    bits_moved: float | str
    hardware: str
    commit: str
    date: str


def write(
    folder: Path | None,
    conditions: Conditions,
    contestants: Sequence[Contestant],
    repetitions: Sequence[Repetition],
    judged: Mapping[Quality, Judgement],
    beside: Beside | None,
) -> list[Path]:
    """Both files; where they are."""
    folder = folder or RESULTS
    page, rows = (folder / f"offload-{conditions.model}.{end}" for end in ("md", "csv"))
    results = Results(repetitions)
    links = list(dict.fromkeys(one.link_gbit for one in repetitions))
    figures = list(csv_rows(links, contestants, results, judged))
    sections = [link_section(link, contestants, results, judged) for link in links]
    if beside is not None:
        figures += csv_rows_beside(beside)
        sections.append(beside_section(beside))
    write_rows(rows, figures)
    page.write_text("\n".join([head(conditions, contestants, judged), *sections]))
    return [page, rows]


def csv_rows(
    links: Sequence[float],
    contestants: Sequence[Contestant],
    results: Results,
    judged: Mapping[Quality, Judgement],
) -> Iterator[CsvRow]:
    for link in links:
        for item in contestants:
            one = judged[item.quality]
            for what in MEASURES:
                row = _csv_row(link, item.key, item.label, what, results)
                yield replace(
                    row, perplexity=_digits(one.perplexity), bits_moved=_digits(one.bits_moved)
                )


def csv_rows_beside(beside: Beside) -> Iterator[CsvRow]:
    results = Results(beside.repetitions)
    for key, label in beside.labels.items():
        for what in BESIDE_MEASURES:
            yield _csv_row(NO_LINK, key, label, what, results)


def _csv_row(link: float, key: str, label: str, what: str, results: Results) -> CsvRow:
    ran = results.repetitions(link, key)
    spread = results.spread(link, key, what)
    ratios = [results.ratio(link, key, base, what) for base in "ab"]
    return CsvRow(
        link_gbit=link,
        link_measured_gbit=_digits(ran[0].link_bytes_per_s * 8 / 1e9),
        key=key,
        experts=label,
        what=what,
        low=_digits(spread.low),
        median=_digits(spread.median),
        high=_digits(spread.high),
        unit=MEASURES[what][0],
        against_a=_digits(ratios[0].median) if ratios[0] else "",
        against_b=_digits(ratios[1].median) if ratios[1] else "",
        repetitions=len(ran),
        perplexity="",
        bits_moved="",
        hardware=processor(),
        commit=commit(),
        date=today(),
    )


def head(
    conditions: Conditions,
    contestants: Sequence[Contestant],
    judged: Mapping[Quality, Judgement],
) -> str:
    sizes, settings = conditions.sizes, conditions.settings
    texts = ", ".join(conditions.texts)
    return f"""# {conditions.model}: experts over a bounded link

{provenance()} Load average {conditions.load:.1f} before and
{os.getloadavg()[0]:.1f} after, on {os.cpu_count()} cores.

Two hosts of one machine: network namespaces, joined by a pair of interfaces with a token bucket in
each direction (`tc tbf`). The memory node, on core {conditions.cores["memory"]}, serves the records
and runs near data. The "GPU node", on core {conditions.cores["gpu"]}, runs the engine and
**computes on that one CPU core in float32**: there is no GPU in this page. The dense part of the
model lies on the GPU node; expert records and activations cross the link by gRPC.

Every contestant walks the same held-out text ({texts}),
other places of it in every repetition, all in turns; the token that it chose is replaced by the
text's. A repetition is a prompt of {sizes.prefill_tokens} tokens (prefill), one of
{sizes.prompt_tokens} alone (first token), then {sizes.steps} steps of that sequence and
{sizes.batch_steps} of {sizes.sequences} side by side, each after {sizes.warm_up} steps. Caches stay
as the turn before left them. Figures are medians, the spread in brackets goes from the lowest to
the highest repetition; ratios are medians of the ratios within a repetition. Link used is what
gRPC's messages brought, over the speed of a plain socket measured just before.

Perplexity is without the link, over {settings.windows} windows of {settings.window_tokens} tokens
of each text; more nats is the loss over (a), paired by window, with its 95 % interval. For near
data it is that of policy low_bit, where every pair that is not restored has int8 activations; for
the governor that of no compensator at all, the least it may come to.
A quarter cached is a quarter of a contestant's own codes; "in (b)'s cache" has as many bytes as
(b), which hold all of its experts.

{ANCHORS}

{quality_section(contestants, judged)}"""


def quality_section(contestants: Sequence[Contestant], judged: Mapping[Quality, Judgement]) -> str:
    """What (e) may be compared with: it has to be no worse than (d)."""
    paper = judged.get(("paper", None, False))
    lines = []
    for item in contestants:
        one = judged[item.quality]
        against = "-"
        if paper is not None and item.store.startswith("best"):
            nats, half = difference(one, paper)
            against = f"{nats:+.4f} ± {half:.4f}"
        half = INTERVAL * one.more_nats_error
        lines.append(
            [
                item.label,
                f"{one.bits_moved:.2f}",
                f"{one.perplexity:.2f}",
                f"{one.more_nats:+.4f} ± {half:.4f}",
                against,
            ]
        )
    names = ["experts", "bits/weight moved, no cache", "perplexity", "more nats than (a)"]
    return "## Quality\n\n" + table([*names, "more nats than (d)"], lines) + "\n"


def link_section(
    link: float,
    contestants: Sequence[Contestant],
    results: Results,
    judged: Mapping[Quality, Judgement],
) -> str:
    speed = results.repetitions(link, contestants[0].key)[0].link_bytes_per_s * 8 / 1e9
    names = [
        "experts",
        "tokens/s, batch 1",
        "tokens/s, batch 8",
        "prefill tokens/s",
        "first token, ms",
        "KB/token: codes + factors + activations, batch 1",
        "batch 8",
        "link used, batch 1 / 8",
        "perplexity",
        "x (a), batch 1 / 8",
        "x (b), batch 1 / 8",
    ]
    lines = []
    for item in contestants:
        figures = {what: results.spread(link, item.key, what) for what in MEASURES}
        shares = [figures[f"link share, batch {batch}"].median for batch in (1, 8)]
        lines.append(
            [
                item.label,
                _cell(figures["decode, batch 1"]),
                _cell(figures["decode, batch 8"]),
                _cell(figures["prefill"]),
                _cell(figures["first token"]),
                _kilobytes(figures, 1),
                _kilobytes(figures, 8),
                " / ".join(f"{100 * share:.0f} %" for share in shares),
                f"{judged[item.quality].perplexity:.2f}",
                _ratios(results, link, item.key, "a"),
                _ratios(results, link, item.key, "b"),
            ]
        )
    return f"## {link:g} Gbit/s (measured: {speed:.3f})\n\n{table(names, lines)}\n"


def beside_section(beside: Beside) -> str:
    """What has everything in local memory: an upper bound for what has to fetch."""
    results = Results(beside.repetitions)
    lines = []
    for key, label in beside.labels.items():
        spreads = [results.spread(NO_LINK, key, what) for what in BESIDE_MEASURES]
        more = beside.more_nats.get(key)
        cells = [_cell(spread) for spread in spreads[:4]]
        cells += [f"{spreads[4].median:.0f}", "-" if more is None else f"{more:+.4f}"]
        lines.append([label, *cells])
    names = ["what", "tokens/s, batch 1", "tokens/s, batch 8", "prefill tokens/s"]
    names += ["first token, ms", "KB loaded per token, batch 1", "more nats than bf16"]
    left_out = "".join(f"\nLeft out: {label}: {why}.\n" for label, why in beside.left_out.items())
    return f"""## No link: everything in this machine's memory

What a user would run today on one machine, on the same core, the same text and in turns with our
engine when all its experts are resident. They fetch nothing over a link, so this is an upper bound
for a machine that has the memory, not a rival over the link. accelerate loads all experts of
a layer for each forward (here from the page cache); the loss is that of the texts of the first
repetition. Q2_K to Q4_K need rows of 256 weights, which this model's experts do not have.

{table(names, lines)}
{left_out}"""


def _kilobytes(figures: Mapping[str, Spread], batch: int) -> str:
    kinds = ("codes", "factors", "activations")
    return " + ".join(f"{figures[f'{kind}, batch {batch}'].median:.0f}" for kind in kinds)


def _ratios(results: Results, link: float, key: str, base: str) -> str:
    found = [results.ratio(link, key, base, f"decode, batch {batch}") for batch in (1, 8)]
    return " / ".join("-" if one is None else f"{one.median:.2f}" for one in found)


def _cell(spread: Spread) -> str:
    return f"{_short(spread.median)} ({_short(spread.low)}-{_short(spread.high)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
