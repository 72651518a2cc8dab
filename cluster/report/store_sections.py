"""Sections about stores and routers: what was allocated where, kurtosis and error, router skew.

Manifests and calibrations in, sections out; no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cluster.report.figures import spearman
from cluster.report.page import Part, Picture, Section, Table
from cluster.report.plots import Dot, curves, heat_map, scatter
from expert_store.statistics import LayerTable
from expert_store.types import PROJECTIONS, ExpertInfo, Manifest
from gpu_worker.replay import LayerTrace

Infos: TypeAlias = Mapping[tuple[int, int], ExpertInfo]
Values: TypeAlias = dict[tuple[int, int], float]
"""By (layer, expert)."""


@dataclass(frozen=True, slots=True)
class LayerSkew:
    """How unevenly one layer's router spreads tokens: over experts and over positions."""

    layer: int
    use_E: tuple[float, ...]  # share of (token, expert) pairs, falling
    weight_K: tuple[float, ...]  # mean share of a token's router weight, by position


def allocation_section(label: str, name: str, manifest: Manifest) -> Section:
    """Heat maps by layer and expert: bits of the codes, and bits and rank of the compensators."""
    layers = sorted(manifest.model.moe_layers)
    widest = max(manifest.model.num_experts.values())
    weights = 3 * manifest.model.expert.hidden * manifest.model.expert.ffn
    infos = {(info.key.layer, info.key.expert): info for info in manifest.experts.values()}

    def grid(value: Values) -> list[list[float]]:
        return [[value.get((layer, e), math.nan) for e in range(widest)] for layer in layers]

    maps = {
        "bits": ("bits per weight", "codes, scales counted", _codes_bits(infos, weights)),
        "repair": ("bits per weight", "compensators", _repair_bits(infos, weights)),
        "rank": ("rank", "compensators, mean of the projections", _mean_rank(infos)),
    }
    parts: list[Part] = []
    for key, (unit, what, values) in maps.items():
        if len(set(values.values())) == 1:
            parts.append(
                f"{unit.capitalize()}, {what}: {next(iter(values.values())):.3f} for every expert."
            )
            continue
        svg = heat_map(
            grid(values),
            rows=[str(layer) for layer in layers],
            columns=[str(expert) for expert in range(widest)],
            x_label="expert",
            y_label="layer",
            value_label=unit,
        )
        caption = f"{label}: {unit}, {what}, by layer and expert."
        parts.append(Picture(f"{key}-{name}", svg, caption))
    parts.append(_projections(list(infos.values())))
    return Section(f"Bits and rank by layer and expert: {label}", tuple(parts))


def _codes_bits(infos: Infos, weights: int) -> Values:
    return {key: 8 * info.codes.num_bytes / weights for key, info in infos.items()}


def _repair_bits(infos: Infos, weights: int) -> Values:
    return {
        key: 0.0 if info.factors is None else 8 * info.factors.num_bytes / weights
        for key, info in infos.items()
    }


def _mean_rank(infos: Infos) -> Values:
    return {
        key: sum(info.repair.rank(name) for name in PROJECTIONS) / len(PROJECTIONS)
        for key, info in infos.items()
    }


def _projections(infos: Sequence[ExpertInfo]) -> Table:
    """Means by projection over all experts."""
    cells: list[dict[str, str | None]] = []
    for place, name in enumerate(PROJECTIONS):
        grids = [info.form.grids[place] for info in infos]
        planes = [info.repair.num_blocks(name, "plane") for info in infos]
        cells.append(
            {
                "projection": name,
                "code bits": f"{sum(info.form.bits[place] for info in infos) / len(infos):.2f}",
                "symmetric grid": f"{100 * grids.count('symmetric') / len(grids):.0f} %",
                "mean rank": f"{sum(info.repair.rank(name) for info in infos) / len(infos):.1f}",
                "with a plane": f"{100 * sum(map(bool, planes)) / len(planes):.0f} %",
            }
        )
    return Table.of(cells)


def kurtosis_section(manifests: Mapping[str, Manifest]) -> Section:
    """Whether an expert's kurtosis tells its quantisation error, store by store."""
    groups: dict[str, list[Dot]] = {}
    cells: list[dict[str, str | None]] = []
    for label, manifest in manifests.items():
        infos = list(manifest.experts.values())
        kurtosis = [info.kurtosis for info in infos]
        groups[label] = [Dot(info.kurtosis, info.error) for info in infos]
        whole = spearman(kurtosis, [info.error for info in infos])
        within = _within_layers(infos)
        cells.append(
            {
                "experts": label,
                "number": str(len(infos)),
                "Spearman": None if whole is None else f"{whole:+.3f}",
                "within layers, mean": None if within is None else f"{within:+.3f}",
                "kurtosis": f"{min(kurtosis):.2f} to {max(kurtosis):.2f}",
                "error": f"{min(i.error for i in infos):.4f} to {max(i.error for i in infos):.4f}",
            }
        )
    svg = scatter(
        groups, x_label="kurtosis of the weights", y_label="relative error of the codes alone"
    )
    note = (
        "A dot is an expert; a Gaussian has kurtosis 3. Rank correlation over all experts, and its "
        "mean over layers: the second is free of what differs between layers. Errors are weighted "
        "as the recipe's calibration says, so compare recipes by their loss, not by these."
    )
    caption = "Kurtosis of an expert's weights against the error of its codes."
    parts = (Picture("kurtosis", svg, caption), Table.of(cells), note)
    return Section("Kurtosis against quantisation error", parts)


def _within_layers(infos: Sequence[ExpertInfo]) -> float | None:
    found = []
    for layer in sorted({info.key.layer for info in infos}):
        own = [info for info in infos if info.key.layer == layer]
        rho = spearman([info.kurtosis for info in own], [info.error for info in own])
        found += [] if rho is None else [rho]
    return sum(found) / len(found) if found else None


def skew_of_tables(tables: Mapping[int, LayerTable]) -> list[LayerSkew]:
    """From a calibration."""
    skews = []
    for layer, table in sorted(tables.items()):
        pairs = sum(table.tokens_E) or 1
        use = sorted((tokens / pairs for tokens in table.tokens_E), reverse=True)
        skews.append(LayerSkew(layer, tuple(use), tuple(table.skew_K)))
    return skews


def skew_of_traces(
    layers: Mapping[int, LayerTrace], num_experts: Mapping[int, int]
) -> list[LayerSkew]:
    """From where the tokens of some windows went."""
    skews = []
    for layer, trace in sorted(layers.items()):
        counts = trace.topk_ids_WTK.flatten().bincount(minlength=num_experts[layer])
        use = (counts / counts.sum()).sort(descending=True).values
        weights = trace.topk_weights_WTK.flatten(0, 1).sort(dim=1, descending=True).values
        share_K = (weights / weights.sum(dim=1, keepdim=True)).mean(dim=0)
        skews.append(LayerSkew(layer, tuple(use.tolist()), tuple(share_K.tolist())))
    return skews


def skew_section(skews: Sequence[LayerSkew], origin: str) -> Section:
    """Router weight by position and use of experts by rank; `origin` says on what text."""
    by_layer = {f"layer {skew.layer}": skew for skew in skews}
    weight = curves(
        {name: skew.weight_K for name, skew in by_layer.items()},
        x_label="expert of a token, by falling router weight",
        y_label="mean share of the router weight",
    )
    use = curves(
        {name: skew.use_E for name, skew in by_layer.items()},
        x_label="expert of a layer, by falling use",
        y_label="share of (token, expert) pairs",
    )
    cells: list[dict[str, str | None]] = [
        {
            "layer": str(skew.layer),
            "weight of the first": f"{skew.weight_K[0]:.3f}",
            "of the last": f"{skew.weight_K[-1]:.3f}",
            "use of the first expert": f"{skew.use_E[0]:.3f}",
            "of the last expert": f"{skew.use_E[-1]:.3f}",
            "busiest quarter": f"{sum(skew.use_E[: max(1, len(skew.use_E) // 4)]):.3f}",
        }
        for skew in skews
    ]
    parts = (
        f"Measured on {origin}.",
        Picture("skew-weight", weight, "Router weight by a token's expert, one curve a layer."),
        Picture("skew-use", use, "Use of the experts of a layer, one curve a layer."),
        Table.of(cells),
    )
    return Section("Router skew", parts)
