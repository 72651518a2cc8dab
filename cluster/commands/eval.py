"""`moetier eval`: quality and expert bytes moved per token, by text and kind of experts."""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from cluster.eval_lines import add_policies, variants_of
from cluster.eval_rows import EvalRow, RowFile, as_plain
from cluster.eval_settings import EvalSettings, Variant
from cluster.eval_tables import conditions, tables
from cluster.evaluate import evaluate
from cluster.models import find_model
from cluster.progress import store_progress
from cluster.stores import bundled_store, folder, original_store
from cluster.table import format_table
from cluster.texts import BUILT_IN, BUILT_IN_NOTE, read_texts
from expert_store.format import load_manifest

HELP = """Quality of a store on texts, and the expert bytes it moves per decoded token.

Without STORE, the bundled model's (made on first use). All is measured in this process, bytes by
the transport's counters: perplexity over windows of text, bytes while sequences decode side by side
with an expert cache of the stated size. "more nats" is the loss over the first line on the same
windows, with the standard error of that paired difference. With --compare-original, KL and "agree"
say how far a line's next-token distribution is from the original's. Policies that are given several
values make a line for each of them. With --tasks, lm_eval's tasks are run instead of texts."""

DEFAULTS = EvalSettings()
LM_EVAL_EXTRA = "moetier[lm-eval]"


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
    add_policies(parser)
    _add_settings(parser)
    _add_tasks(parser)
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="keep every row in this JSON-lines file, and do not measure again what it holds",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


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


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness", f"needs {LM_EVAL_EXTRA}")
    tasks.add_argument("--tasks", nargs="+", metavar="NAME", help="run these instead of texts")
    tasks.add_argument(
        "--task-folder", type=Path, metavar="DIR", help="task files (YAML) of your own"
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="samples of each task (default: all)")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="(default: what a task says)")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises ValueError and StoreError, which the CLI turns into exit codes."""
    disable_progress_bar()
    if args.tasks:
        _check_lm_eval()
    settings = _settings(args)
    texts = read_texts(args.text)
    kept = None if args.rows is None else RowFile(args.rows)
    original = None
    with store_progress() as report:
        store = bundled_store(report) if args.store is None else folder(args.store)
        manifest = load_manifest(store)
        variants = list(variants_of(args, store, manifest))
        if args.compare_original is not None:
            model = find_model(args.compare_original or manifest.model.name)
            original = original_store(model, report)
            variants = [Variant("original bf16", original), *variants]
    if args.tasks:
        return _run_tasks(args, variants)
    rows = list(evaluate(variants, texts, settings, original=original, rows=kept))
    print(json.dumps(as_json(rows, settings), indent=2) if args.json else as_text(rows, settings))
    return 0


def _check_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise ValueError(f"--tasks: lm_eval is not installed; pip install '{LM_EVAL_EXTRA}'")


def _run_tasks(args: argparse.Namespace, variants: list[Variant]) -> int:
    # The one import that only some can do: the package is optional and large.
    from cluster.lm_eval_model import evaluate_tasks

    scores = evaluate_tasks(
        variants,
        args.tasks,
        folder=args.task_folder,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
    )
    found = [dataclasses.asdict(score) for score in scores]
    print(json.dumps({"scores": found}, indent=2) if args.json else format_table(found))
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


def as_text(rows: list[EvalRow], settings: EvalSettings) -> str:
    """The tables and what they were measured with."""
    notes = [conditions(settings)]
    if any(row.text == BUILT_IN for row in rows):
        notes.append(BUILT_IN_NOTE)
    return "\n".join([tables(rows), "", *notes])


def as_json(rows: list[EvalRow], settings: EvalSettings) -> dict[str, Any]:
    """Settings and rows; bytes are per decoded token, errors of a single window null."""
    return {"settings": dataclasses.asdict(settings), "rows": [as_plain(row) for row in rows]}
