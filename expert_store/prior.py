"""How much layers matter, as a study found it, in a small JSON file: a prior for planning.

A calibration that measured a layer overrules it. Knows no study and no solver.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from expert_store.errors import StoreFormatError
from expert_store.files import Disk
from expert_store.json_fields import parse_object
from expert_store.types import ModelInfo

FORMAT = "moetier-layer-prior"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 20


def save_prior(
    path: Path, model: ModelInfo, layers: Mapping[int, float], disk: Disk | None = None
) -> None:
    """Write the relative sensitivity of every MoE layer, 1 on average. Raises StoreWriteError."""
    value = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": model.name,
        "layers": {str(layer): layers[layer] for layer in sorted(layers)},
    }
    text = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    (disk or Disk()).write_atomic(path, len(text), [text])


def load_prior(path: Path, model: ModelInfo) -> dict[int, float]:
    """Relative sensitivity by layer, of the model that it was found on.

    Raises StoreFormatError for what is no such file, ValueError when it is another model's.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StoreFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    fields = parse_object(text, str(path))
    fields.string("format", FORMAT)
    fields.choice("format_version", (FORMAT_VERSION,))
    name, layers = fields.string("model"), fields.fields("layers")
    found = {
        layer: layers.number(str(layer))
        for layer in model.moe_layers
        if str(layer) in layers.names()
    }
    if name != model.name or len(found) < len(model.moe_layers):
        raise ValueError(
            f"prior: {path} is of {name}, layers {layers.names()}, expected {model.name}, layers "
            f"{sorted(model.moe_layers)}; run `moetier study` on this model"
        )
    layers.close()
    fields.close()
    return found
