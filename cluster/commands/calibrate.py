"""`moetier calibrate`: what the experts of a model see while it reads text."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from cluster.calibrate import CalibrationSettings, calibrate, check_new
from cluster.docstrings import CALIBRATION_TEXT, built_in_calibration_text
from cluster.progress import store_progress
from cluster.table import counted, format_table
from cluster.texts import read_texts
from expert_store.calibration import FEW_TOKENS, Calibration
from expert_store.sources import DEFAULT_MODEL, resolve_model

HELP = """Collect what the experts of a model see while it reads text, for `moetier compress`.

The original model reads the text in this process. OUT becomes a folder with second moments of every
expert's inputs, what an error in each of its outputs costs, how often and with what weight the
router chooses it, and how many nats an error in each layer costs. Every token counts by what an
error there costs: gradients tell, for words that the model itself would have said. Experts that saw
few tokens lean on what their layer saw. Use text like what the model will serve, and other text
than you evaluate on: otherwise the evaluation flatters the compressed model. The built-in text
(docstrings of Python's library) shares none with the built-in evaluation text. Keeps a copy as
large as the model in the cache folder. Exit code 1 for an unusable checkpoint or a full
disk, 2 for a wrong argument."""

DEFAULTS = CalibrationSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"checkpoint folder, Hugging Face Hub id, or {DEFAULT_MODEL}, the bundled model",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="PATH",
        help=f"text files or folders of *.txt; repeatable (default: {CALIBRATION_TEXT}, built in)",
    )
    for name, text in (
        ("tokens", "tokens to read, shared among the texts"),
        ("window-tokens", "tokens that are read together"),
        ("seed", "places windows and draws words"),
    ):
        default = getattr(DEFAULTS, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--alike", action="store_true", help="count every token the same in what an expert sees"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Calibrate and print a summary. Raises ValueError and StoreError, which the CLI prints."""
    disable_progress_bar()
    if not args.out:
        raise ValueError("OUT: got an empty path, expected a folder to write")
    settings = CalibrationSettings(
        tokens=args.tokens,
        window_tokens=args.window_tokens,
        seed=args.seed,
        alike=args.alike,
    )
    check_new(Path(args.out))
    texts = read_texts(args.text) if args.text else [built_in_calibration_text()]
    model = resolve_model(args.model)
    started = time.monotonic()
    with store_progress() as report, _Bar() as bar:
        calibration = calibrate(
            model, Path(args.out), texts, settings, report=report, progress=bar.show
        )
    seconds = time.monotonic() - started
    if args.json:
        print(json.dumps(as_json(calibration, seconds), indent=2))
    else:
        print(as_text(calibration, seconds))
    return 0


class _Bar:
    """tqdm on stderr; silent where stderr is no terminal."""

    def __enter__(self) -> _Bar:
        self._bar = tqdm(disable=True)
        return self

    def show(self, done: int, total: int) -> None:
        if self._bar.total != total:
            # disable=None: tqdm's word for "only on a terminal". It shows the time that remains.
            self._bar = tqdm(
                total=total, desc="calibrate", unit="token", file=sys.stderr, disable=None
            )
        self._bar.update(done)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def as_text(calibration: Calibration, seconds: float) -> str:
    """What was read, who saw too little, a line per layer, and where it lies."""
    info = calibration.info
    read = f"{info.num_tokens:,} tokens of {counted(len(info.texts), 'text')}"
    asked = ""
    if info.num_tokens < info.asked_tokens:
        asked = f" (asked for {info.asked_tokens:,}: the text has no more)"
    lines = [
        f"calibration of {info.model.name}: {read} in windows of {info.window_tokens}, "
        f"seed {info.seed}{asked}",
        *(f"  {text.name}: {text.num_tokens:,} tokens" for text in info.texts),
        _few(calibration),
        "",
        format_table(_rows(calibration)),
        "",
        "router weight: mean share of a token's largest, second, ... weight; nats: KL per token at",
        "a relative energy of 1 of small errors in the layer's output. Evaluate on other text.",
        "",
        f"id {calibration.id[:12]}: {_num_bytes(calibration) / 1e6:,.1f} MB in {seconds:.1f} s to "
        f"{calibration.folder}",
    ]
    return "\n".join(lines)


def _few(calibration: Calibration) -> str:
    counts = [count for table in calibration.info.tables.values() for count in table.tokens_E]
    few = sum(count < FEW_TOKENS for count in counts)
    if not few:
        return f"each of {len(counts)} experts saw at least {FEW_TOKENS} tokens"
    return (
        f"{few} of {len(counts)} experts saw fewer than {FEW_TOKENS} tokens, "
        f"{sum(count == 0 for count in counts)} of them none: their statistics lean on what their "
        "layers saw; more --tokens would help"
    )


def _rows(calibration: Calibration) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "tokens per expert": f"{min(table.tokens_E):,} to {max(table.tokens_E):,}, median "
            f"{statistics.median(table.tokens_E):,.0f}",
            "router weight": " ".join(f"{share:.2f}" for share in table.skew_K),
            "nats": calibration.layer_sensitivity.get(layer),
        }
        for layer, table in calibration.info.tables.items()
    ]


def _num_bytes(calibration: Calibration) -> int:
    return sum(file.stat().st_size for file in calibration.folder.iterdir())


def as_json(calibration: Calibration, seconds: float) -> dict[str, Any]:
    """The same for programs."""
    info = calibration.info
    counts = [count for table in info.tables.values() for count in table.tokens_E]
    return {
        "id": calibration.id,
        "folder": str(calibration.folder),
        "model": info.model.name,
        "num_tokens": info.num_tokens,
        "asked_tokens": info.asked_tokens,
        "texts": {text.name: text.num_tokens for text in info.texts},
        "num_experts": len(counts),
        "experts_with_few_tokens": sum(count < FEW_TOKENS for count in counts),
        "experts_without_tokens": sum(count == 0 for count in counts),
        "num_bytes": _num_bytes(calibration),
        "seconds": seconds,
        "layers": [
            {
                "layer": layer,
                "tokens": list(table.tokens_E),
                "skew": list(table.skew_K),
                "sensitivity": calibration.layer_sensitivity.get(layer),
            }
            for layer, table in info.tables.items()
        ],
    }
