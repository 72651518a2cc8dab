"""A small store of random experts, built by hand through the format alone: no model, no quantiser.

Only what a reader of records needs (manifest, codes, factors); no dense files, no config.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from expert_store.codecs import cuszp, sz3
from expert_store.codecs.bound import ErrorBound
from expert_store.files import Disk, layout
from expert_store.format import (
    FactorBlock,
    PlaneBlock,
    content_version,
    encode_codes,
    encode_factors,
    encode_parts,
    form_of,
    record_file,
    record_name,
    save_manifest,
)
from expert_store.types import (
    FORMAT_VERSION,
    Codec,
    CodesForm,
    ExpertInfo,
    ExpertKey,
    ExpertShape,
    Manifest,
    ModelInfo,
    Recipe,
    RecordInfo,
    RecordKind,
    RepairForm,
)
from kernels.packing import pack, pack_bf16, pack_symmetric
from kernels.reference import dequantize
from kernels.types import GROUP_SIZE, TILE_ROWS, GatedMLP, Grid, QuantizedMatrix

Triple = tuple[int, int, int]


def build_store(
    folder: Path,
    *,
    layers: tuple[int, ...] = (0, 1),
    experts: int = 3,
    hidden: int = 64,
    ffn: int = 128,
    bits: int | Triple = 2,
    grids: Grid | tuple[Grid, Grid, Grid] = "affine",
    blocks: str = "gudg",
    factor_bits: int = 3,
    factor_grid: Grid = "affine",
    codec: Codec = "tiles",
    has_bias: bool = False,
    seed: int = 0,
) -> Manifest:
    """Write a store whose every expert has the same shape and forms; returns its manifest.

    `bits` and `grids` are of gate, up and down, or of all three, and mean nothing to an
    error-bounded codec; `blocks` as in the manifest.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = ExpertShape(hidden=hidden, ffn=ffn, activation="silu", has_bias=has_bias)
    repair = RepairForm.of_letters(factor_bits, factor_grid, blocks)
    infos: dict[ExpertKey, ExpertInfo] = {}
    for layer in layers:
        keys = [ExpertKey(layer, expert) for expert in range(experts)]
        mlps = [random_mlp(shape, bits if codec == "tiles" else 16, generator, grids) for _ in keys]
        forms, codes = zip(*(_encode(mlp, codec) for mlp in mlps), strict=True)
        factors = [encode_factors(_random_blocks(shape, repair, generator)) for _ in keys]
        code_infos = _write(folder, "codes", layer, codes)
        factor_infos = _write(folder, "factors", layer, factors) if blocks else [None] * experts
        gains = tuple(0.75 / len(blocks) for _ in blocks)  # 0.4 * sqrt(1 - 0.75) is 0.2
        for key, form, code_info, factor_info in zip(
            keys, forms, code_infos, factor_infos, strict=True
        ):
            infos[key] = ExpertInfo(
                key=key,
                form=form,
                codes=code_info,
                factors=factor_info,
                repair=repair,
                kurtosis=3.0,
                error=0.4,
                restored_error=0.2 if blocks else 0.4,
                block_gains=gains,
            )
    mean_bits = fmean(forms[0].bits)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        version="",
        recipe=Recipe(
            name="paper",
            codec=codec,
            bits=mean_bits,
            grid="affine",
            factor_bits=factor_bits,
            factor_grid=factor_grid,
            avg_rank=16,
            rank_ladder=(0, 16, 32),
            top_n=1,
            seed=seed,
        ),
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


def _encode(mlp: GatedMLP, codec: Codec) -> tuple[CodesForm, torch.Tensor]:
    """The codes record; of a codec, with errors up to a tenth of a row's root mean square."""
    if codec == "tiles":
        return form_of(mlp), encode_codes(mlp)
    encode, bound = (sz3 if codec == "sz3" else cuszp).encode, ErrorBound(0.1, "row")
    parts = [encode(dequantize(matrix), bound) for matrix in (mlp.gate, mlp.up, mlp.down)]
    form = CodesForm.streams(codec, [part.numel() for part in parts])
    return form, encode_parts(parts, [mlp.gate_bias, mlp.up_bias, mlp.down_bias])


def random_mlp(
    shape: ExpertShape,
    bits: int | Triple,
    generator: torch.Generator,
    grids: Grid | tuple[Grid, Grid, Grid] = "affine",
) -> GatedMLP:
    """Random codes, with scales that keep outputs near unit size."""
    gate_bits, up_bits, down_bits = (bits,) * 3 if isinstance(bits, int) else bits
    gate_grid, up_grid, down_grid = (grids,) * 3 if isinstance(grids, str) else grids
    biases = [None, None, None]
    if shape.has_bias:
        sizes = (shape.ffn, shape.ffn, shape.hidden)
        biases = [torch.randn(size, generator=generator) for size in sizes]
    return GatedMLP(
        random_matrix(shape.ffn, shape.hidden, gate_bits, generator, gate_grid),
        random_matrix(shape.ffn, shape.hidden, up_bits, generator, up_grid),
        random_matrix(shape.hidden, shape.ffn, down_bits, generator, down_grid),
        "silu",
        *biases,
    )


def random_matrix(
    rows: int, cols: int, bits: int, generator: torch.Generator, grid: Grid = "affine"
) -> QuantizedMatrix:
    if bits == 16:
        return pack_bf16(torch.randn(rows, cols, generator=generator) / cols**0.5)
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator)
    spread = (2**bits - 1) / 3.0  # of uniform codes, about
    if grid == "symmetric":
        scale8 = torch.randint(
            1, 256, (rows, cols // GROUP_SIZE), dtype=torch.uint8, generator=generator
        )
        row_scale = torch.rand(rows, generator=generator) + 0.5
        return pack_symmetric(codes, scale8, 2 * row_scale / (spread * cols**0.5), bits)
    scale = torch.rand(rows, cols // GROUP_SIZE, generator=generator) + 0.5
    scale = scale / (spread * cols**0.5)
    zero = torch.full_like(scale, (2**bits - 1) / 2)
    return pack(codes, scale, zero, bits)


def _random_blocks(
    shape: ExpertShape, repair: RepairForm, generator: torch.Generator
) -> list[FactorBlock | PlaneBlock]:
    made: list[FactorBlock | PlaneBlock] = []
    for block in repair.blocks:
        rows, cols = shape.projection(block.projection)
        if block.kind == "plane":
            plane = random_matrix(rows, cols, 1, generator, "symmetric")
            made.append(PlaneBlock(block.projection, plane))
            continue
        right = random_matrix(TILE_ROWS, cols, repair.bits, generator, repair.grid)
        left_t = random_matrix(TILE_ROWS, rows, repair.bits, generator, repair.grid)
        made.append(FactorBlock(block.projection, right, left_t))
    return made


def _write(
    folder: Path, kind: RecordKind, layer: int, records: Sequence[torch.Tensor]
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
