"""Perplexity against expert bytes moved per token, by domain of text: what `moetier eval` measures.

`python -m benchmarks.quality [TEXT ...]` takes text files or folders of *.txt; by default the
six held-out domains of ../shared/mini/eval where they are there, else the built-in text.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.record import RESULTS, provenance
from cluster.evaluate import EvalRow, EvalSettings, Variant, conditions, evaluate
from cluster.stores import bundled_store, original_store
from cluster.texts import BUILT_IN_NOTE, read_texts
from models import MIXTRAL_MINI

HELD_OUT = Path(__file__).resolve().parents[2] / "shared" / "mini" / "eval"
SETTINGS = EvalSettings(windows=32, decode_tokens=64, warm_up=0, batch=1, cache_percent=0)
REPORT = RESULTS / "quality-mixtral-mini.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="*", type=Path, help="text files or folders of *.txt")
    chosen = parser.parse_args(argv).text
    held_out = not chosen and HELD_OUT.is_dir()
    texts = read_texts([HELD_OUT] if held_out else chosen)
    store, original = bundled_store(), original_store(MIXTRAL_MINI)
    variants = [
        Variant("original bf16", original),
        Variant("static 2-bit", store, top_n=0),
        Variant("2-bit + compensators Top-1", store, top_n=1),
        Variant("2-bit + compensators Top-2", store, top_n=2),
        Variant("Top-1, near data on", store, top_n=1, near_data=True),
    ]
    by_experts: dict[str, list[EvalRow]] = defaultdict(list)
    for row in evaluate(variants, texts, SETTINGS):
        assert math.isclose(row.moved_bytes, row.planned_bytes), (
            f"{row.experts} on {row.text}: planned {row.planned_bytes} bytes, moved "
            f"{row.moved_bytes}; no table is written on a red gate"
        )
        by_experts[row.experts].append(row)
        print(f"{row.experts:28} {row.text:12} {row.perplexity:8.2f}", flush=True)
    note = "" if held_out or chosen else f"\n{BUILT_IN_NOTE}\n"
    REPORT.write_text(page(by_experts) + note)
    print(f"wrote {REPORT}")
    return 0


def page(by_experts: Mapping[str, Sequence[EvalRow]]) -> str:
    """The report: perplexity by domain, the mean loss over the original, and the bytes."""
    names = [row.text for row in next(iter(by_experts.values()))]
    header = ["experts", *names, "more nats (mean)", "expert KB/token", "near-data KB/token"]
    lines = [
        "# mixtral-mini: perplexity and expert bytes moved per token, by domain",
        "",
        f"{provenance()}",
        "",
        conditions(SETTINGS).replace("the first line", "the original"),
        "The standard error in the loss column is that of the paired difference over all windows.",
        "This model is small and undertrained (models/README.md): no evidence about others.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    baseline = next(iter(by_experts.values()))
    for experts, rows in by_experts.items():
        cells = [experts, *(f"{row.perplexity:.1f}" for row in rows), loss(rows, baseline)]
        cells += [f"{mean([row.moved_bytes for row in rows]) / 1000:.0f}"]
        cells += [f"{mean([row.near_data_bytes for row in rows]) / 1000:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def loss(rows: Sequence[EvalRow], baseline: Sequence[EvalRow]) -> str:
    """Mean extra nats over all windows of all texts, with the standard error of the difference."""
    if rows is baseline:
        return "-"
    differences = [
        mine - theirs
        for row, base in zip(rows, baseline, strict=True)
        for mine, theirs in zip(row.window_nats, base.window_nats, strict=True)
    ]
    middle = mean(differences)
    variance = sum((d - middle) ** 2 for d in differences) / (len(differences) - 1)
    return f"{middle:+.4f} ± {math.sqrt(variance / len(differences)):.4f}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    raise SystemExit(main())
