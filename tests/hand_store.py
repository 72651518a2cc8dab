"""A small store of random experts, built by hand through the format alone: no model, no quantiser.

Only what a reader of records needs (manifest, codes, factors); no dense files, no config.json.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from expert_store.files import Disk, layout
from expert_store.format import (
    FactorBlock,
    content_version,
    encode_codes,
    encode_factors,
    record_file,
    record_name,
    save_manifest,
)
from expert_store.types import (
    FORMAT_VERSION,
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
from kernels.packing import pack
from kernels.types import GROUP_SIZE, TILE_ROWS, GatedMLP, QuantizedMatrix

FACTOR_BITS = 3


def build_store(
    folder: Path,
    *,
    layers: tuple[int, ...] = (0, 1),
    experts: int = 3,
    hidden: int = 64,
    ffn: int = 128,
    bits: int = 2,
    blocks: tuple[Projection, ...] = ("gate", "up", "down", "gate"),
    has_bias: bool = False,
    seed: int = 0,
) -> Manifest:
    """Write a store whose every expert has the same shape and blocks; returns its manifest."""
    generator = torch.Generator().manual_seed(seed)
    shape = ExpertShape(hidden=hidden, ffn=ffn, activation="silu", has_bias=has_bias)
    infos: dict[ExpertKey, ExpertInfo] = {}
    for layer in layers:
        keys = [ExpertKey(layer, expert) for expert in range(experts)]
        codes = [encode_codes(random_mlp(shape, bits, generator)) for _ in keys]
        factors = [encode_factors(_random_blocks(shape, blocks, generator)) for _ in keys]
        code_infos = _write(folder, "codes", layer, codes)
        factor_infos = _write(folder, "factors", layer, factors) if blocks else [None] * experts
        for key, code_info, factor_info in zip(keys, code_infos, factor_infos, strict=True):
            infos[key] = ExpertInfo(key, bits, code_info, factor_info, blocks, 3.0, 0.4, 0.2)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        version="",
        recipe=Recipe("paper", bits, GROUP_SIZE, FACTOR_BITS, 16, (0, 16, 32), 1, seed),
        model=ModelInfo(
            name="by hand",
            model_type="mixtral",
            num_layers=max(layers) + 1,
            top_k=2,
            vocab_size=128,
            max_positions=256,
            expert=shape,
            moe_layers={layer: f"model.layers.{layer}.mlp.experts" for layer in layers},
            num_experts=dict.fromkeys(layers, experts),
        ),
        experts=infos,
        dense_files={},
        side_files={},
    )
    manifest = replace(manifest, version=content_version(manifest))
    save_manifest(folder, manifest)
    return manifest


def random_mlp(shape: ExpertShape, bits: int, generator: torch.Generator) -> GatedMLP:
    """Random codes, with scales that keep outputs near unit size."""
    biases = [None, None, None]
    if shape.has_bias:
        sizes = (shape.ffn, shape.ffn, shape.hidden)
        biases = [torch.randn(size, generator=generator) for size in sizes]
    return GatedMLP(
        random_matrix(shape.ffn, shape.hidden, bits, generator),
        random_matrix(shape.ffn, shape.hidden, bits, generator),
        random_matrix(shape.hidden, shape.ffn, bits, generator),
        "silu",
        *biases,
    )


def random_matrix(rows: int, cols: int, bits: int, generator: torch.Generator) -> QuantizedMatrix:
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator)
    spread = (2**bits - 1) / 3.0  # of uniform codes, about
    scale = torch.rand(rows, cols // GROUP_SIZE, generator=generator) + 0.5
    scale = scale / (spread * cols**0.5)
    zero = torch.full_like(scale, (2**bits - 1) / 2)
    return pack(codes, scale, zero, bits)


def _random_blocks(
    shape: ExpertShape, blocks: tuple[Projection, ...], generator: torch.Generator
) -> list[FactorBlock]:
    made = []
    for name in blocks:
        rows, cols = shape.projection(name)
        right = random_matrix(TILE_ROWS, cols, FACTOR_BITS, generator)
        left_t = random_matrix(TILE_ROWS, rows, FACTOR_BITS, generator)
        made.append(FactorBlock(name, right, left_t))
    return made


def _write(
    folder: Path, kind: RecordKind, layer: int, records: list[torch.Tensor]
) -> list[RecordInfo]:
    tensors = [(record_name(i), "U8", (r.numel(),), r.numel()) for i, r in enumerate(records)]
    header, entries = layout(tensors, {})
    file = record_file(kind, layer)
    chunks = [record.numpy().tobytes() for record in records]
    num_bytes = len(header) + sum(len(chunk) for chunk in chunks)
    Disk().write_atomic(folder / file, num_bytes, [header, *chunks])
    return [
        RecordInfo(file, entry.start, entry.num_bytes, hashlib.sha256(chunk).hexdigest())
        for entry, chunk in zip(entries, chunks, strict=True)
    ]
