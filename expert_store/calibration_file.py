"""A calibration on disk: its format as a spec, and load and save of its parts.

Files:

    calibration.json            what it holds; written last: a folder without it is no calibration
    layer-LLLLL.safetensors     one MoE layer's tensors, float32, in this order:
        pooled                  moment of the layer's inputs
        input, middle           [E, ...] moments of each expert's inputs, and of what its down reads
        gate_weight, up_weight  [E, F] row weights
        sample_middle, sample_gate_weight, sample_up_weight   [E, F] over the layer's sample

A moment is its upper triangle row by row: of form "full" [size (size + 1) / 2], of form "blocks"
those of its diagonal blocks of 64, [size/64, 2080]. calibration.json: one object,

    format "moetier-calibration"; format_version 2; id: sha256 of the canonical JSON of the rest
    model {name, model_type, top_k, expert {hidden, ffn, activation, has_bias},
           num_experts {"L": E}}
    texts [{name, num_tokens, sha256}]; asked_tokens; num_tokens; window_tokens; seed
    forms {pooled, input, middle}: "full" or "blocks"; alike: all tokens count the same
    layers [{layer, sha256 of its file, num_tokens, output_energy, skew [K], tokens [E],
             expert_energy [E], use_at [E][K], weight2_at [E][K]}]
    sensitivity null or {num_tokens, layers {"L": nats}}

Checksums are in what the id covers, so the id names every number. Sizes, 10^6 bytes: pooled +
inputs + middles + five row vectors per expert = file; and in memory while collecting, where moments
are whole squares:

    smol-moe, 30 layers x 4, H 576, F 1536       20 +  80 + 566 +  4 =  670   1340   all full
    Mixtral-8x7B, 32 x 8, H 4096, F 14336        17 + 136 + 477 + 73 =  704   1330   all blocks
    DeepSeek-V2-Lite, 26 x 64, H 2048, F 1408   218 + 443 + 305 + 47 = 1013   1960   pooled full

Full moments of all experts' inputs of DeepSeek-V2-Lite would take 28 GB (1664 x 2048^2 x 4).
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from expert_store import calibration_json
from expert_store.errors import CorruptRecordError, StoreFormatError
from expert_store.files import Disk, layout, read_header, read_tensor
from expert_store.statistics import (
    CalibratedModel,
    CalibrationInfo,
    LayerTensors,
    MomentForm,
    MomentForms,
)
from kernels.types import GROUP_SIZE

CALIBRATION_FILE = "calibration.json"
MAX_JSON_BYTES = 512 << 20


def layer_file(layer: int) -> str:
    """Name of a layer's file in the calibration's folder."""
    return f"layer-{layer:05d}.safetensors"


def save_layer(
    folder: Path,
    layer: int,
    tensors: LayerTensors,
    forms: MomentForms,
    disk: Disk | None = None,
) -> str:
    """Write one layer's file atomically; returns its sha256. Raises StoreWriteError."""
    parts = _parts(tensors, forms)
    shapes = []
    for name, (tensor, form) in parts.items():
        shape = tuple(tensor.shape)
        if form is not None:
            shape = (*shape[:-2], _triangle(shape[-1]))
        shapes.append((name, "F32", shape, 4 * math.prod(shape)))
    header, _ = layout(shapes, {})
    total = len(header) + sum(num_bytes for *_, num_bytes in shapes)

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for tensor, form in parts.values():
            # An expert (of the pool: a group) at a time: triangles are copies.
            for one in tensor if tensor.dim() > 2 else [tensor]:
                yield memoryview(_packed(one, form).numpy()).cast("B")

    return (disk or Disk()).write_atomic(folder / layer_file(layer), total, chunks())


def load_layer(
    folder: Path, layer: int, model: CalibratedModel, forms: MomentForms, sha256: str
) -> LayerTensors:
    """Read one layer's file. Raises CorruptRecordError when its bytes are not those written,
    StoreFormatError when it is missing or its tensors do not fit the model."""
    path = folder / layer_file(layer)
    entries = read_header(path)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CorruptRecordError(
            f"{path}: expected sha256 {sha256}, got {found}; the file is damaged or of another "
            "calibration: copy it again, or run `moetier calibrate` again"
        )
    experts, hidden, ffn = model.num_experts[layer], model.expert.hidden, model.expert.ffn
    tensors = {}
    for name, form, leading, size in (
        ("pooled", forms.pooled, (), hidden),
        ("input", forms.input, (experts,), hidden),
        ("middle", forms.middle, (experts,), ffn),
        *((name, None, (experts,), ffn) for name in _ROWS),
    ):
        shape = (*leading, *_stored_shape(form, size))
        if name not in entries or (entries[name].dtype, entries[name].shape) != ("F32", shape):
            raise StoreFormatError(
                f"{path}: tensor {name!r}: expected float32 {list(shape)}, got "
                f"{entries.get(name)}; calibrate again"
            )
        stored = read_tensor(path, entries[name])
        tensors[name] = stored if form is None else _unpacked(stored)
    return LayerTensors(
        pooled=tensors["pooled"],
        input_E=tensors["input"],
        middle_E=tensors["middle"],
        **{f"{name}_EF": tensors[name] for name in _ROWS},
    )


def save_info(
    folder: Path, info: CalibrationInfo, checksums: Mapping[int, str], disk: Disk | None = None
) -> str:
    """Write calibration.json atomically: after this the folder is a calibration. Returns the id."""
    text, identity = calibration_json.encode(info, checksums)
    (disk or Disk()).write_atomic(folder / CALIBRATION_FILE, len(text), [text])
    return identity


def load_info(folder: Path) -> tuple[CalibrationInfo, dict[int, str], str]:
    """(content, checksum of each layer's file, id). Raises StoreFormatError."""
    path = folder / CALIBRATION_FILE
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise StoreFormatError(
            f"{folder}: no readable {CALIBRATION_FILE} ({error.strerror}); this folder is not a "
            "calibration: make one with `moetier calibrate`"
        ) from error
    if len(text) > MAX_JSON_BYTES:
        raise StoreFormatError(f"{path}: expected at most {MAX_JSON_BYTES} bytes")
    return calibration_json.decode(text, str(path))


_ROWS = ("gate_weight", "up_weight", "sample_middle", "sample_gate_weight", "sample_up_weight")


def _parts(
    tensors: LayerTensors, forms: MomentForms
) -> dict[str, tuple[torch.Tensor, MomentForm | None]]:
    return {
        "pooled": (tensors.pooled, forms.pooled),
        "input": (tensors.input_E, forms.input),
        "middle": (tensors.middle_E, forms.middle),
        **{name: (getattr(tensors, f"{name}_EF"), None) for name in _ROWS},
    }


def _stored_shape(form: MomentForm | None, size: int) -> tuple[int, ...]:
    if form is None:
        return (size,)
    if form == "full":
        return (_triangle(size),)
    return (size // GROUP_SIZE, _triangle(GROUP_SIZE))


def _triangle(size: int) -> int:
    return size * (size + 1) // 2


def _packed(tensor: torch.Tensor, form: MomentForm | None) -> torch.Tensor:
    assert sys.byteorder == "little", "the format is little-endian"
    if form is not None:
        rows, cols = torch.triu_indices(tensor.shape[-1], tensor.shape[-1])
        tensor = tensor[..., rows, cols]
    return tensor.float().contiguous().reshape(-1)


def _unpacked(triangles: torch.Tensor) -> torch.Tensor:
    size = math.isqrt(2 * triangles.shape[-1])
    rows, cols = torch.triu_indices(size, size)
    whole = torch.empty(*triangles.shape[:-1], size, size)
    whole[..., rows, cols] = triangles
    whole[..., cols, rows] = triangles
    return whole
