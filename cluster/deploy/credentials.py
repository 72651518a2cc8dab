"""Secrets that a deployment asks for: made at random, written once to a file of its owner only."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

NUM_BYTES = 32
GENERATED = ("moetier-ray-token", "moetier-redis")
"""Those that may hold anything, as long as both ends know it. Others are given by someone else."""


def secret_documents(
    needed: Sequence[tuple[str, str]], *, namespace: str | None
) -> list[dict[str, Any]]:
    """New Secrets for the (name, key) pairs that are ours to make up; others are left out."""
    values: dict[str, dict[str, str]] = {}
    for name, key in needed:
        if name in GENERATED:
            values.setdefault(name, {})[key] = secrets.token_urlsafe(NUM_BYTES)
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name} | ({"namespace": namespace} if namespace else {}),
            "type": "Opaque",
            "stringData": data,
        }
        for name, data in sorted(values.items())
    ]


def write_secrets(path: Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Write them readable by the owner alone. Raises ValueError when the file is there."""
    text = yaml.safe_dump_all(documents, sort_keys=False)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ValueError(
            f"{path}: is there already; its tokens may be in use, so it is not written over"
        ) from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
