"""`moetier verify`: every checksum of a store, and the name of whatever is damaged."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from tqdm import tqdm

from cluster.progress import store_progress
from cluster.stores import bundled_store, folder
from expert_store.verify import Verification, verify

HELP = """Check every checksum of a store: records, dense and tokenizer files, config, manifest.

Without STORE, the bundled model's (made on first use). Names store, file, layer and expert of
whatever is damaged, with what was expected and what was found. Exit code 0 when the store is whole,
1 when anything is damaged."""

_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder of a store")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print what is damaged. Raises StoreFormatError when the manifest cannot be read."""
    with store_progress() as report:
        store = bundled_store(report) if args.store is None else folder(args.store)
    with tqdm(desc="verify", unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = verify(store, show)
    print(json.dumps(as_json(result), indent=2) if args.json else as_text(result))
    return 1 if result.damage else 0


def as_json(result: Verification) -> dict[str, Any]:
    """The result as plain values."""
    return {
        "store": str(result.store),
        "version": result.version,
        "num_records": result.num_records,
        "num_files": result.num_files,
        "num_bytes": result.num_bytes,
        "damage": [
            dataclasses.asdict(item) | {"key": item.key and item.key._asdict()}
            for item in result.damage
        ],
    }


def as_text(result: Verification) -> str:
    checked = (
        f"{result.num_records} records in {result.num_files} files, "
        f"{result.num_bytes / _MIB:,.2f} MiB"
    )
    if not result.damage:
        return f"{result.store}: whole: {checked}"
    lines = [f"{result.store}: damaged: {item}" for item in result.damage]
    lines.append(
        f"{len(result.damage)} damaged of {checked}: copy the named files again, or compress the "
        "model again with --force"
    )
    return "\n".join(lines)
