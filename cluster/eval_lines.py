"""The lines of `moetier eval`: a variant for each combination of policies that was asked for."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from cluster.eval_settings import Variant
from expert_store.types import Manifest
from gpu_worker.restoring import Restore


def add_policies(parser: argparse.ArgumentParser) -> None:
    policies = parser.add_argument_group("policies", "of the worker; several values, several lines")

    def several(flag: str, metavar: str, help_text: str, kind: type) -> None:
        policies.add_argument(
            f"--{flag}",
            type=kind,
            nargs="+",
            action="extend",
            default=None,
            metavar=metavar,
            help=help_text,
        )

    policies.add_argument(
        "--restore",
        nargs="+",
        choices=get_args(Restore),
        default=["top_n"],
        help="which of a token's experts get their compensator (default: top_n)",
    )
    several("top-n", "N", "how many, for top_n and random (default: what the store says)", int)
    several("restore-mass", "SHARE", "router weight that mass covers, 0 to 1", float)
    several("restore-benefit", "B", "share of the weight x repaired error, for benefit", float)
    several("restore-seed", "SEED", "for random (default: 0)", int)
    several("skip-below", "SHARE", "run no expert with less of a token's router weight", float)
    several("factor-share", "SHARE", "fetch only the first blocks of a compensator, 0 to 1", float)
    policies.add_argument(
        "--near-data", action="store_true", help="one more line, with a near-data worker"
    )


def variants_of(args: argparse.Namespace, store: Path, manifest: Manifest) -> Iterator[Variant]:
    """A line for each combination of policies that was asked for."""
    variant = None
    shares, skips = args.factor_share or [1.0], args.skip_below or [0.0]
    for share, skip, rule in itertools.product(shares, skips, args.restore):
        for policy in _thresholds(args, rule, manifest):
            variant = Variant(
                "", store, restore=rule, skip_below=skip, factor_share=share, **policy
            )
            variant = dataclasses.replace(variant, label=label(manifest, variant))
            yield variant
    assert variant is not None, "argparse gives every option a value"
    if args.near_data:
        yield dataclasses.replace(variant, label=f"{variant.label}, near data", near_data=True)


def _thresholds(
    args: argparse.Namespace, rule: Restore, manifest: Manifest
) -> Iterator[dict[str, Any]]:
    """What a rule is told, line by line. Raises ValueError for a rule without its threshold."""
    top_k = manifest.model.top_k
    chosen = args.top_n or [manifest.recipe.top_n]
    for top_n in chosen:
        if not 0 <= top_n <= top_k:
            raise ValueError(f"--top-n: got {top_n}, expected 0 to {top_k}")
    if rule == "all":
        yield {"top_n": top_k}
    elif rule == "top_n":
        yield from ({"top_n": top_n} for top_n in chosen)
    elif rule == "random":
        for top_n, seed in itertools.product(chosen, args.restore_seed or [0]):
            yield {"top_n": top_n, "restore_seed": seed}
    else:
        name = f"restore_{rule}"
        for threshold in getattr(args, name) or [None]:
            if threshold is None:
                raise ValueError(f"--restore {rule}: give --{name.replace('_', '-')} too")
            yield {name: threshold}


def label(manifest: Manifest, variant: Variant) -> str:
    """How a line calls its experts."""
    recipe = manifest.recipe
    if recipe.is_original:
        text = "original bf16"
    elif variant.restore == "top_n" and variant.top_n == 0:
        text = f"{recipe.bits:g}-bit codes"
    else:
        part = "" if variant.factor_share == 1 else f"{variant.factor_share:.0%} of "
        text = f"{recipe.bits:g}-bit + {part}compensators {_restored(variant)}"
    return text + (f", skip < {variant.skip_below:g}" if variant.skip_below else "")


def _restored(variant: Variant) -> str:
    if variant.restore == "top_n":
        return f"Top-{variant.top_n}"
    if variant.restore == "random":
        seed = f" (seed {variant.restore_seed})" if variant.restore_seed else ""
        return f"random {variant.top_n}{seed}"
    if variant.restore == "all":
        return "all"
    threshold = getattr(variant, f"restore_{variant.restore}")
    return f"{variant.restore} {threshold:g}"
