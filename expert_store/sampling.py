"""Whose curves are measured for the solver, and what those of all the others are taken to be.

A whole curve costs some fifteen times what compressing the matrix does, a single point about one.
Layers differ, most of all where a few tokens of huge norm have most of the energy. So one expert of
every layer gives a point, experts of a few layers whole curves, and a layer's curves are the
nearest whole ones scaled to its own point. Knows no weight and no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from expert_store.budget import Choice
from expert_store.choose import ExpertUse
from expert_store.methods import Methods
from expert_store.types import PROJECTIONS, ExpertKey, Projection

MAX_WHOLE = 6
"""Layers whose curves are measured whole."""

ExpertCurves = Mapping[Projection, Sequence[Choice]]


@dataclass(frozen=True, slots=True)
class Sample:
    """An expert to be measured: at every choice that the recipe has, or at one (`probe`)."""

    key: ExpertKey
    whole: bool


def choose_samples(layers: Iterable[int], uses: Mapping[ExpertKey, ExpertUse]) -> list[Sample]:
    """The most used expert of every layer; whole ones evenly from the first layer to the last."""
    ordered = sorted(layers)
    count = min(MAX_WHOLE, len(ordered))
    whole = {ordered[round(i * (len(ordered) - 1) / max(1, count - 1))] for i in range(count)}
    samples = []
    for layer in ordered:
        keys = [key for key in uses if key.layer == layer]
        most_used = max(keys, key=lambda key: (uses[key].use, -key.expert))
        samples.append(Sample(most_used, layer in whole))
    return samples


def probe(how: Methods) -> Methods:
    """The methods that give a sample's one point: the codes alone, of a middle width."""
    return replace(how, bits=(how.bits[len(how.bits) // 2],), grids=how.grids[:1], repairs=())


def curves_by_layer(
    samples: Sequence[Sample], measured: Sequence[ExpertCurves]
) -> dict[int, ExpertCurves]:
    """A curve for every layer. `measured` are those of the samples, in their order."""
    pairs = list(zip(samples, measured, strict=True))
    whole = {sample.key.layer: curves for sample, curves in pairs if sample.whole}
    found = {}
    for sample, curves in pairs:
        layer = sample.key.layer
        nearest = whole[min(whole, key=lambda known: (abs(known - layer), known))]
        found[layer] = curves if sample.whole else _scaled(nearest, curves)
    return found


def _scaled(curves: ExpertCurves, point: ExpertCurves) -> ExpertCurves:
    """Curves through another expert's point."""
    return {name: _through(curves[name], point[name][0]) for name in PROJECTIONS}


def _through(choices: Sequence[Choice], point: Choice) -> Sequence[Choice]:
    own = next(choice for choice in choices if choice.plan == point.plan).low_error
    if not own > 0:
        return choices
    ratio = point.low_error / own
    return [
        replace(
            choice,
            low_error=choice.low_error * ratio,
            restored_error=choice.restored_error * ratio,
        )
        for choice in choices
    ]
