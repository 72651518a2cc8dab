"""Text in domains as windows of tokens: each domain one file, its documents parted by form feeds.

Knows no model. Windows are cut anywhere; `seed` decides which.

Legend: B windows, S positions.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SLICE_CHARS = 8000
"""At most this much of a document in a row: a book must not fill a domain's sample."""


@dataclass(frozen=True, slots=True)
class Domain:
    name: str
    tokens: np.ndarray[Any, np.dtype[np.int64]]  # [num_tokens], documents joined by end of text


def read_domains(
    folder: Path, tokenizer: Any, end_id: int, num_chars: int, seed: int
) -> list[Domain]:
    """Every <domain>.txt.xz or <domain>.txt of `folder`, `num_chars` of each (or all there is).

    Raises ValueError when there is none.
    """
    files = sorted([*folder.glob("*.txt.xz"), *folder.glob("*.txt")])
    if not files:
        raise ValueError(f"{folder}: no *.txt or *.txt.xz; expected one file of text per domain")
    return [_read(file, tokenizer, end_id, num_chars, seed) for file in files]


def _read(file: Path, tokenizer: Any, end_id: int, num_chars: int, seed: int) -> Domain:
    raw = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
    documents = [document for document in raw.decode().split("\f") if document.strip()]
    rng = np.random.default_rng(seed)
    slices = []
    for document in documents:
        # The start is moved so that slices do not all begin where a document does.
        first = int(rng.integers(0, _SLICE_CHARS)) if len(document) > 2 * _SLICE_CHARS else 0
        slices += [
            document[i : i + _SLICE_CHARS] for i in range(first, len(document), _SLICE_CHARS)
        ]
    chosen, count = [], 0
    for index in rng.permutation(len(slices)):
        if count >= num_chars:
            break
        chosen.append(slices[index])
        count += len(slices[index])
    encoded = tokenizer(chosen, add_special_tokens=False)["input_ids"]
    joined = [token for ids in encoded for token in (*ids, end_id)]
    return Domain(file.name.partition(".")[0], np.array(joined, dtype=np.int64))


def random_windows(
    domains: list[Domain], per_domain: int, length: int, rng: np.random.Generator
) -> torch.Tensor:
    """`per_domain` windows of each domain, in order of domain: [B, length + 1] int64."""
    rows = []
    for domain in domains:
        for start in rng.integers(0, len(domain.tokens) - length, per_domain):
            rows.append(domain.tokens[start : start + length + 1])
    return torch.from_numpy(np.stack(rows))


def even_windows(domain: Domain, count: int, length: int) -> torch.Tensor:
    """Windows spread evenly over a domain, [B, length + 1] int64; always the same ones."""
    starts = np.linspace(0, len(domain.tokens) - length - 1, count).astype(int)
    return torch.from_numpy(np.stack([domain.tokens[s : s + length + 1] for s in starts]))
