"""Quality against expert bytes moved per token, by domain of text: what `moetier eval` measures.

`python -m benchmarks.quality [TEXT ...]` takes text files or folders of *.txt; by default the
six held-out domains of ../shared/mini/eval where they are there, else the built-in text. With
`--rows FILE` it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.record import RESULTS, provenance
from cluster.eval_rows import EvalRow, RowFile, pooled
from cluster.eval_settings import EvalSettings, Variant
from cluster.eval_tables import conditions
from cluster.evaluate import evaluate
from cluster.stores import bundled_store, original_store
from cluster.texts import BUILT_IN_NOTE, read_texts
from models import MIXTRAL_MINI

HELD_OUT = Path(__file__).resolve().parents[2] / "shared" / "mini" / "eval"
SETTINGS = EvalSettings()
REPORT = RESULTS / "quality-mixtral-mini.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="*", type=Path, help="text files or folders of *.txt")
    parser.add_argument("--rows", type=Path, help="keep rows here and measure none twice")
    args = parser.parse_args(argv)
    held_out = not args.text and HELD_OUT.is_dir()
    texts = read_texts([HELD_OUT] if held_out else args.text)
    store, original = bundled_store(), original_store(MIXTRAL_MINI)
    kept = None if args.rows is None else RowFile(args.rows)
    by_experts: dict[str, list[EvalRow]] = defaultdict(list)
    for row in evaluate(variants(store, original), texts, SETTINGS, original=original, rows=kept):
        for point in row.traffic:
            assert math.isclose(point.moved_bytes, point.planned_bytes), (
                f"{row.experts} on {row.text}: planned {point.planned_bytes} bytes, moved "
                f"{point.moved_bytes}; no table is written on a red gate"
            )
        by_experts[row.experts].append(row)
        print(
            f"{row.experts:32} {row.text:12} {row.perplexity:8.2f}  {row.seconds:.0f} s", flush=True
        )
    note = "" if held_out or args.text else f"\n{BUILT_IN_NOTE}\n"
    REPORT.write_text(page(by_experts) + note)
    print(f"wrote {REPORT}")
    return 0


def variants(store: Path, original: Path) -> list[Variant]:
    """The original, and one store under every policy of the worker."""
    return [
        Variant("original bf16", original),
        Variant("static codes", store, top_n=0),
        Variant("Top-1 restored", store, top_n=1),
        Variant("random 1 restored", store, restore="random", top_n=1),
        Variant("all restored", store, restore="all"),
        Variant("router mass 0.6 restored", store, restore="mass", restore_mass=0.6),
        Variant("benefit 0.15 restored", store, restore="benefit", restore_benefit=0.15),
        Variant("Top-1, skip < 0.1", store, top_n=1, skip_below=0.1),
        Variant("Top-1, skip < 0.2", store, top_n=1, skip_below=0.2),
        Variant("original, skip < 0.1", original, skip_below=0.1),
        Variant("Top-1, near data on", store, top_n=1, near_data=True),
    ]


def page(by_experts: Mapping[str, Sequence[EvalRow]]) -> str:
    """The report: perplexity by domain, what all domains lose together, and the bytes."""
    baseline = next(iter(by_experts.values()))
    points = baseline[0].traffic
    moved = [f"KB/token, cache {p.cache_percent:g} %, batch {p.batch}" for p in points]
    names = [row.text for row in baseline]
    together = ["more nats", "KL", "agree %", "bits/weight", "restored %", "skipped %"]
    header = ["experts", *names, *together, *moved, "near-data KB/token"]
    lines = [
        "# mixtral-mini: quality and expert bytes moved per token, by domain",
        "",
        f"{provenance()}",
        "",
        conditions(SETTINGS).replace("the first line", "the original"),
        "Columns of domains are perplexities; the others are over all their windows, the error "
        "of the loss that of the paired difference.",
        "This model is small and undertrained (models/README.md): no evidence about others.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for experts, rows in by_experts.items():
        whole = pooled(rows, () if rows is baseline else baseline)
        cells = [experts, *(f"{row.perplexity:.1f}" for row in rows), *quality(whole)]
        cells += [f"{point.moved_bytes / 1000:.0f}" for point in whole.traffic]
        cells += [f"{whole.traffic[0].near_data_bytes / 1000:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def quality(whole: EvalRow) -> list[str]:
    """The cells of all domains together."""
    more = "-"
    if whole.more_nats is not None:
        more = f"{whole.more_nats:+.4f} ± {whole.more_nats_error:.4f}"
    return [
        more,
        f"{whole.kl:.4f} ± {whole.kl_error:.4f}",
        f"{100 * (whole.agreement or 0):.1f}",
        f"{whole.bits_per_weight_moved:.2f}",
        f"{100 * whole.restored_share:.0f}",
        f"{100 * whole.skipped_share:.0f}",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
