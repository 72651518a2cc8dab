"""`moetier trace`: records where the tokens of a real run go, for `moetier replay`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from cluster.commands.generate import check_unicode
from cluster.progress import store_progress
from cluster.stores import bundled_store, folder
from cluster.texts import BUILT_IN, read_texts
from cluster.tracing import TraceSettings, trace_prompts, trace_texts
from gpu_worker.config import WorkerConfig
from gpu_worker.trace_file import save_trace

HELP = """Run a store's model and record, for every step and MoE layer, which experts each token
went to, with what router weight, and which of them were restored. By default it reads texts, a
token of each of --batch sequences per step, the next token always that of the text; with --prompt
it answers with the engine that serves. Without STORE, the bundled model's (made on first use).
`moetier replay` then says what expert caches would have found. The file's format is a spec in
gpu_worker/trace_file.py."""

DEFAULTS = TraceSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder of a store")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--text",
        action="extend",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help=f"text files or folders of *.txt (default: {BUILT_IN}, inside CPython)",
    )
    what.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to answer; repeatable"
    )
    for name, kind, meaning in (
        ("batch", int, "sequences side by side"),
        ("tokens", int, "tokens that each sequence decodes"),
        ("groups", int, "batches of texts, one after another"),
        ("temperature", float, "of answers; 0 is greedy"),
        ("seed", int, "of answers"),
    ):
        default = getattr(DEFAULTS, name)
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument(
        "--top-n",
        type=int,
        metavar="N",
        help="experts per token that get their compensator (default: what the store says)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run, record, write. Raises ValueError and StoreError, which the CLI turns into exit codes."""
    disable_progress_bar()
    settings = TraceSettings(args.batch, args.tokens, args.groups, args.temperature, args.seed)
    for prompt in args.prompt:
        check_unicode("--prompt", prompt)
        if not prompt:
            raise ValueError("--prompt: got an empty text, expected something to answer")
    if args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a folder, expected a file to write")
    texts = [] if args.prompt else read_texts(args.text)
    with store_progress() as report:
        store = bundled_store(report) if args.store is None else folder(args.store)
    config = WorkerConfig(top_n=args.top_n)
    # disable=None: tqdm's word for "only on a terminal".
    with tqdm(desc="trace", unit="step", file=sys.stderr, disable=None, leave=False) as bar:

        def show(num_steps: int) -> None:
            bar.update(num_steps)

        if args.prompt:
            trace = trace_prompts(store, args.prompt, settings, config, show)
        else:
            trace = trace_texts(store, texts, settings, config, show)
    save_trace(args.out, trace)
    told = {
        "file": str(args.out),
        "bytes": args.out.stat().st_size,
        "model": trace.model.name,
        "layers": len(trace.layers),
        "steps": trace.num_steps,
        "rows": trace.num_rows,
        "origin": trace.origin,
    }
    if args.json:
        print(json.dumps(told, indent=2))
    else:
        print(
            f"{args.out}: {trace.num_steps:,} steps, {trace.num_rows:,} tokens, "
            f"{len(trace.layers)} layers of {trace.model.name}; {trace.origin}"
        )
    return 0
