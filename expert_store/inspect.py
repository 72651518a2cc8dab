"""What a store holds, in figures, from its manifest: sizes, ranks, errors, bytes per token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from expert_store.format import load_manifest
from expert_store.types import (
    BLOCK_KINDS,
    PROJECTIONS,
    ExpertInfo,
    ExpertShape,
    Manifest,
)


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One MoE layer; counts and bytes are sums over its experts, all else means.

    `bits` are code bits per weight: of tiles without scales and zeros, of a codec all it stores.
    """

    layer: int
    num_experts: int
    bits: float
    matrices: dict[str, int]  # by grid; bfloat16 and the codecs by their names
    rank: float  # mean over experts and projections
    blocks: dict[str, int]  # by kind
    kurtosis: float
    error: float
    restored_error: float
    codes_bytes: int
    factors_bytes: int


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """A whole store. Bits per weight count scales, zeros and padding."""

    store: Path
    manifest: Manifest
    layers: tuple[LayerSummary, ...]
    codes_bytes: int
    factors_bytes: int
    dense_bytes: int
    original_expert_bytes: int  # the same experts in bfloat16
    code_bits_per_weight: float
    expert_bits_per_weight: float  # codes and factors
    ranks: dict[int, int]  # rank -> number of experts
    bytes_per_token: int
    original_bytes_per_token: int


def summarize(store: Path) -> StoreSummary:
    """Read the manifest and add it up. Raises StoreFormatError when it is not a store."""
    store = Path(store)
    manifest = load_manifest(store)
    infos = list(manifest.experts.values())
    model = manifest.model
    layers = tuple(
        _layer(
            layer,
            [info for info in infos if info.key.layer == layer],
            model.expert.hidden * model.expert.ffn,
        )
        for layer in model.moe_layers
    )
    weights = _weights(model.expert) * len(infos)
    codes = sum(layer.codes_bytes for layer in layers)
    factors = sum(layer.factors_bytes for layer in layers)
    return StoreSummary(
        store=store,
        manifest=manifest,
        layers=layers,
        codes_bytes=codes,
        factors_bytes=factors,
        dense_bytes=sum(
            path.stat().st_size
            for path in (store / name for name in manifest.dense_files)
            if path.is_file()
        ),
        original_expert_bytes=2 * weights,
        code_bits_per_weight=8 * codes / weights,
        expert_bits_per_weight=8 * (codes + factors) / weights,
        ranks=dict(sorted(Counter(_mean_rank(info) for info in infos).items())),
        bytes_per_token=bytes_per_token(manifest),
        original_bytes_per_token=2 * _weights(model.expert) * model.top_k * len(layers),
    )


def bytes_per_token(manifest: Manifest, top_n: int | None = None) -> int:
    """Expert bytes that one token moves, at batch 1 with nothing cached.

    Sum over MoE layers of k * mean codes + n * mean factors, where n is the recipe's top_n unless
    given: every expert of the layer counts the same, as if routing were uniform.
    """
    num_restored = manifest.recipe.top_n if top_n is None else top_n
    total = 0.0
    for layer in manifest.model.moe_layers:
        infos = [info for info in manifest.experts.values() if info.key.layer == layer]
        total += manifest.model.top_k * fmean(info.codes.num_bytes for info in infos)
        total += num_restored * fmean(_factors_bytes(info) for info in infos)
    return round(total)


def _layer(layer: int, infos: Sequence[ExpertInfo], num_weights: int) -> LayerSummary:
    """`num_weights` is that of one matrix."""
    return LayerSummary(
        layer=layer,
        num_experts=len(infos),
        bits=fmean(info.form.mean_bits(num_weights) for info in infos),
        matrices=dict(Counter(name for info in infos for name in _coded_as(info))),
        rank=fmean(info.repair.rank(name) for info in infos for name in PROJECTIONS),
        blocks={
            kind: sum(block.kind == kind for info in infos for block in info.repair.blocks)
            for kind in BLOCK_KINDS
        },
        kurtosis=fmean(info.kurtosis for info in infos),
        error=fmean(info.error for info in infos),
        restored_error=fmean(info.restored_error for info in infos),
        codes_bytes=sum(info.codes.num_bytes for info in infos),
        factors_bytes=sum(_factors_bytes(info) for info in infos),
    )


def _factors_bytes(info: ExpertInfo) -> int:
    return 0 if info.factors is None else info.factors.num_bytes


def _mean_rank(info: ExpertInfo) -> int:
    return round(fmean(info.repair.rank(name) for name in PROJECTIONS))


def _coded_as(info: ExpertInfo) -> Iterator[str]:
    """For each matrix of an expert, its grid, or "bf16", or its codec."""
    for bits, grid in zip(info.form.bits, info.form.grids, strict=True):
        if info.form.codec != "tiles":
            yield info.form.codec
        else:
            yield "bf16" if bits == 16 else grid


def _weights(shape: ExpertShape) -> int:
    return 3 * shape.hidden * shape.ffn
