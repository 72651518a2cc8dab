"""The files of a store, put together in its staging folder: layers, dense tensors, configuration.

Every file is written whole or not at all, and found again by a run that goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from expert_store.checkpoint import Checkpoint
from expert_store.expert_json import read_form, read_repair, record_file, record_name
from expert_store.factor_records import factors_bytes
from expert_store.files import Chunk, TensorEntry, layout, read_bytes
from expert_store.json_fields import Fields
from expert_store.records import codes_bytes
from expert_store.shards import INDEX_FILE, StoredTensor
from expert_store.staging import COPIED, Staging
from expert_store.types import (
    FORMAT_VERSION,
    ExpertInfo,
    ExpertKey,
    ExpertShape,
    Recipe,
    RecordInfo,
    RecordKind,
)

DENSE_FILE_BYTES = 1 << 30
_COPY_CHUNK = 8 << 20
_MAX_COPIED_BYTES = 256 << 20
_METADATA = {"format": "pt"}


def write_layer(
    staging: Staging, layer: int, infos: dict[ExpertKey, dict[str, Any]], shape: ExpertShape
) -> list[ExpertInfo]:
    """Join one layer's staged records into its codes and factors files; what the manifest says.

    `infos` are what `staging_info` made of each expert, as staged.
    """
    forms = {key: read_form(Fields(info["form"], f"{key}")) for key, info in infos.items()}
    repairs = {key: read_repair(Fields(info["repair"], f"{key}")) for key, info in infos.items()}
    places: dict[RecordKind, dict[ExpertKey, RecordInfo]] = {}
    sizes: dict[RecordKind, dict[ExpertKey, int]] = {
        "codes": {key: codes_bytes(shape, form) for key, form in forms.items()},
        "factors": {
            key: factors_bytes(shape, repair) for key, repair in repairs.items() if repair.blocks
        },
    }
    for kind, by_key in sizes.items():
        file = record_file(kind, layer)
        tensors = [
            (record_name(key.expert), "U8", (size,), size) for key, size in sorted(by_key.items())
        ]
        header, entries = layout(tensors, _METADATA)
        hashes = {key: str(infos[key][f"{kind}_sha256"]) for key in sorted(by_key)}
        places[kind] = {
            key: RecordInfo(file, entry.start, entry.num_bytes, hashes[key])
            for key, entry in zip(hashes, entries, strict=True)
        }
        if entries and not staging.has(file):
            total = len(header) + sum(by_key.values())
            staging.write(file, total, _records(staging, header, kind, hashes))
    staging.drop_records(infos)
    return [
        ExpertInfo(
            key=key,
            form=forms[key],
            codes=places["codes"][key],
            factors=places["factors"].get(key),
            repair=repairs[key],
            kurtosis=info["kurtosis"],
            error=info["error"],
            restored_error=info["restored_error"],
            block_gains=tuple(info["block_gains"]),
        )
        for key, info in infos.items()
    ]


def _records(
    staging: Staging, header: bytes, kind: RecordKind, hashes: dict[ExpertKey, str]
) -> Iterator[Chunk]:
    yield header
    for key, sha256 in hashes.items():
        yield memoryview(staging.expert_record(key, kind, sha256).numpy())


def write_dense(staging: Staging, checkpoint: Checkpoint) -> dict[str, str]:
    """Copy every dense tensor, a few MiB at a time. Returns sha256 by file name."""
    dense = checkpoint.dense
    files: list[list[str]] = [[]]
    size = 0
    for name in sorted(dense):
        if files[-1] and size + dense[name].entry.num_bytes > DENSE_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += dense[name].entry.num_bytes
    hashes, weight_map = {}, {}
    for i, names in enumerate(files):
        file = f"dense-{i:05d}.safetensors"
        if not staging.has(file):
            hashes[file] = staging.write(file, *dense_file({n: dense[n] for n in names}))
        else:
            hashes[file] = staging.sha256(file)
        weight_map.update(dict.fromkeys(names, file))
    # With an index, transformers' from_pretrained finds the dense files by itself.
    total_size = sum(stored.entry.num_bytes for stored in dense.values())
    staging.write_json(
        INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )
    return hashes


def dense_file(tensors: Mapping[str, StoredTensor]) -> tuple[int, Iterator[Chunk]]:
    """Bytes in all, and the bytes, of the dense file with these tensors, by name."""
    named = sorted(tensors.items())
    header, entries = layout(
        [(name, t.entry.dtype, t.entry.shape, t.entry.num_bytes) for name, t in named], _METADATA
    )
    total = len(header) + sum(entry.num_bytes for entry in entries)
    return total, _dense_chunks(header, (stored for _, stored in named))


def _dense_chunks(header: bytes, tensors: Iterable[StoredTensor]) -> Iterator[Chunk]:
    yield header
    for stored in tensors:
        entry: TensorEntry = stored.entry
        for start in range(0, entry.num_bytes, _COPY_CHUNK):
            size = min(_COPY_CHUNK, entry.num_bytes - start)
            yield memoryview(read_bytes(stored.path, entry.start + start, size).numpy())


def write_configuration(staging: Staging, source: Path, recipe: Recipe) -> dict[str, str]:
    """config.json with our quantization_config, and the checkpoint's tokenizer files as they are.

    Returns sha256 by file name.
    """
    config = json.loads((source / "config.json").read_text())
    config.pop("auto_map", None)  # names code that a store does not carry
    config["quantization_config"] = {
        "quant_method": "moetier",
        "format_version": FORMAT_VERSION,
        "recipe": recipe.name,
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "factor_bits": recipe.factor_bits,
        "top_n": recipe.top_n,
    }
    text = (json.dumps(config, indent=2) + "\n").encode()
    hashes = {"config.json": staging.write("config.json", len(text), [text])}
    copied = [
        path.name
        for path in sorted(source.iterdir())
        if path.is_file()
        and COPIED.fullmatch(path.name)
        and path.stat().st_size <= _MAX_COPIED_BYTES
    ]
    for name in copied:
        data = (source / name).read_bytes()
        hashes[name] = staging.write(name, len(data), [data])
    return hashes
