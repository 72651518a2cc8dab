"""Manifest <-> JSON: field by field, with limits. The rules are stated in `expert_store/format.py`.

Knows no file: bytes in, Manifest out, and back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from expert_store.errors import StoreFormatError
from expert_store.json_fields import Fields, parse_object
from expert_store.records import ALIGNMENT, codes_bytes, factors_bytes
from expert_store.types import (
    FORMAT_VERSION,
    PROJECTIONS,
    ExpertInfo,
    ExpertKey,
    ExpertShape,
    Manifest,
    ModelInfo,
    Projection,
    Recipe,
    RecordInfo,
    RecordKind,
)
from kernels.types import GROUP_SIZE, Activation, Bits, FactorBits

FORMAT_NAME = "moetier-store"
MAX_LAYERS = 4096
MAX_EXPERTS_PER_LAYER = 65_536
MAX_EXPERTS = 1_000_000
MAX_SIZE = 1 << 20
MAX_RANK_BLOCKS = 3 * (1 << 16)
MAX_FILES = 10_000
MAX_OFFSET = 1 << 50
_SHA256 = r"[0-9a-f]{64}"
_DENSE_NAME = r"dense[A-Za-z0-9-]{0,48}\.safetensors"
_SIDE_NAME = r"(?!\.{1,2}\Z)[^/\\\0]{1,255}"  # any one file right in the store
_LETTERS: Mapping[str, Projection] = {name[0]: name for name in PROJECTIONS}


def record_file(kind: RecordKind, layer: int) -> str:
    """Path, relative to the store, of the file that holds one layer's records of one kind."""
    return f"{kind}/layer-{layer:05d}.safetensors"


def record_name(expert: int) -> str:
    """Name of one expert's tensor in its layer's file."""
    return f"expert-{expert:05d}"


def content_version(manifest: Manifest) -> str:
    """The store's content id: sha256 of everything in the manifest but the id itself."""
    value = _to_json(manifest)
    del value["version"]
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as UTF-8 JSON, one line per expert."""
    value = _to_json(manifest)
    experts = value.pop("experts")
    head = json.dumps(value, indent=1)
    lines = ",\n".join("  " + json.dumps(expert, separators=(",", ":")) for expert in experts)
    return (head[: -len("\n}")] + ',\n "experts": [\n' + lines + "\n ]\n}\n").encode()


def decode_manifest(text: bytes, where: str) -> Manifest:
    """Parse and check a manifest. Raises StoreFormatError that names `where` and the field."""
    fields = parse_object(text, where)
    fields.string("format", FORMAT_NAME)
    format_version = fields.integer("format_version", 1, 1 << 30)
    if format_version > FORMAT_VERSION:
        raise StoreFormatError(
            f"{where}: format version {format_version} is newer than {FORMAT_VERSION}, the newest "
            "that this moetier reads; upgrade moetier, or compress the model again"
        )
    version = fields.string("version", _SHA256)
    recipe = _recipe(fields.fields("recipe"))
    model = _model(fields.fields("model"))
    dense_files = _files(fields, "dense_files", _DENSE_NAME)
    side_files = _files(fields, "side_files", _SIDE_NAME)
    experts = {}
    for i, item in enumerate(fields.items("experts", MAX_EXPERTS)):
        info = _expert(Fields(item, f"{where}: experts[{i}]"), recipe, model)
        if info.key in experts:
            raise StoreFormatError(f"{where}: experts[{i}]: {info.key} is listed twice")
        experts[info.key] = info
    fields.close()
    _check_complete(experts, model, where)
    _check_overlap(experts, where)
    manifest = Manifest(
        format_version=format_version,
        version=version,
        recipe=recipe,
        model=model,
        experts=experts,
        dense_files=dense_files,
        side_files=side_files,
    )
    if (found := content_version(manifest)) != version:
        raise StoreFormatError(
            f"{where}: version is {version[:16]}..., but its content hashes to {found[:16]}...; "
            "the manifest was changed or damaged: restore it or compress the model again"
        )
    return manifest


def _files(fields: Fields, field: str, pattern: str) -> dict[str, str]:
    files = fields.fields(field)
    names = files.names()
    if len(names) > MAX_FILES:
        raise fields.bad(field, f"at most {MAX_FILES} files", len(names))
    for name in names:
        if re.fullmatch(pattern, name) is None:
            raise fields.bad(field, f"file names matching {pattern}", repr(name))
    return {name: files.string(name, _SHA256) for name in names}


def _recipe(fields: Fields) -> Recipe:
    ladder = fields.items("rank_ladder", 64)
    if not all(isinstance(rank, int) and 0 <= rank <= MAX_SIZE for rank in ladder):
        raise fields.bad("rank_ladder", f"integers from 0 to {MAX_SIZE}", ladder)
    recipe = Recipe(
        name=fields.string("name", r"[a-z0-9_-]{1,64}"),
        bits=_choice(fields, "bits", get_args(Bits)),
        group_size=_choice(fields, "group_size", (GROUP_SIZE,)),
        factor_bits=_choice(fields, "factor_bits", get_args(FactorBits)),
        avg_rank=fields.integer("avg_rank", 0, MAX_SIZE),
        rank_ladder=tuple(ladder),
        top_n=fields.integer("top_n", 0, MAX_EXPERTS_PER_LAYER),
        seed=fields.integer("seed", 0, 1 << 62),
    )
    fields.close()
    return recipe


def _model(fields: Fields) -> ModelInfo:
    shape = fields.fields("expert")
    expert = ExpertShape(
        hidden=shape.integer("hidden", 1, MAX_SIZE),
        ffn=shape.integer("ffn", 1, MAX_SIZE),
        activation=_choice(shape, "activation", get_args(Activation)),
        has_bias=shape.boolean("has_bias"),
    )
    shape.close()
    num_layers = fields.integer("num_layers", 1, MAX_LAYERS)
    paths, counts = fields.fields("moe_layers"), fields.fields("num_experts")
    if sorted(paths.names()) != sorted(counts.names()):
        raise fields.bad("num_experts", "the same layers as moe_layers", counts.names())
    layers = {}
    for name in paths.names():
        if not name.isdecimal() or str(int(name)) != name or int(name) >= num_layers:
            raise fields.bad("moe_layers", f"layers 0 to {num_layers - 1}", repr(name))
        layers[int(name)] = name
    model = ModelInfo(
        name=fields.string("name"),
        model_type=fields.string("model_type", r"[a-z0-9_]{1,64}"),
        num_layers=num_layers,
        top_k=fields.integer("top_k", 1, MAX_EXPERTS_PER_LAYER),
        vocab_size=fields.integer("vocab_size", 1, 1 << 28),
        max_positions=fields.integer("max_positions", 1, 1 << 32),
        expert=expert,
        moe_layers={i: paths.string(name, r"[\w.]+") for i, name in sorted(layers.items())},
        num_experts={
            i: counts.integer(name, 1, MAX_EXPERTS_PER_LAYER) for i, name in sorted(layers.items())
        },
    )
    fields.close()
    return model


def _expert(fields: Fields, recipe: Recipe, model: ModelInfo) -> ExpertInfo:
    key = ExpertKey(
        fields.integer("layer", 0, MAX_LAYERS), fields.integer("expert", 0, MAX_EXPERTS_PER_LAYER)
    )
    bits = _choice(fields, "bits", get_args(Bits))
    letters = fields.string("blocks", r"[gud]*")
    blocks = tuple(_LETTERS[letter] for letter in letters)
    if len(blocks) > MAX_RANK_BLOCKS:
        raise fields.bad("blocks", f"at most {MAX_RANK_BLOCKS} rank blocks", len(blocks))
    codes = _record(fields.fields("codes"), "codes", key, codes_bytes(model.expert, bits))
    factors = None
    if blocks:
        expected = factors_bytes(model.expert, blocks, recipe.factor_bits)
        factors = _record(fields.fields("factors"), "factors", key, expected)
    elif fields.take("factors") is not None:
        raise fields.bad("factors", "null where there are no blocks", "a record")
    info = ExpertInfo(
        key=key,
        bits=bits,
        codes=codes,
        factors=factors,
        blocks=blocks,
        kurtosis=fields.number("kurtosis"),
        error=fields.number("error"),
        restored_error=fields.number("restored_error"),
    )
    fields.close()
    return info


def _record(fields: Fields, kind: RecordKind, key: ExpertKey, num_bytes: int) -> RecordInfo:
    # Only the one name that the layout allows: a path can never lead out of the store.
    expected = record_file(kind, key.layer)
    if (file := fields.string("file")) != expected:
        raise fields.bad("file", expected, repr(file))
    offset = fields.integer("offset", 0, MAX_OFFSET)
    if offset % ALIGNMENT:
        raise fields.bad("offset", f"a multiple of {ALIGNMENT}", offset)
    found = fields.integer("num_bytes", 0, MAX_OFFSET)
    if found != num_bytes:
        raise fields.bad("num_bytes", f"{num_bytes} for this shape", found)
    record = RecordInfo(file, offset, found, fields.string("sha256", _SHA256))
    fields.close()
    return record


def _choice(fields: Fields, name: str, allowed: tuple[Any, ...]) -> Any:
    value = fields.take(name)
    if isinstance(value, bool) or value not in allowed:
        raise fields.bad(name, f"one of {allowed}", repr(value))
    return value


def _check_complete(experts: Mapping[ExpertKey, ExpertInfo], model: ModelInfo, where: str) -> None:
    if sum(model.num_experts.values()) > MAX_EXPERTS:
        raise StoreFormatError(f"{where}: more than {MAX_EXPERTS} experts")
    expected = {
        ExpertKey(layer, expert)
        for layer, num_experts in model.num_experts.items()
        for expert in range(num_experts)
    }
    if missing := sorted(expected - experts.keys()):
        raise StoreFormatError(
            f"{where}: {len(missing)} of {len(expected)} experts are missing, first {missing[0]}"
        )
    if extra := sorted(experts.keys() - expected):
        raise StoreFormatError(
            f"{where}: {len(extra)} experts that the model does not have, first {extra[0]}"
        )


def _check_overlap(experts: Mapping[ExpertKey, ExpertInfo], where: str) -> None:
    records = [
        (record.file, record.offset, record.num_bytes, info.key)
        for info in experts.values()
        for record in (info.codes, info.factors)
        if record is not None
    ]
    records.sort()
    for (file, start, size, key), (next_file, next_start, _, next_key) in zip(
        records, records[1:], strict=False
    ):
        if file == next_file and start + size > next_start:
            raise StoreFormatError(f"{where}: {file}: the records of {key} and {next_key} overlap")


def _to_json(manifest: Manifest) -> dict[str, Any]:
    recipe, model = manifest.recipe, manifest.model
    return {
        "format": FORMAT_NAME,
        "format_version": manifest.format_version,
        "version": manifest.version,
        "recipe": asdict(recipe) | {"rank_ladder": list(recipe.rank_ladder)},
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "num_layers": model.num_layers,
            "top_k": model.top_k,
            "vocab_size": model.vocab_size,
            "max_positions": model.max_positions,
            "expert": asdict(model.expert),
            "moe_layers": {str(layer): path for layer, path in model.moe_layers.items()},
            "num_experts": {str(layer): n for layer, n in model.num_experts.items()},
        },
        "dense_files": dict(manifest.dense_files),
        "side_files": dict(manifest.side_files),
        "experts": [_expert_json(info) for _, info in sorted(manifest.experts.items())],
    }


def _expert_json(info: ExpertInfo) -> dict[str, Any]:
    return {
        "layer": info.key.layer,
        "expert": info.key.expert,
        "bits": info.bits,
        "blocks": "".join(name[0] for name in info.blocks),
        "kurtosis": info.kurtosis,
        "error": info.error,
        "restored_error": info.restored_error,
        "codes": asdict(info.codes),
        "factors": asdict(info.factors) if info.factors else None,
    }
