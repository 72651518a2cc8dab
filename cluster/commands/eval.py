"""`moetier eval`: perplexity and expert bytes moved per token, by text and kind of experts."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from cluster.evaluate import EvalRow, EvalSettings, Variant, as_cells, conditions, evaluate
from cluster.models import find_model
from cluster.progress import store_progress
from cluster.stores import bundled_store, folder, original_store
from cluster.table import format_table
from cluster.texts import BUILT_IN, BUILT_IN_NOTE, read_texts
from expert_store.format import load_manifest
from expert_store.types import Manifest

HELP = """Perplexity of a store on texts, and the expert bytes it moves per decoded token.

Without STORE, the bundled model's (made on first use). All is measured in this process, bytes by
the transport's counters: perplexity over windows of text, bytes while several sequences decode side
by side with an expert cache of the stated size. "more nats" is the loss over the first line on the
same windows, with the standard error of that paired difference."""

DEFAULTS = EvalSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder of a store")
    parser.add_argument(
        "--text",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help=f"a text file or a folder of *.txt; repeatable (default: {BUILT_IN}, inside CPython)",
    )
    parser.add_argument(
        "--compare-original",
        nargs="?",
        const="",
        metavar="MODEL",
        help="first measure the original bf16 experts of MODEL (folder or Hub id; without a value, "
        "the model the store was made of); keeps a copy as large as the model in the cache folder",
    )
    parser.add_argument(
        "--top-n",
        type=int,
        action="append",
        metavar="N",
        help="experts per token that get their compensator; give it again for more lines "
        "(default: what the store says)",
    )
    parser.add_argument(
        "--near-data", action="store_true", help="one more line, with a near-data worker"
    )
    _add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    def number(flag: str, help_text: str, kind: type = int) -> None:
        default = getattr(DEFAULTS, flag.replace("-", "_"))
        parser.add_argument(
            f"--{flag}",
            type=kind,
            default=default,
            metavar="N",
            help=f"{help_text} (default: {default})",
        )

    number("windows", "windows of a text for the perplexity")
    number("window-tokens", "predicted tokens of a window")
    number("decode-tokens", "tokens that each sequence decodes while bytes are counted")
    number("warm-up", "first decode steps that only fill the cache")
    number("batch", "sequences that decode side by side")
    number("cache-percent", "expert cache, in percent of the store's codes", float)
    parser.add_argument(
        "--seed", type=int, help="take windows from random places (default: fixed places)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises ValueError and StoreError, which the CLI turns into exit codes."""
    disable_progress_bar()
    settings = EvalSettings(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(EvalSettings)}
    )
    texts = read_texts(args.text)
    with store_progress() as report:
        store = bundled_store(report) if args.store is None else folder(args.store)
        manifest = load_manifest(store)
        variants = _variants(args, store, manifest)
        if args.compare_original is not None:
            model = find_model(args.compare_original or manifest.model.name)
            variants = [Variant("original bf16", original_store(model, report)), *variants]
    rows = list(evaluate(variants, texts, settings))
    if args.json:
        print(json.dumps(as_json(rows, settings), indent=2))
    else:
        print(as_text(rows, settings))
    return 0


def _variants(args: argparse.Namespace, store: Path, manifest: Manifest) -> list[Variant]:
    chosen = args.top_n or [manifest.recipe.top_n]
    for top_n in chosen:
        if not 0 <= top_n <= manifest.model.top_k:
            raise ValueError(f"--top-n: got {top_n}, expected 0 to {manifest.model.top_k}")
    variants = [Variant(label(manifest, top_n), store, top_n) for top_n in chosen]
    if args.near_data:
        last = variants[-1]
        near = dataclasses.replace(last, label=f"{last.label}, near data", near_data=True)
        variants.append(near)
    return variants


def label(manifest: Manifest, top_n: int) -> str:
    """How a line calls its experts."""
    if manifest.recipe.is_original:
        return "original bf16"
    if top_n == 0:
        return f"{manifest.recipe.bits:g}-bit codes"
    return f"{manifest.recipe.bits:g}-bit + compensators Top-{top_n}"


def as_text(rows: list[EvalRow], settings: EvalSettings) -> str:
    """The table and what it was measured with."""
    notes = [conditions(settings)]
    if any(row.text == BUILT_IN for row in rows):
        notes.append(BUILT_IN_NOTE)
    return "\n".join([format_table([as_cells(row) for row in rows]), "", *notes])


def as_json(rows: list[EvalRow], settings: EvalSettings) -> dict[str, Any]:
    """Settings and rows; bytes are per decoded token. The error of a single window is null."""

    def plain(row: EvalRow) -> dict[str, Any]:
        values = dataclasses.asdict(row)
        del values["window_nats"]
        is_nan = {name for name, value in values.items() if value != value}
        return {name: None if name in is_nan else value for name, value in values.items()}

    return {"settings": dataclasses.asdict(settings), "rows": [plain(row) for row in rows]}
