"""`moetier recalibrate`: fit a store's routers again to what the original's say."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from cluster.docstrings import CALIBRATION_TEXT, built_in_calibration_text
from cluster.models import find_model
from cluster.progress import store_progress
from cluster.recalibrate import Quality, Recalibration, RecalibrationSettings, recalibrate_store
from cluster.stores import folder, original_store
from cluster.table import format_table
from cluster.texts import BUILT_IN, read_texts
from expert_store.format import load_manifest

HELP = """Fit the routers of a store again: from the hidden states of its own low-bit experts to the
logits that the original's routers give on the same tokens, by ridge regression towards the router
that was there. The ridge is chosen on windows that are held out; a router that does not get better
there stays. Prints perplexity, KL and how many tokens are routed as in the original, on text that
was not fitted on, before and after. The store gets another version and a recipe name that ends in
"-recalibrated"; until the new store is whole the old one is untouched. For routers of one matrix
(mixtral, olmoe, qwen2_moe, qwen3_moe)."""

DEFAULTS = RecalibrationSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder of a store; it is changed")
    parser.add_argument(
        "--original",
        metavar="MODEL",
        help="folder or Hub id of the original (default: the model the store was made of)",
    )
    for name, what in (
        ("text", f"to fit on (default: {CALIBRATION_TEXT}, built in)"),
        ("eval-text", f"to judge by (default: {BUILT_IN}, inside CPython)"),
    ):
        parser.add_argument(
            f"--{name}",
            action="extend",
            nargs="+",
            type=Path,
            default=[],
            metavar="PATH",
            help=f"text files or folders of *.txt {what}",
        )
    for name, what in (
        ("tokens", "tokens to fit on"),
        ("eval-windows", "windows of each text to judge by"),
        ("window-tokens", "tokens of a window"),
    ):
        default = getattr(DEFAULTS, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--in-turn",
        action="store_true",
        help="fit each layer after those before it were corrected; a pass per layer",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print; leave the store alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Fit, judge, write and print. Raises ValueError and StoreError, which the CLI prints."""
    disable_progress_bar()
    settings = RecalibrationSettings(
        tokens=args.tokens,
        eval_windows=args.eval_windows,
        window_tokens=args.window_tokens,
        order="in_turn" if args.in_turn else "together",
    )
    store = folder(args.store)
    texts = read_texts(args.text) if args.text else [built_in_calibration_text()]
    eval_texts = read_texts(args.eval_text)
    manifest = load_manifest(store)
    with store_progress() as report:
        original = original_store(find_model(args.original or manifest.model.name), report)
    # disable=None: tqdm's word for "only on a terminal".
    with tqdm(desc="routers", unit="token", file=sys.stderr, disable=None, leave=False) as bar:

        def show(num_tokens: int) -> None:
            bar.update(num_tokens)

        found = recalibrate_store(
            store,
            original,
            texts,
            eval_texts,
            settings,
            write=not args.dry_run,
            progress=show,
        )
    print(json.dumps(as_json(found), indent=2) if args.json else as_text(found, args.dry_run))
    return 0


def as_text(found: Recalibration, dry_run: bool) -> str:
    """What changed on unseen text, a line per layer, and what became of the store."""
    lines = [_line("before", found.before), _line("after", found.after)]
    layers = [
        {
            "layer": fit.layer,
            "ridge": "kept" if fit.moved == 0 else f"{fit.ridge:g}",
            "logit error": f"{fit.error_before:.5f}",
            "after": f"{fit.error_after:.5f}",
            "router moved %": f"{100 * fit.moved:.2f}",
            "same experts %": f"{100 * found.before.layers[fit.layer].same_set:.2f}",
            "then": f"{100 * found.after.layers[fit.layer].same_set:.2f}",
        }
        for fit in found.fits
    ]
    if found.manifest is not None:
        end = f"written: version {found.manifest.version[:12]}, recipe {found.manifest.recipe.name}"
    else:
        end = "nothing was written" + ("" if dry_run else ": no router got better")
    changes = "; ".join(
        f"{name} {_signed(*found.change(key))}"
        for name, key in (("nats", "window_nats"), ("KL", "window_kl"))
    )
    change = f"change, with the standard error over windows: {changes}"
    return "\n".join([format_table(lines), change, "", format_table(layers), "", end])


def as_json(found: Recalibration) -> dict[str, Any]:
    """The same for programs."""
    return {
        "before": _plain(found.before),
        "after": _plain(found.after),
        "layers": [
            {
                "layer": fit.layer,
                "ridge": None if fit.moved == 0 else fit.ridge,
                "error_before": fit.error_before,
                "error_after": fit.error_after,
                "moved": fit.moved,
            }
            for fit in found.fits
        ],
        "version": None if found.manifest is None else found.manifest.version,
    }


def _signed(mean: float, error: float | None) -> str:
    return f"{mean:+.5f}" + ("" if error is None else f" ± {error:.5f}")


def _line(name: str, quality: Quality) -> dict[str, object]:
    told, routing = quality.measures, quality.routing
    return {
        "routers": name,
        "perplexity": f"{told['perplexity']:.3f}",
        "nats": f"{told['nats']:.5f}",
        "KL": f"{told['kl']:.5f}",
        "agree %": f"{100 * told['agreement']:.2f}",
        "same experts %": f"{100 * routing.same_set:.2f}",
        "same Top-1 %": f"{100 * routing.same_top_1:.2f}",
    }


def _plain(quality: Quality) -> dict[str, Any]:
    return {
        **quality.measures,
        "same_experts": quality.routing.same_set,
        "same_top_1": quality.routing.same_top_1,
    }
