"""Manifest <-> JSON: the whole, its limits and its content id. Rules: `expert_store/format.py`.

Knows no file: bytes in, Manifest out, and back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from expert_store.errors import StoreFormatError
from expert_store.expert_json import expert_json, read_expert
from expert_store.json_fields import SHA256, Fields, parse_object
from expert_store.recipe_json import model_json, read_model, read_recipe, recipe_json
from expert_store.types import FORMAT_VERSION, ExpertInfo, ExpertKey, Manifest, ModelInfo

FORMAT_NAME = "moetier-store"
MAX_EXPERTS = 1_000_000
MAX_FILES = 10_000
_DENSE_NAME = r"dense[A-Za-z0-9-]{0,48}\.safetensors"
_SIDE_NAME = r"(?!\.{1,2}\Z)[^/\\\0]{1,255}"  # any one file right in the store


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
    if format_version < FORMAT_VERSION:
        raise StoreFormatError(
            f"{where}: format version {format_version}, made by an older moetier; this one reads "
            f"version {FORMAT_VERSION}: compress the model again with --force"
        )
    version = fields.string("version", SHA256)
    recipe = read_recipe(fields.fields("recipe"))
    model = read_model(fields.fields("model"))
    dense_files = _files(fields, "dense_files", _DENSE_NAME)
    side_files = _files(fields, "side_files", _SIDE_NAME)
    experts = {}
    for i, item in enumerate(fields.items("experts", MAX_EXPERTS)):
        info = read_expert(Fields(item, f"{where}: experts[{i}]"), model.expert)
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
    return {name: files.string(name, SHA256) for name in names}


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
    return {
        "format": FORMAT_NAME,
        "format_version": manifest.format_version,
        "version": manifest.version,
        "recipe": recipe_json(manifest.recipe),
        "model": model_json(manifest.model),
        "dense_files": dict(manifest.dense_files),
        "side_files": dict(manifest.side_files),
        "experts": [expert_json(info) for _, info in sorted(manifest.experts.items())],
    }
