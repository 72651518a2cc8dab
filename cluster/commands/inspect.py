"""`moetier inspect`: what a store holds, as tables or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.progress import store_progress
from cluster.stores import bundled_store, folder
from cluster.table import format_table
from expert_store.inspect import StoreSummary, summarize
from expert_store.types import Recipe
from kernels.types import GROUP_SIZE

HELP = """Print what a store holds: sizes, bits, grids, blocks, kurtosis, errors, bytes per token.

Without STORE, the bundled model's (made on first use). Reads the manifest only; `moetier verify`
reads the records. Bytes per token are what one token moves at batch 1 with nothing cached:
layers x (k x codes + n x mean factors). Exit code 1 when STORE is no store."""

_BAR_WIDTH = 40
_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder of a store")
    parser.add_argument("--json", action="store_true", help="print one JSON object, bytes as bytes")


def run(args: argparse.Namespace) -> int:
    """Print the summary. Raises StoreFormatError when the folder is no store."""
    with store_progress() as report:
        store = bundled_store(report) if args.store is None else folder(args.store)
    summary = summarize(store)
    print(json.dumps(as_json(summary), indent=2) if args.json else as_text(summary))
    return 0


def as_json(summary: StoreSummary) -> dict[str, Any]:
    """The summary as plain values; sizes in bytes."""
    manifest = summary.manifest
    return {
        "store": str(summary.store),
        "version": manifest.version,
        "format_version": manifest.format_version,
        "recipe": dataclasses.asdict(manifest.recipe),
        "model": {
            "name": manifest.model.name,
            "model_type": manifest.model.model_type,
            "num_layers": manifest.model.num_layers,
            "top_k": manifest.model.top_k,
            "expert": dataclasses.asdict(manifest.model.expert),
        },
        "num_experts": len(manifest.experts),
        "codes_bytes": summary.codes_bytes,
        "factors_bytes": summary.factors_bytes,
        "dense_bytes": summary.dense_bytes,
        "original_expert_bytes": summary.original_expert_bytes,
        "code_bits_per_weight": summary.code_bits_per_weight,
        "expert_bits_per_weight": summary.expert_bits_per_weight,
        "ranks": {str(rank): count for rank, count in summary.ranks.items()},
        "bytes_per_token": summary.bytes_per_token,
        "original_bytes_per_token": summary.original_bytes_per_token,
        "layers": [dataclasses.asdict(layer) for layer in summary.layers],
    }


def as_text(summary: StoreSummary) -> str:
    head = [{"store": name, "": value} for name, value in _head(summary)]
    layers = [
        {
            "layer": layer.layer,
            "experts": layer.num_experts,
            "bits": layer.bits,
            "matrices": counts(layer.matrices),
            "mean rank": layer.rank,
            "blocks": counts(layer.blocks),
            "kurtosis": layer.kurtosis,
            "error": layer.error,
            "restored": layer.restored_error,
            "codes": _size(layer.codes_bytes),
            "factors": _size(layer.factors_bytes),
        }
        for layer in summary.layers
    ]
    return "\n\n".join([format_table(head), _histogram(summary.ranks), format_table(layers)])


def _head(summary: StoreSummary) -> list[tuple[str, str]]:
    manifest = summary.manifest
    model, recipe = manifest.model, manifest.recipe
    shape = model.expert
    experts = summary.codes_bytes + summary.factors_bytes
    rows = [
        ("folder", str(summary.store)),
        ("version", manifest.version[:16]),
        ("model", f"{model.name} ({model.model_type})"),
        (
            "experts",
            f"{len(manifest.experts)} in {len(summary.layers)} layers, {model.top_k} per token, "
            f"each 3 matrices of {shape.ffn} x {shape.hidden}",
        ),
        (
            "recipe",
            f"{recipe.name}, {recipe.bits:.3g} bits, "
            + (f"groups of {recipe.group_size}, " if recipe.group_size != GROUP_SIZE else "")
            + (f"average rank {recipe.avg_rank}, " if recipe.avg_rank else "")
            + f"{recipe.factor_bits}-bit factors, Top-{recipe.top_n} restored",
        ),
        *_told(recipe),
        (
            "codes",
            f"{_size(summary.codes_bytes)}, {summary.code_bits_per_weight:.3g} bits per weight",
        ),
        (
            "factors",
            f"{_size(summary.factors_bytes)}, together with codes "
            f"{summary.expert_bits_per_weight:.3g} bits per weight",
        ),
        ("dense", _size(summary.dense_bytes)),
        (
            "experts in bf16",
            f"{_size(summary.original_expert_bytes)}, "
            f"{summary.original_expert_bytes / experts:.2f} times as much",
        ),
        (
            "bytes per token",
            f"{summary.bytes_per_token:,}, in bf16 {summary.original_bytes_per_token:,} "
            "(batch 1, nothing cached)",
        ),
    ]
    return rows


def _told(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What a recipe was given beyond its numbers, if anything."""
    if recipe.codec != "tiles":
        yield "codec", f"{recipe.codec}, error bound {recipe.error_bound}"
    if recipe.budget is not None:
        yield "budget", f"{recipe.budget:g} bits per expert weight moved"
    if recipe.calibration is not None:
        yield "calibration", recipe.calibration


def counts(numbers: Mapping[str, int]) -> str:
    """For a cell: "12 affine, 3 symmetric"; names without any are left out."""
    return ", ".join(f"{count} {name}" for name, count in numbers.items() if count) or "none"


def _histogram(ranks: dict[int, int]) -> str:
    most = max(ranks.values())
    rows = [
        {"rank": rank, "experts": count, " ": "#" * max(1, round(_BAR_WIDTH * count / most))}
        for rank, count in ranks.items()
    ]
    return format_table(rows)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.2f} MiB"
