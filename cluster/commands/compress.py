"""`moetier compress`: a checkpoint to a store, with a progress bar."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from cluster.commands.inspect import as_json, as_text
from cluster.environment import cache_folder
from cluster.models import find_model
from cluster.stores import folder
from expert_store.compress import Progress, compress
from expert_store.config import DEFAULT_RECIPE, RECIPES, CompressionConfig
from expert_store.inspect import summarize
from expert_store.layer_codecs import LayerCodec
from expert_store.methods import METHODS, Methods, Quantizer
from expert_store.sources import DEFAULT_MODEL

QUANTIZERS = ("hqq", "rtn", "grid")

HELP = """Turn a checkpoint into a store: low-bit experts, each with a small compensator.

MODEL is a folder with config.json and *.safetensors, a Hugging Face Hub id (downloaded),
mixtral-mini, the bundled model, or smol-moe after `make smol`. An interrupted run goes on where it
stopped when the same command is given again; STORE counts as a store only when all of it is
written. Peak memory is a few experts per job. Exit code 1 for an unusable checkpoint or a full
disk, 2 for a wrong argument."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="default: %(default)s"
    )
    parser.add_argument("store", metavar="STORE", help="folder to write, new or empty")
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        metavar="|".join(RECIPES),
        help="fast: codes and compensators under --budget, better with --calibration; best: the "
        "same with error feedback, slower, only with --calibration; "
        "paper: as in arXiv 2512.17073; static, mixed: codes only, of one width or several; milo: "
        "codes and factors in turn; sz3, cuszp: error-bounded; original: bf16 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="B",
        help="bits per expert weight that a token moves, compensators of its Top-n included, for "
        "fast (default: 4), best and mixed (default: 3)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="what `moetier calibrate` wrote for this model; best needs it",
    )
    parser.add_argument(
        "--prior",
        type=Path,
        metavar="FILE",
        help="prior.json of `moetier study`, for best, fast and mixed: how much each layer matters "
        "where the calibration has not measured it",
    )
    _add_codecs(parser)
    parser.add_argument(
        "--quantizer",
        metavar="|".join(QUANTIZERS),
        help="another quantiser for static or mixed (default: hqq)",
    )
    parser.add_argument("--bits", type=int, help="bits of a code: 2, 3 or 4 (default: 2)")
    parser.add_argument(
        "--avg-rank",
        type=int,
        metavar="R",
        help="mean compensator rank over all experts; high-kurtosis experts get more, none so much "
        "that one more bit would be cheaper (default: 16)",
    )
    parser.add_argument(
        "--top-n",
        type=int,
        metavar="N",
        help="experts per token to restore at run time, unless told otherwise then (default: 1)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=64,
        metavar="G",
        help="inputs of the codes that share a scale, a multiple of 32 that divides the experts' "
        "sizes; best has 64 alone (default: 64)",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="J", help="experts at a time (default: one per core)"
    )
    parser.add_argument("--force", action="store_true", help="replace a finished store")
    parser.add_argument(
        "--json", action="store_true", help="print what `moetier inspect --json` prints"
    )


def _add_codecs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--error-bound",
        metavar="MODE:VALUE",
        help="of sz3 and cuszp: row:0.1 is 0.1 of the rms of a weight's row; also group, absolute",
    )
    parser.add_argument(
        "--layer-codec",
        action="append",
        default=[],
        type=LayerCodec.parse,
        metavar="LAYERS:CODEC:MODE:VALUE",
        help="store these layers error-bounded, such as 0-3:cuszp:row:0.1; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Compress and print a summary. Raises ValueError and StoreError, which the CLI prints."""
    config = CompressionConfig(
        methods=_methods(args.recipe, args.quantizer),
        budget=args.budget,
        calibration=args.calibration,
        prior=args.prior,
        error_bound=args.error_bound,
        layer_codecs=tuple(args.layer_codec),
        recipe=args.recipe,
        bits=args.bits,
        avg_rank=args.avg_rank,
        top_n=args.top_n,
        group_size=args.group_size,
    )
    store = folder(args.store)
    model = find_model(args.model)
    started = time.monotonic()
    with _Bar() as bar:
        compress(
            model,
            store,
            config,
            progress=bar.show,
            jobs=args.jobs,
            force=args.force,
            curves=cache_folder() / "curves",
        )
    summary = summarize(store)
    if args.json:
        print(json.dumps(as_json(summary), indent=2))
    else:
        print(as_text(summary))
        print(f"\nwritten in {time.monotonic() - started:.1f} s to {store}")
    return 0


def _methods(recipe: str, quantizer: str | None) -> Methods | None:
    """The recipe's methods with another quantiser; None to leave them as they are."""
    if quantizer is None:
        return None
    if quantizer not in QUANTIZERS:
        raise ValueError(f"--quantizer: got {quantizer!r}, expected one of {', '.join(QUANTIZERS)}")
    if recipe not in ("static", "mixed"):
        raise ValueError(f"--quantizer: recipe {recipe!r} has its own; use static or mixed")
    known = next(name for name in get_args(Quantizer) if name == quantizer)
    return replace(METHODS[recipe], quantizer=known)


class _Bar:
    """tqdm on stderr, one bar per stage; silent where stderr is no terminal."""

    def __enter__(self) -> _Bar:
        self._stage, self._bar = "", tqdm(disable=True)
        return self

    def show(self, progress: Progress) -> None:
        if progress.stage != self._stage:
            self._bar.close()
            self._stage = progress.stage
            # disable=None: tqdm's word for "only on a terminal". It shows the time that remains.
            self._bar = tqdm(
                total=progress.total,
                desc=progress.stage,
                unit="expert",
                file=sys.stderr,
                disable=None,
            )
        self._bar.update(progress.done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
