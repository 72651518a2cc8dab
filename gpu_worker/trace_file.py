"""A step trace on disk: its format as a spec, with save and load.

One safetensors file (little-endian) of these tensors, in this order; N steps, S rows of all steps
one after another, K the model's top-k:

    about                 U8 [n]      a JSON object, UTF-8, n at most 1 MiB:
                                      format "moetier-trace"; format_version 1;
                                      model {name, model_type, top_k}; layers [{layer, num_experts}]
                                      in the order the model goes through them; store_version;
                                      origin: what was run, in words
    steps                 I32 [N]     rows of each step, 1 or more; N at most 2^24, S at most 2^26
    layer-LLLLL.ids       I16 [S, K]  experts, in the order of the router's columns
    layer-LLLLL.weights   F32 [S, K]  what the router gave them
    layer-LLLLL.flags     U8 [S, K]   bit 0: the pair was run; bit 1: it was to be restored (a pair
                                      that is restored is run); other bits 0

and the last three again for each layer: 7 bytes per (token, expert) pair. For a 32-layer Mixtral
that is 448 bytes per token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from expert_store.errors import StoreFormatError
from expert_store.files import Disk, TensorEntry, layout, read_header, read_tensor
from expert_store.json_fields import MAX_STRING, SHA256, Fields, parse_object
from gpu_worker.trace import MAX_EXPERTS, LayerRows, StepTrace, TracedModel

FORMAT = "moetier-trace"
FORMAT_VERSION = 1
MAX_ABOUT_BYTES = 1 << 20
MAX_STEPS = 1 << 24
MAX_ROWS = 1 << 26
MAX_LAYERS = 1 << 12
_RUN, _RESTORE = 1, 2


def save_trace(path: Path, trace: StepTrace, disk: Disk | None = None) -> None:
    """Write the file atomically. Raises StoreWriteError."""
    assert sys.byteorder == "little", "the format is little-endian"
    tensors = dict(_tensors(trace))
    dtypes = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.float32: "F32"}
    header, entries = layout(
        [
            (name, dtypes[t.dtype], tuple(t.shape), t.numel() * t.itemsize)
            for name, t in tensors.items()
        ],
        {},
    )
    total = len(header) + sum(entry.num_bytes for entry in entries)
    chunks = (memoryview(t.contiguous().numpy()).cast("B") for t in tensors.values() if t.numel())
    (disk or Disk()).write_atomic(path, total, _chained(header, chunks))


def load_trace(path: Path) -> StepTrace:
    """Read a trace. Raises StoreFormatError naming the file, what is wrong and where."""
    entries = read_header(path)
    about = _about(path, entries)
    model, order = _model(about), [layer for layer, _ in _layers(about)]
    version = about.string("store_version", SHA256)
    origin = about.string("origin")
    about.close()
    steps_N = _tensor(path, entries, "steps", "I32", None)
    if steps_N.dim() != 1 or not 1 <= steps_N.numel() <= MAX_STEPS or int(steps_N.min()) < 1:
        raise StoreFormatError(f"{path}: steps: expected 1 to {MAX_STEPS} steps of 1 row or more")
    num_rows = int(steps_N.sum(dtype=torch.int64))
    if num_rows > MAX_ROWS:
        raise StoreFormatError(f"{path}: steps: expected at most {MAX_ROWS} rows, got {num_rows}")
    layers = {layer: _read_layer(path, entries, layer, (num_rows, model.top_k)) for layer in order}
    known = {"about", "steps", *(f"{_prefix(at)}.{part}" for at in order for part in _PARTS)}
    if unknown := sorted(set(entries) - known):
        raise StoreFormatError(f"{path}: unknown tensor {unknown[0]!r}; a newer moetier wrote it?")
    try:
        return StepTrace(model, version, origin, tuple(steps_N.tolist()), layers)
    except ValueError as error:
        raise StoreFormatError(f"{path}: {error}; record it again") from error


_PARTS = ("ids", "weights", "flags")


def _prefix(layer: int) -> str:
    return f"layer-{layer:05d}"


def _tensors(trace: StepTrace) -> Iterator[tuple[str, torch.Tensor]]:
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {
            "name": trace.model.name,
            "model_type": trace.model.model_type,
            "top_k": trace.model.top_k,
        },
        "layers": [
            {"layer": layer, "num_experts": trace.model.num_experts[layer]}
            for layer in trace.layers
        ],
        "store_version": trace.store_version,
        "origin": trace.origin[:MAX_STRING],
    }
    text = json.dumps(about, separators=(",", ":")).encode()
    yield "about", torch.frombuffer(bytearray(text), dtype=torch.uint8)
    yield "steps", torch.tensor(trace.rows_per_step, dtype=torch.int32)
    for layer, rows in trace.layers.items():
        flags_SK = rows.run_SK * _RUN + (rows.restore_SK & rows.run_SK) * _RESTORE
        yield f"{_prefix(layer)}.ids", rows.topk_ids_SK
        yield f"{_prefix(layer)}.weights", rows.topk_weights_SK
        yield f"{_prefix(layer)}.flags", flags_SK.to(torch.uint8)


def _chained(header: bytes, chunks: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
    yield header
    yield from chunks


def _about(path: Path, entries: dict[str, TensorEntry]) -> Fields:
    if "about" not in entries or entries["about"].num_bytes > MAX_ABOUT_BYTES:
        raise StoreFormatError(
            f"{path}: has no tensor 'about' of at most {MAX_ABOUT_BYTES} bytes; this is no trace: "
            "make one with `moetier trace`"
        )
    text = _tensor(path, entries, "about", "U8", None).numpy().tobytes()
    about = parse_object(text, f"{path}: about")
    if (found := about.take("format")) != FORMAT:
        raise about.bad("format", repr(FORMAT), repr(found))
    if (version := about.take("format_version")) != FORMAT_VERSION:
        raise about.bad("format_version", f"{FORMAT_VERSION} (record it again)", version)
    return about


def _model(about: Fields) -> TracedModel:
    told = about.fields("model")
    model = TracedModel(
        told.string("name"),
        told.string("model_type"),
        told.integer("top_k", 1, MAX_EXPERTS),
        dict(_layers(about)),
    )
    told.close()
    return model


def _layers(about: Fields) -> list[tuple[int, int]]:
    found = []
    for index, item in enumerate(about.items("layers", MAX_LAYERS)):
        fields = Fields(item, f"{about.where}: layers[{index}]")
        found.append(
            (fields.integer("layer", 0, 99_999), fields.integer("num_experts", 1, MAX_EXPERTS))
        )
        fields.close()
    if not found or len({layer for layer, _ in found}) != len(found):
        raise about.bad("layers", "different layers, 1 at least", [layer for layer, _ in found])
    return found


def _read_layer(
    path: Path, entries: dict[str, TensorEntry], layer: int, shape: tuple[int, int]
) -> LayerRows:
    ids_SK, weights_SK, flags_SK = (
        _tensor(path, entries, f"{_prefix(layer)}.{part}", dtype, shape)
        for part, dtype in zip(_PARTS, ("I16", "F32", "U8"), strict=True)
    )
    run_SK, restore_SK = (flags_SK & _RUN).bool(), (flags_SK & _RESTORE).bool()
    if int(flags_SK.max()) > _RUN + _RESTORE or bool((restore_SK & ~run_SK).any()):
        raise StoreFormatError(
            f"{path}: {_prefix(layer)}.flags: a pair is flagged other than 0, 1, 3"
        )
    if not bool(weights_SK.isfinite().all()):
        raise StoreFormatError(
            f"{path}: {_prefix(layer)}.weights: hold NaN or Inf; record it again"
        )
    return LayerRows(ids_SK, weights_SK, run_SK, restore_SK)


def _tensor(
    path: Path,
    entries: dict[str, TensorEntry],
    name: str,
    dtype: str,
    shape: tuple[int, ...] | None,
) -> torch.Tensor:
    entry = entries.get(name)
    if entry is None or entry.dtype != dtype or (shape is not None and entry.shape != shape):
        expected = f"{dtype}{'' if shape is None else ' ' + str(list(shape))}"
        got = "none" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        raise StoreFormatError(f"{path}: tensor {name!r}: expected {expected}, got {got}")
    return read_tensor(path, entry)
