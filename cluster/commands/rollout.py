"""`moetier rollout`: another store for a running cluster, and back."""

from __future__ import annotations

import argparse
import sys

from cluster.rollout import Rolled, roll_back, roll_out, serve_file
from cluster.stores import folder

HELP = """Serve another store, or another version of it, on a cluster that `moetier serve` started.

GPU workers are replaced one after another; each ends the requests it has (replicas.drain_s), and no
request sees two versions. With a single worker requests wait until its successor is up, unless
replicas.max_surge_percent lets that start first. The tiers of both stores run meanwhile. Nothing is
changed unless every checksum of STORE is right and its model has the same name; if its workers do
not come up, the store before is served again.

--back returns to the store before, without reading its records; --back again undoes that. For an
application from a Serve config file (KubeRay) --print tells what to put there; taking it out again
is the way back.

Exit codes: 0 when all workers serve the store, 1 when it did not come up or is damaged, 2 for what
cannot be rolled out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder of the store to serve")
    parser.add_argument("--back", action="store_true", help="return to the store before")
    parser.add_argument("--force", action="store_true", help="allow a model of another name")
    parser.add_argument(
        "--print",
        action="store_true",
        dest="only_print",
        help="change nothing: print the section of a Serve config file that rolls out STORE",
    )
    parser.add_argument(
        "--address",
        default="auto",
        metavar="HOST:PORT",
        help="the Ray cluster; the default auto finds the one on this machine",
    )


def run(args: argparse.Namespace) -> int:
    """Roll and tell. Raises ValueError for options that do not go together."""
    if (args.store is None) != args.back:
        raise ValueError("STORE: give either the folder of a store or --back")
    if args.back and (args.force or args.only_print):
        raise ValueError("--back: goes with --address alone")
    if args.back:
        print(as_text(roll_back(args.address, _tell)))
        return 0
    store = folder(args.store)
    if args.only_print:
        print(serve_file(args.address, store, force=args.force), end="")
        return 0
    print(as_text(roll_out(args.address, store, force=args.force, tell=_tell)))
    return 0


def as_text(rolled: Rolled) -> str:
    """What came of it, in a line."""
    return (
        f"serving {rolled.store}, version {rolled.version[:12]}, on {rolled.num_workers} workers "
        f"after {rolled.elapsed_s:.0f} s (moetier rollout --back returns to the store before)"
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
