"""A calibration's JSON, strictly: every field there, of its type, and no other.

The layout is specified in `expert_store/calibration_file.py`.

Legend: E experts, K top-k.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from expert_store.errors import StoreFormatError
from expert_store.json_fields import Fields, parse_object
from expert_store.statistics import (
    CalibratedModel,
    CalibrationInfo,
    LayerTable,
    MomentForm,
    MomentForms,
    Sensitivity,
    TextInfo,
)
from expert_store.types import ExpertShape
from kernels.types import Activation

FORMAT = "moetier-calibration"
FORMAT_VERSION = 2
MAX_LAYERS = 4096
MAX_EXPERTS = 65536
MAX_TOP_K = 1024
MAX_TOKENS = 1 << 50
MAX_TEXTS = 100_000
_SHA256 = r"[0-9a-f]{64}"
_NUMBER = r"0|[1-9][0-9]{0,4}"


def encode(info: CalibrationInfo, checksums: Mapping[int, str]) -> tuple[bytes, str]:
    """(the file's bytes, the calibration's id): the id is the sha256 of all but itself."""
    value = _plain(info, checksums)
    identity = _identity(value)
    return _canonical({**value, "id": identity}), identity


def decode(text: bytes, where: str) -> tuple[CalibrationInfo, dict[int, str], str]:
    """(content, checksum of each layer's file, id). StoreFormatError names file and field."""
    fields = parse_object(text, where)
    if fields.string("format") != FORMAT:
        raise StoreFormatError(f"{where}: this is no calibration of moetier")
    version = fields.integer("format_version", 0, 1 << 31)
    if version != FORMAT_VERSION:
        raise StoreFormatError(
            f"{where}: format_version: expected {FORMAT_VERSION}, got {version}; "
            "run `moetier calibrate` again"
        )
    identity = fields.string("id", _SHA256)
    model = _model(fields.fields("model"))
    forms = _forms(fields.fields("forms"))
    tables: dict[int, LayerTable] = {}
    checksums: dict[int, str] = {}
    for item in fields.items("layers", MAX_LAYERS):
        one = Fields(item, f"{where}: layers")
        layer = one.integer("layer", 0, MAX_LAYERS)
        checksums[layer] = one.string("sha256", _SHA256)
        if layer in tables or layer not in model.num_experts:
            raise one.bad("layer", f"each of {sorted(model.num_experts)} once", layer)
        tables[layer] = _table(one, model.num_experts[layer], model.top_k)
    if absent := sorted(model.num_experts.keys() - tables):
        raise StoreFormatError(f"{where}: layers: layer {absent[0]} is missing")
    info = CalibrationInfo(
        model=model,
        texts=tuple(
            _text(Fields(item, f"{where}: texts")) for item in fields.items("texts", MAX_TEXTS)
        ),
        asked_tokens=fields.integer("asked_tokens", 1, MAX_TOKENS),
        num_tokens=fields.integer("num_tokens", 1, MAX_TOKENS),
        window_tokens=fields.integer("window_tokens", 1, MAX_TOKENS),
        seed=fields.integer("seed", -MAX_TOKENS, MAX_TOKENS),
        forms=forms,
        alike=fields.boolean("alike"),
        tables=dict(sorted(tables.items())),
        sensitivity=_sensitivity(fields, set(tables)),
    )
    fields.close()
    if _identity(_plain(info, checksums)) != identity:
        raise StoreFormatError(
            f"{where}: id does not match the content; the file was changed: calibrate again"
        )
    return info, checksums, identity


def _identity(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(info: CalibrationInfo, checksums: Mapping[int, str]) -> dict[str, Any]:
    model, forms, sensitivity = info.model, info.forms, info.sensitivity
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "top_k": model.top_k,
            "expert": {
                "hidden": model.expert.hidden,
                "ffn": model.expert.ffn,
                "activation": model.expert.activation,
                "has_bias": model.expert.has_bias,
            },
            "num_experts": {str(layer): count for layer, count in model.num_experts.items()},
        },
        "texts": [
            {"name": text.name, "num_tokens": text.num_tokens, "sha256": text.sha256}
            for text in info.texts
        ],
        "asked_tokens": info.asked_tokens,
        "num_tokens": info.num_tokens,
        "window_tokens": info.window_tokens,
        "seed": info.seed,
        "forms": {"pooled": forms.pooled, "input": forms.input, "middle": forms.middle},
        "alike": info.alike,
        "layers": [
            {"layer": layer, "sha256": checksums[layer], **_plain_table(table)}
            for layer, table in sorted(info.tables.items())
        ],
        "sensitivity": None
        if sensitivity is None
        else {
            "num_tokens": sensitivity.num_tokens,
            "layers": {str(layer): value for layer, value in sensitivity.layers.items()},
        },
    }


def _plain_table(table: LayerTable) -> dict[str, Any]:
    return {
        "num_tokens": table.num_tokens,
        "output_energy": table.output_energy,
        "skew": list(table.skew_K),
        "tokens": list(table.tokens_E),
        "expert_energy": list(table.expert_energy_E),
        "use_at": [list(row) for row in table.use_at_EK],
        "weight2_at": [list(row) for row in table.weight2_at_EK],
    }


def _model(fields: Fields) -> CalibratedModel:
    expert, counts = fields.fields("expert"), fields.fields("num_experts")
    layers = []
    for name in counts.names():
        if not (name.isdecimal() and str(int(name)) == name and int(name) < MAX_LAYERS):
            raise counts.bad(name, "a layer number", repr(name))
        layers.append(int(name))
    activations = "|".join(get_args(Activation))
    model = CalibratedModel(
        name=fields.string("name"),
        model_type=fields.string("model_type"),
        top_k=fields.integer("top_k", 1, MAX_TOP_K),
        expert=ExpertShape(
            hidden=expert.integer("hidden", 64, 1 << 20),
            ffn=expert.integer("ffn", 64, 1 << 20),
            activation=expert.string("activation", activations),  # type: ignore[arg-type]
            has_bias=expert.boolean("has_bias"),
        ),
        num_experts={layer: counts.integer(str(layer), 1, MAX_EXPERTS) for layer in sorted(layers)},
    )
    expert.close()
    counts.close()
    fields.close()
    return model


def _forms(fields: Fields) -> MomentForms:
    allowed = "|".join(get_args(MomentForm))
    pooled, inputs, middle = (
        fields.string(name, allowed) for name in ("pooled", "input", "middle")
    )
    fields.close()
    return MomentForms(pooled, inputs, middle)  # type: ignore[arg-type]


def _text(fields: Fields) -> TextInfo:
    text = TextInfo(
        fields.string("name"),
        fields.integer("num_tokens", 0, MAX_TOKENS),
        fields.string("sha256", _SHA256),
    )
    fields.close()
    return text


def _table(fields: Fields, num_experts: int, top_k: int) -> LayerTable:
    """The rest of one layer's object; `layer` and `sha256` are read."""
    tokens = fields.items("tokens", num_experts)
    if len(tokens) != num_experts or not all(type(count) is int and count >= 0 for count in tokens):
        raise fields.bad("tokens", f"{num_experts} counts", tokens[:8])
    table = LayerTable(
        num_tokens=fields.integer("num_tokens", 1, MAX_TOKENS),
        tokens_E=tuple(tokens),
        use_at_EK=_numbers_EK(fields, "use_at", num_experts, top_k),
        weight2_at_EK=_numbers_EK(fields, "weight2_at", num_experts, top_k),
        expert_energy_E=_numbers(fields, "expert_energy", num_experts),
        skew_K=_numbers(fields, "skew", top_k),
        output_energy=fields.number("output_energy"),
    )
    fields.close()
    return table


def _numbers(fields: Fields, name: str, count: int) -> tuple[float, ...]:
    return _checked(fields, name, fields.items(name, count), count)


def _numbers_EK(fields: Fields, name: str, rows: int, cols: int) -> tuple[tuple[float, ...], ...]:
    items = fields.items(name, rows)
    if len(items) != rows:
        raise fields.bad(name, f"{rows} rows", len(items))
    return tuple(_checked(fields, name, item, cols) for item in items)


def _checked(fields: Fields, name: str, items: Any, count: int) -> tuple[float, ...]:
    good = isinstance(items, list) and len(items) == count
    if not good or not all(
        type(item) in (int, float) and math.isfinite(item) and item >= 0 for item in items
    ):
        raise fields.bad(name, f"{count} finite numbers >= 0", "something else")
    return tuple(float(item) for item in items)


def _sensitivity(fields: Fields, layers: set[int]) -> Sensitivity | None:
    if fields.take("sensitivity") is None:
        return None
    inner = fields.fields("sensitivity")
    by_layer = inner.fields("layers")
    if set(by_layer.names()) != {str(layer) for layer in layers}:
        raise inner.bad("layers", f"each of {sorted(layers)}", by_layer.names())
    found = Sensitivity(
        num_tokens=inner.integer("num_tokens", 1, MAX_TOKENS),
        layers={layer: by_layer.number(str(layer)) for layer in sorted(layers)},
    )
    inner.close()
    return found
