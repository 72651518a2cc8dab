"""What the expert cache finds, by policy and budget, on routing of real runs, against Belady.

`python -m benchmarks.cache` records how texts route in mixtral-mini and, where they are on this
machine, smol-moe and finegrained-mini (decoding at batch 1 and 8), and replays the traces. Traces
are kept in the cache folder and recorded once. Texts are the six held-out domains of
../shared/mini/eval where they are there, else the built-in text.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.record import RESULTS, provenance, table, write_rows
from cluster.cache_replay import BOUND, POLICIES, WHOLE, Played, ReplayRow, replay_rows
from cluster.environment import cache_folder
from cluster.models import SMOL, has_smol, smol_folder
from cluster.stores import bundled_store, compressed_store
from cluster.texts import EvalText, read_texts
from cluster.tracing import TraceSettings, trace_texts
from expert_store.config import CompressionConfig
from expert_store.format import load_manifest
from expert_store.segment import Segment
from gpu_worker.build import open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.eviction import ADMIT_OVER, HALF_LIFE, Frequency, eviction_policy
from gpu_worker.eviction_optimum import best_counts
from gpu_worker.expert_cache import CacheBudgets
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.scoring import score_decode
from gpu_worker.trace import side_by_side, traced
from gpu_worker.trace_file import load_trace, save_trace
from gpu_worker.trace_turns import replay_turns, turns_of

HELD_OUT = Path(__file__).resolve().parents[2] / "shared" / "mini" / "eval"
FINEGRAINED = Path(__file__).resolve().parents[2] / "tiny" / "models" / "finegrained-mini"
REPORT, ROWS = RESULTS / "cache.md", RESULTS / "cache.csv"
PERCENT = (12.5, 25.0, 50.0)
SETTINGS = TraceSettings(batch=16, tokens=192, groups=1)
GROUPS = {1: 4, 8: 2}
"""Sequences replayed side by side -> how many such groups, one after another."""
FACTOR_SHARES = (None, 0.0, 0.05, 0.1, 0.2)
HALF_LIVES = (4.0, 16.0, 64.0)
ADMISSIONS = (1.0, 1.2, 1.5)
SERVED = tuple(name for name in POLICIES if name not in (BOUND, WHOLE))


@dataclass(frozen=True, slots=True)
class Case:
    """One model's trace at one batch, on its store."""

    model: str
    recipe: str
    batch: int
    played: Played

    def budgets(self, share: float | None = None) -> list[CacheBudgets]:
        return [CacheBudgets(int(self.played.store_bytes * p / 100), share) for p in PERCENT]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the CSV: a `ReplayRow` and which trace it is of."""

    model: str
    recipe: str
    batch: int
    tokens: int
    cache_bytes: int
    cache_share: float
    factor_share: float | None
    policy: str
    codes_found: float
    factors_found: float
    found: float
    of_bound: float
    codes_hits: int
    factors_hits: int
    misses: int
    moved_bytes_per_token: float

    @staticmethod
    def of(case: Case, row: ReplayRow) -> Row:
        return Row(case.model, case.recipe, case.batch, case.played.num_tokens, **asdict(row))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=cache_folder() / "traces")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    texts = read_texts([HELD_OUT] if HELD_OUT.is_dir() else [])
    check_that_a_replay_is_the_run(texts)
    cases = [case for store in stores() for case in recorded(store, texts, args.traces)]
    rows, shares = [], []
    for case in cases:
        print(f"{case.model}, batch {case.batch}", flush=True)
        rows += [Row.of(case, row) for row in replay_rows(case.played, case.budgets())]
        for share in FACTOR_SHARES[1:]:
            found = replay_rows(case.played, case.budgets(share), ["lfu", BOUND])
            shares += [Row.of(case, row) for row in found]
    write_rows(ROWS, [*rows, *shares])
    sections = [
        head(texts),
        policies_section(rows),
        shares_section([*rows, *shares]),
        ageing_section(cases),
        bookkeeping_section(cases),
    ]
    REPORT.write_text("\n\n".join(sections) + "\n")
    print(f"wrote {REPORT} and {ROWS}")
    return 0


def check_that_a_replay_is_the_run(texts: Sequence[EvalText]) -> None:
    """The gate: the real worker's cache finds what its replay says, record by record."""
    store = bundled_store()
    with closing(Segment(store)) as source:
        sizes = RecordSizes.of(source.manifest)
        budgets = CacheBudgets(sum(sizes.codes.values()) // 4)
        config = WorkerConfig(cache_bytes=budgets.total_bytes, fetch_threads=0, device="cpu")
        model = open_model(store, source, None, config)
        assert model.tokenizer is not None, "the bundled model has a tokenizer"
        ids = model.tokenizer(texts[0].text[:2000], add_special_tokens=False)["input_ids"]
        with traced(model.runner, model.config.pair_policy(source.manifest)) as recorder:
            real = score_decode(model.runner, torch.tensor([ids[:65], ids[65:130]])).counters
        model.close()
        trace = recorder.trace(source.manifest.model, source.manifest.version, "gate")
        policy = eviction_policy(config.cache_policy)
        found = replay_turns(turns_of(trace, sizes), budgets, policy)
    assert found.hits == real.cache_hits, (
        f"the replay finds {found.hits}, the run found {real.cache_hits}; no table on a red gate"
    )


def stores() -> Iterator[Path]:
    """mixtral-mini with the paper's recipe, as bundled; the others where they are.

    smol-moe's experts are real pretrained weights, which 2 bits destroy: "fast" keeps its routing.
    """
    yield bundled_store()
    if has_smol():
        yield compressed_store(smol_folder(), CompressionConfig(recipe="fast"))
    else:
        print(f"{SMOL} is not there (make smol); it is left out")
    if FINEGRAINED.is_dir():
        yield compressed_store(FINEGRAINED, CompressionConfig(recipe="paper"))
    else:
        print(f"{FINEGRAINED} is not there; it is left out")


def recorded(store: Path, texts: Sequence[EvalText], folder: Path) -> Iterator[Case]:
    """The store's trace, from the folder or recorded into it, replayed at each batch."""
    manifest = load_manifest(store)
    name = f"{manifest.model.name}-{manifest.version[:12]}"
    read = hashlib.sha256("\n".join(text.text for text in texts).encode()).hexdigest()
    path = folder / f"{name}-{SETTINGS.batch}x{SETTINGS.tokens}-{read[:8]}.trace"
    if not path.exists():
        print(f"recording {path}", flush=True)
        save_trace(path, trace_texts(store, texts, SETTINGS))
    trace = load_trace(path)
    for batch, num_groups in GROUPS.items():
        played = Played.of(side_by_side(trace, batch, num_groups), manifest)
        yield Case(manifest.model.name, manifest.recipe.name, batch, played)


def head(texts: Sequence[EvalText]) -> str:
    groups = " and ".join(f"{count} times {batch}" for batch, count in GROUPS.items())
    return (
        "# What the expert cache finds, by policy and budget\n\n"
        f"{provenance()}\n\n"
        f"Routing recorded while windows of texts ({', '.join(text.name for text in texts)}) were "
        f"decoded, {SETTINGS.batch} sequences of {SETTINGS.tokens} tokens side by side, the next "
        f"token always that of the text; replayed {groups} sequences at a time through the "
        "worker's own cache, from empty. Shares are of the device bytes that were asked for. "
        "`belady-bound` is the most any cache could find (records kept in part, by what is asked "
        "for again soonest), `belady-whole` the same rule over whole records, which could be done: "
        "the optimum lies between. A gate ran first: a real run's hits are those of its replay. "
        "Counts, not times: the same on every machine. mixtral-mini and finegrained-mini are small "
        "and undertrained (models/README.md)."
    )


def policies_section(rows: Sequence[Row]) -> str:
    """Bytes found, and the policies' mean share of the bound."""
    cells: dict[tuple[str, str, int, float], dict[str, Row]] = {}
    for row in rows:
        place = (row.model, row.recipe, row.batch, round(100 * row.cache_share, 1))
        cells.setdefault(place, {})[row.policy] = row
    lines = [
        [model, recipe, str(batch), f"{percent:g} %", *(found(line[name]) for name in POLICIES)]
        for (model, recipe, batch, percent), line in cells.items()
    ]
    means = {
        name: statistics.fmean(100 * row.of_bound for row in rows if row.policy == name)
        for name in (*SERVED, WHOLE)
    }
    best = max(SERVED, key=lambda name: means[name])
    default = WorkerConfig().cache_policy
    told = ", ".join(f"{name} {mean:.1f} %" for name, mean in means.items())
    chosen = "is" if best == default else f"is not, but {default} is,"
    return (
        "## Policies\n\nBytes found in percent: codes / factors / both. Codes and factors compete "
        "for one budget, given in percent of all records.\n\n"
        + table(["model", "recipe", "batch", "cache", *POLICIES], lines)
        + f"\n\nMean share of the bound over these {len(cells)} cells: {told}. "
        f"The largest has {best}, which {chosen} the worker's default."
    )


def found(row: Row) -> str:
    shares = (row.codes_found, row.factors_found, row.found)
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def shares_section(rows: Sequence[Row]) -> str:
    """Bytes found by lfu when factors have a budget of their own."""
    cells: dict[tuple[str, int, float], dict[float | None, Row]] = {}
    for row in (row for row in rows if row.policy == "lfu"):
        place = (row.model, row.batch, round(100 * row.cache_share, 1))
        cells.setdefault(place, {})[row.factor_share] = row
    lines = [
        [
            model,
            str(batch),
            f"{percent:g} %",
            *(f"{100 * line[s].found:.1f}" for s in FACTOR_SHARES),
        ]
        for (model, batch, percent), line in cells.items()
    ]
    names = ["compete" if share is None else f"{share:g}" for share in FACTOR_SHARES]
    apart = [
        max(line[s].found for s in FACTOR_SHARES[1:]) - line[None].found for line in cells.values()
    ]
    return (
        "## A budget for factors\n\nBytes found in percent by lfu, when this part of the cache is "
        "for factors alone and the rest for codes alone.\n\n"
        + table(["model", "batch", "cache", *names], lines)
        + f"\n\nThe best fixed share, known only afterwards, finds {100 * min(apart):+.1f} to "
        f"{100 * max(apart):+.1f} points more than competing does "
        f"(mean {100 * statistics.fmean(apart):+.2f})."
    )


def ageing_section(cases: Sequence[Case]) -> str:
    """How the two numbers of lfu were chosen."""
    lines = []
    cells_of = [(case.played.turns, case.budgets()[1]) for case in cases]
    bounds = [best_counts(*cell, in_part=True).hit_share() for cell in cells_of]
    for half_life in HALF_LIVES:
        cells = []
        for admit_over in ADMISSIONS:
            policy = Frequency(half_life, admit_over)
            shares = [replay_turns(*cell, policy).hit_share() for cell in cells_of]
            of_bound = statistics.fmean(a / b for a, b in zip(shares, bounds, strict=True))
            cells.append(f"{100 * of_bound:.1f}")
        lines.append([f"{half_life:g}", *cells])
    return (
        "## Ageing and admission of lfu\n\nMean share of the bound in percent, at a budget of "
        "25 %. A record is kept if it was used so many times as much as those it would "
        f"evict; the worker has {HALF_LIFE:g} turns and {ADMIT_OVER:g}.\n\n"
        + table(["half-life in turns", *(f"over {a:g}" for a in ADMISSIONS)], lines)
    )


def bookkeeping_section(cases: Sequence[Case]) -> str:
    """Microseconds of one layer's turn, policies interleaved: times of this machine."""
    lines = []
    for case in cases:
        budgets = case.budgets()[1]

        def play(name: str, case: Case = case, budgets: CacheBudgets = budgets) -> float:
            policy = eviction_policy(name)  # type: ignore[arg-type]
            start_s = time.perf_counter()
            replay_turns(case.played.turns, budgets, policy)
            return 1e6 * (time.perf_counter() - start_s) / len(case.played.turns)

        spent = interleaved(play)
        needs = statistics.fmean(len(turn.needs) for turn in case.played.turns)
        cells = [f"{statistics.median(spent[name]):.0f}" for name in SERVED]
        lines.append([case.model, str(case.batch), f"{needs:.1f}", *cells])
    return (
        "## Time of the bookkeeping\n\nMicroseconds per layer and step at 25 %, the replay's own "
        "loop included; medians of 3, policies interleaved, one thread.\n\n"
        + table(["model", "batch", "records asked for", *SERVED], lines)
    )


def interleaved(play: Callable[[str], float], times: int = 3) -> dict[str, list[float]]:
    spent: dict[str, list[float]] = {name: [] for name in SERVED}
    for _ in range(times):
        for name in SERVED:
            spent[name].append(play(name))
    return spent


if __name__ == "__main__":
    raise SystemExit(main())
