"""`moetier eval`: quality and expert bytes moved per token, by text and kind of experts."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from transformers.utils.logging import disable_progress_bar

from cluster.eval_rows import EvalRow, RowFile, as_plain
from cluster.eval_settings import EvalSettings, Variant
from cluster.eval_tables import conditions, tables
from cluster.evaluate import evaluate
from cluster.models import find_model
from cluster.progress import store_progress
from cluster.stores import bundled_store, folder, original_store
from cluster.texts import BUILT_IN, BUILT_IN_NOTE, read_texts
from expert_store.format import load_manifest
from expert_store.types import Manifest
from gpu_worker.restoring import Restore

HELP = """Quality of a store on texts, and the expert bytes it moves per decoded token.

Without STORE, the bundled model's (made on first use). All is measured in this process, bytes by
the transport's counters: perplexity over windows of text, bytes while sequences decode side by side
with an expert cache of the stated size. "more nats" is the loss over the first line on the same
windows, with the standard error of that paired difference. With --compare-original, KL and "agree"
say how far a line's next-token distribution is from the original's. Policies that are given several
values make a line for each of them."""

DEFAULTS = EvalSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder of a store")
    parser.add_argument(
        "--text",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a text file, a folder of *.txt or of WikiText-2; repeatable "
        f"(default: {BUILT_IN}, inside CPython)",
    )
    parser.add_argument(
        "--compare-original",
        nargs="?",
        const="",
        metavar="MODEL",
        help="first measure the original bf16 experts of MODEL (folder or Hub id; without a value, "
        "the model the store was made of) and hold the other lines against them; keeps a copy as "
        "large as the model, and its distributions, in the cache folder",
    )
    _add_policies(parser)
    _add_settings(parser)
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="keep every row in this JSON-lines file, and do not measure again what it holds",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_policies(parser: argparse.ArgumentParser) -> None:
    policies = parser.add_argument_group("policies", "of the worker; several values, several lines")

    def several(flag: str, metavar: str, help_text: str, kind: type) -> None:
        policies.add_argument(
            f"--{flag}",
            type=kind,
            nargs="+",
            action="extend",
            default=None,
            metavar=metavar,
            help=help_text,
        )

    policies.add_argument(
        "--restore",
        nargs="+",
        choices=get_args(Restore),
        default=["top_n"],
        help="which of a token's experts get their compensator (default: top_n)",
    )
    several("top-n", "N", "how many, for top_n and random (default: what the store says)", int)
    several("restore-mass", "SHARE", "router weight that mass covers, 0 to 1", float)
    several("restore-benefit", "B", "share of the weight x repaired error, for benefit", float)
    several("restore-seed", "SEED", "for random (default: 0)", int)
    several("skip-below", "SHARE", "run no expert with less of a token's router weight", float)
    policies.add_argument(
        "--near-data", action="store_true", help="one more line, with a near-data worker"
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    settings = parser.add_argument_group("what is measured")

    def number(flag: str, help_text: str) -> None:
        default = getattr(DEFAULTS, flag.replace("-", "_"))
        settings.add_argument(
            f"--{flag}",
            type=int,
            default=default,
            metavar="N",
            help=f"{help_text} (default: {default})",
        )

    number("windows", "windows of a text")
    number("window-tokens", "predicted tokens of a window")
    settings.add_argument(
        "--decode-tokens",
        type=int,
        metavar="N",
        help="tokens that each sequence decodes while bytes are counted (default: "
        f"{DEFAULTS.decode_tokens}, or those of a window)",
    )
    settings.add_argument(
        "--warm-up",
        type=int,
        metavar="N",
        help=f"first decode steps that only fill the cache (default: {DEFAULTS.warm_up}, or half)",
    )
    settings.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="N",
        help="sequences that decode side by side (default: 1 8, as far as there are windows)",
    )
    settings.add_argument(
        "--cache-percent",
        type=float,
        nargs="+",
        default=list(DEFAULTS.cache_percent),
        metavar="P",
        help="expert cache, in percent of the store's codes (default: 0 25 50)",
    )
    settings.add_argument(
        "--seed", type=int, help="take windows from random places (default: fixed places)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises ValueError and StoreError, which the CLI turns into exit codes."""
    disable_progress_bar()
    settings = _settings(args)
    texts = read_texts(args.text)
    kept = None if args.rows is None else RowFile(args.rows)
    original = None
    with store_progress() as report:
        store = bundled_store(report) if args.store is None else folder(args.store)
        manifest = load_manifest(store)
        variants = list(_variants(args, store, manifest))
        if args.compare_original is not None:
            model = find_model(args.compare_original or manifest.model.name)
            original = original_store(model, report)
            variants = [Variant("original bf16", original), *variants]
    rows = list(evaluate(variants, texts, settings, original=original, rows=kept))
    print(json.dumps(as_json(rows, settings), indent=2) if args.json else as_text(rows, settings))
    return 0


def _settings(args: argparse.Namespace) -> EvalSettings:
    """What was asked for; defaults that do not fit what was asked for give way."""
    decode_tokens, warm_up, batch = args.decode_tokens, args.warm_up, args.batch
    if decode_tokens is None:
        decode_tokens = min(DEFAULTS.decode_tokens, args.window_tokens)
    if warm_up is None:
        warm_up = min(DEFAULTS.warm_up, decode_tokens // 2)
    if batch is None:
        batch = [size for size in DEFAULTS.batch if size <= args.windows] or [1]
    return EvalSettings(
        windows=args.windows,
        window_tokens=args.window_tokens,
        decode_tokens=decode_tokens,
        warm_up=warm_up,
        batch=tuple(batch),
        cache_percent=tuple(args.cache_percent),
        seed=args.seed,
    )


def _variants(args: argparse.Namespace, store: Path, manifest: Manifest) -> Iterator[Variant]:
    """A line for each combination of policies that was asked for."""
    variant = None
    for skip_below, rule in itertools.product(args.skip_below or [0.0], args.restore):
        for policy in _thresholds(args, rule, manifest):
            variant = Variant("", store, restore=rule, skip_below=skip_below, **policy)
            variant = dataclasses.replace(variant, label=label(manifest, variant))
            yield variant
    assert variant is not None, "argparse gives every option a value"
    if args.near_data:
        yield dataclasses.replace(variant, label=f"{variant.label}, near data", near_data=True)


def _thresholds(
    args: argparse.Namespace, rule: Restore, manifest: Manifest
) -> Iterator[dict[str, Any]]:
    """What a rule is told, line by line. Raises ValueError for a rule without its threshold."""
    top_k = manifest.model.top_k
    chosen = args.top_n or [manifest.recipe.top_n]
    for top_n in chosen:
        if not 0 <= top_n <= top_k:
            raise ValueError(f"--top-n: got {top_n}, expected 0 to {top_k}")
    if rule == "all":
        yield {"top_n": top_k}
    elif rule == "top_n":
        yield from ({"top_n": top_n} for top_n in chosen)
    elif rule == "random":
        for top_n, seed in itertools.product(chosen, args.restore_seed or [0]):
            yield {"top_n": top_n, "restore_seed": seed}
    else:
        name = f"restore_{rule}"
        for threshold in getattr(args, name) or [None]:
            if threshold is None:
                raise ValueError(f"--restore {rule}: give --{name.replace('_', '-')} too")
            yield {name: threshold}


def label(manifest: Manifest, variant: Variant) -> str:
    """How a line calls its experts."""
    recipe = manifest.recipe
    if recipe.is_original:
        text = "original bf16"
    elif variant.restore == "top_n" and variant.top_n == 0:
        text = f"{recipe.bits:g}-bit codes"
    else:
        text = f"{recipe.bits:g}-bit + compensators {_restored(variant)}"
    return text + (f", skip < {variant.skip_below:g}" if variant.skip_below else "")


def _restored(variant: Variant) -> str:
    if variant.restore == "top_n":
        return f"Top-{variant.top_n}"
    if variant.restore == "random":
        seed = f" (seed {variant.restore_seed})" if variant.restore_seed else ""
        return f"random {variant.top_n}{seed}"
    if variant.restore == "all":
        return "all"
    threshold = getattr(variant, f"restore_{variant.restore}")
    return f"{variant.restore} {threshold:g}"


def as_text(rows: list[EvalRow], settings: EvalSettings) -> str:
    """The tables and what they were measured with."""
    notes = [conditions(settings)]
    if any(row.text == BUILT_IN for row in rows):
        notes.append(BUILT_IN_NOTE)
    return "\n".join([tables(rows), "", *notes])


def as_json(rows: list[EvalRow], settings: EvalSettings) -> dict[str, Any]:
    """Settings and rows; bytes are per decoded token, errors of a single window null."""
    return {"settings": dataclasses.asdict(settings), "rows": [as_plain(row) for row in rows]}
