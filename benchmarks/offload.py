"""Experts over a bounded link: original, static, compensated, ours, near data; one table.

`python -m benchmarks.offload` makes two hosts of this machine (network namespaces, root needed):
a memory node that holds the experts and a GPU node, here one CPU core, that runs the model. It
measures every contestant over links of 0.25, 1 and 4 Gbit/s, in turns, and writes
benchmarks/results/offload-MODEL.md and .csv. The gate comes before the links and the rivals' own
before the rivals; what a red one guards is not written.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.offload_parts.beside import measure_beside
from benchmarks.offload_parts.contestants import RESIDENT, chosen
from benchmarks.offload_parts.hosts import HostsUnavailable, TwoHosts
from benchmarks.offload_parts.quality import Judging, judge_all
from benchmarks.offload_parts.report import Conditions, write
from benchmarks.offload_parts.rows import Repetition
from benchmarks.offload_parts.stage import GateIsRed, Plan, Stage
from benchmarks.offload_parts.stores import Stores
from benchmarks.offload_parts.work import WorkSizes, sizes_for, works
from cluster.eval_settings import EvalSettings
from cluster.models import find_model
from cluster.stores import original_store
from cluster.texts import read_texts
from expert_store.format import load_manifest

HELD_OUT = Path(__file__).resolve().parents[2] / "shared" / "mini" / "eval"
LINKS = (0.25, 1.0, 4.0)
REPETITIONS = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are removed
    disable_progress_bar()
    try:
        return run(args)
    except GateIsRed as error:
        print(f"offload: a gate is red, so there are no numbers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("offload: stopped; both hosts are removed", file=sys.stderr)
        return 130
    except (HostsUnavailable, ValueError) as error:
        print(f"offload: {error}", file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="mixtral-mini", help="mixtral-mini, smol-moe, a folder")
    parser.add_argument("--calibration", type=Path, help="folder of `moetier calibrate`")
    parser.add_argument("--text", type=Path, action="append", default=[], help="text or folder")
    parser.add_argument(
        "--links", type=float, nargs="+", metavar="GBIT", help="rates (default: 0.25, 1, 4)"
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=[],
        metavar="KEY,...",
        help="beginnings of contestants' keys: a, b, c, d, e, s, f, g",
    )
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--windows", type=int, default=16, help="of each text, for perplexity")
    parser.add_argument("--steps", type=int, help="decoding steps of a lone text")
    parser.add_argument("--no-rivals", action="store_true", help="leave out what needs no link")
    parser.add_argument("--out", type=Path, help="folder of the page (default: results/)")


def run(args: argparse.Namespace) -> int:
    contestants = chosen(args.only)
    model = find_model(args.model)
    original = original_store(model)
    name = load_manifest(original).model.name
    held_out = not args.text and HELD_OUT.is_dir()
    texts = read_texts([HELD_OUT] if held_out else args.text)
    settings = EvalSettings(
        windows=args.windows,
        window_tokens=128,
        decode_tokens=2,
        warm_up=0,
        batch=(1,),
        cache_percent=(0.0,),
    )
    judging = Judging(name, texts, settings, original)
    stores = Stores(model, args.calibration, judging.bits_moved)
    folders = stores.make(item.store for item in contestants)
    more = [item.cache_of for item in contestants if item.cache_of is not None]
    more += [] if args.no_rivals else [item.store for item in RESIDENT]
    others = stores.make(more)
    say(f"{len(contestants)} contestants of {name}; stores are there")
    judged = judge_all(judging, contestants, folders)
    for quality, one in judged.items():
        say(f"{quality!s:40} perplexity {one.perplexity:.2f}, {one.bits_moved:.2f} bits moved")
    sizes = sizes_for(load_manifest(original))
    links = args.links or (LINKS if sizes == WorkSizes() else LINKS[-1:])
    sizes = replace(sizes, steps=args.steps or sizes.steps)
    tokenizer = AutoTokenizer.from_pretrained(original, local_files_only=True)
    turns = works(tokenizer, texts, args.repetitions, sizes)
    plan = Plan(contestants, folders | others)
    repetitions: list[Repetition] = []
    load = os.getloadavg()[0]
    with TwoHosts() as hosts:
        names = [text.name for text in texts]
        conditions = Conditions(name, names, settings, sizes, hosts.cores, load)
        stage = Stage(hosts, plan, say)
        stage.gate(turns[0], max(links))
        for link in links:
            repetitions += stage.measure(link, turns)
            # After each link: what was measured is kept when the run is stopped.
            paths = write(args.out, conditions, contestants, repetitions, judged, None)
        if not args.no_rivals:
            with tempfile.TemporaryDirectory(prefix="moetier-offload-") as scratch:
                beside = measure_beside(hosts, stage, model, original, turns, Path(scratch), say)
            paths = write(args.out, conditions, contestants, repetitions, judged, beside)
    say(f"wrote {' and '.join(str(path) for path in paths)}")
    return 0


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
