"""`moetier replay`: what expert caches find on a recorded trace, against Belady's optimum."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from cluster.cache_replay import BOUND, POLICIES, WHOLE, Played, ReplayRow, replay_rows
from cluster.progress import store_progress
from cluster.stores import bundled_store, folder
from cluster.table import format_table
from expert_store.format import load_manifest
from gpu_worker.expert_cache import CacheBudgets
from gpu_worker.trace import side_by_side
from gpu_worker.trace_file import load_trace

HELP = f"""Play a trace of `moetier trace` through the worker's expert cache, under its policies
and budgets, and say what share of the bytes that were asked for was on the device. No byte is read
and nothing computed: sizes come from STORE's manifest (without it, the bundled model's), and any
store of the traced model will do. The same trace gives the same table.

{BOUND} is the most that any cache could find, keeping records in part by what is asked for again
soonest; {WHOLE} does so with whole records. Nobody serves with either: they know the future."""

DEFAULT_PERCENT = (12.5, 25.0, 50.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, metavar="TRACE", help="file of `moetier trace`")
    parser.add_argument("--store", metavar="STORE", help="folder of a store of the traced model")
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="play a trace of texts N sequences at a time (default: as recorded)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--cache-bytes", type=int, nargs="+", metavar="N", help="bytes of the cache")
    size.add_argument(
        "--cache-percent",
        type=float,
        nargs="+",
        default=list(DEFAULT_PERCENT),
        metavar="P",
        help="the cache in percent of all records of the store (default: 12.5 25 50)",
    )
    parser.add_argument(
        "--factor-cache-share",
        type=float,
        nargs="+",
        metavar="S",
        help="part of the cache that compensators have for themselves, 0 to 1 (default: codes and "
        "compensators compete for all of it)",
    )
    parser.add_argument(
        "--factor-share",
        type=float,
        default=1.0,
        metavar="S",
        help="how much of each compensator is fetched, 0 to 1 (default: 1)",
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=POLICIES,
        default=list(POLICIES),
        metavar="NAME",
        help=f"some of {', '.join(POLICIES)} (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Replay and print. Raises ValueError and StoreError, which the CLI turns into exit codes."""
    if not 0 <= args.factor_share <= 1:
        raise ValueError(f"--factor-share: got {args.factor_share}, expected 0 to 1")
    trace = load_trace(args.trace)
    if args.batch is not None:
        trace = side_by_side(trace, args.batch)
    with store_progress() as report:
        store = bundled_store(report) if args.store is None else folder(args.store)
    played = Played.of(trace, load_manifest(store), args.factor_share)
    rows = list(replay_rows(played, budgets_of(args, played.store_bytes), args.policies))
    if args.json:
        plain = [dataclasses.asdict(row) for row in rows]
        print(
            json.dumps({"trace": str(args.trace), "origin": trace.origin, "rows": plain}, indent=2)
        )
    else:
        print(
            f"{trace.model.name}, {trace.num_steps:,} steps, {trace.num_rows:,} tokens: "
            f"{trace.origin}\n"
        )
        print(as_text(rows))
    return 0


def budgets_of(args: argparse.Namespace, store_bytes: int) -> list[CacheBudgets]:
    """Every size with every share."""
    sizes = args.cache_bytes
    if sizes is None:
        for percent in args.cache_percent:
            if not 0 <= percent <= 100:
                raise ValueError(f"--cache-percent: got {percent}, expected 0 to 100")
        sizes = [int(store_bytes * percent / 100) for percent in args.cache_percent]
    shares = args.factor_cache_share or [None]
    return [CacheBudgets(size, share) for size in sizes for share in shares]


def as_text(rows: Sequence[ReplayRow]) -> str:
    """One line per row; hit rates in percent of the bytes asked for."""
    return format_table(
        [
            {
                "cache MB": f"{row.cache_bytes / 1e6:.2f}",
                "% of store": f"{100 * row.cache_share:.3g}",
                "for factors": "-" if row.factor_share is None else f"{row.factor_share:g}",
                "policy": row.policy,
                "codes found %": f"{100 * row.codes_found:.1f}",
                "factors found %": f"{100 * row.factors_found:.1f}",
                "bytes found %": f"{100 * row.found:.1f}",
                "of the bound %": f"{100 * row.of_bound:.1f}",
                "hits": row.codes_hits + row.factors_hits,
                "misses": row.misses,
                "KB/token moved": f"{row.moved_bytes_per_token / 1e3:.1f}",
            }
            for row in rows
        ]
    )
