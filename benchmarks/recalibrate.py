"""Whether fitting routers again pays: each order of fitting, with and without, on held-out domains.

`python -m benchmarks.recalibrate [MODEL]` makes a static 2-bit store and one of the paper's recipe
beside it, fits on the built-in calibration text and judges by the six held-out domains of
../shared/mini/eval where they are there, else by the built-in text.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import RESULTS, provenance
from cluster.docstrings import CALIBRATION_TEXT, built_in_calibration_text
from cluster.models import find_model
from cluster.recalibrate import Recalibration, RecalibrationSettings, recalibrate_store
from cluster.stores import original_store
from cluster.texts import read_texts
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.sources import DEFAULT_MODEL
from gpu_worker.recalibrate import Order

HELD_OUT = Path(__file__).resolve().parents[2] / "shared" / "mini" / "eval"
RECIPES = ("static", "paper")
ORDERS: tuple[Order, ...] = ("together", "in_turn")
COLUMNS = (
    "codes",
    "order",
    "perplexity",
    "after",
    "nats after - before",
    "KL",
    "KL after - before",
    "same experts %",
    "after",
    "same Top-1 %",
    "after",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=8192, help="to fit on")
    parser.add_argument("--windows", type=int, default=4, help="of each text to judge by")
    args = parser.parse_args(argv)
    model = find_model(args.model)
    original = original_store(model)
    fitted = [built_in_calibration_text()]
    judged = read_texts([HELD_OUT] if HELD_OUT.is_dir() else [])
    lines = []
    with tempfile.TemporaryDirectory(prefix="moetier-") as folder:
        for recipe in RECIPES:
            store = Path(folder) / recipe
            compress(model, store, CompressionConfig(recipe=recipe))
            for order in ORDERS:
                settings = RecalibrationSettings(
                    tokens=args.tokens, eval_windows=args.windows, order=order
                )
                found = recalibrate_store(store, original, fitted, judged, settings, write=False)
                lines.append(cells(f"{recipe}, 2 bits", order, found))
                print(" | ".join(lines[-1]), flush=True)
    report = RESULTS / f"recalibrate-{model.resolve().name}.md"
    report.write_text(page(model.resolve().name, lines, args.tokens, args.windows, len(judged)))
    print(f"wrote {report}")
    return 0


def cells(name: str, order: Order, found: Recalibration) -> list[str]:
    """One line of the table."""
    before, after = found.before, found.after
    return [
        name,
        order.replace("_", " "),
        f"{before.measures['perplexity']:.2f}",
        f"{after.measures['perplexity']:.2f}",
        _signed(*found.change("window_nats")),
        f"{before.measures['kl']:.5f}",
        _signed(*found.change("window_kl")),
        f"{100 * before.routing.same_set:.2f}",
        f"{100 * after.routing.same_set:.2f}",
        f"{100 * before.routing.same_top_1:.2f}",
        f"{100 * after.routing.same_top_1:.2f}",
    ]


def page(name: str, lines: Sequence[Sequence[str]], tokens: int, windows: int, texts: int) -> str:
    """The report."""
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    table += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(
        [
            f"# {name}: routers fitted again after quantising",
            "",
            provenance(),
            "",
            f"Fitted on {tokens} tokens of {CALIBRATION_TEXT}, judged by {windows} windows of 256 "
            f"tokens of each of {texts} other texts, against the original model. Errors are "
            "standard errors over windows of paired differences. together: all layers from one "
            "pass of the quantised model; in turn: each layer after those before it.",
            "",
            *table,
            "",
        ]
    )


def _signed(mean: float, error: float | None) -> str:
    return f"{mean:+.5f}" + ("" if error is None else f" ± {error:.5f}")


if __name__ == "__main__":
    raise SystemExit(main())
