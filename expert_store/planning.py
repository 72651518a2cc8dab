"""Before the first code is written: a plan for every expert, and what the manifest will say of it.

Reads sample experts where the recipe's solver needs curves. How experts are run in parallel is
`expert_store/compress.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from expert_store.allocate import allocate_ranks, rank_cap
from expert_store.budget import Choice
from expert_store.calibration import Calibration
from expert_store.choose import ExpertUse, choose_plans, prior_use
from expert_store.config import CompressionConfig
from expert_store.curves import measure_choices
from expert_store.plan import CodecPlan, ExpertPlan
from expert_store.recipe import weightings
from expert_store.sampling import ExpertCurves, Sample, choose_samples, curves_by_layer, probe
from expert_store.types import (
    PROJECTIONS,
    BlockKind,
    ExpertKey,
    ExpertWeights,
    ModelInfo,
    Projection,
    Recipe,
)
from kernels.types import TILE_ROWS

ENDS_SHARE = 0.125
FIRST_WEIGHT, LAST_WEIGHT = 4.0, 2.0
"""Of the layers at either end, beside 1 of those between."""

MeasureAll = Callable[[Sequence[Sample]], Sequence[ExpertCurves]]


@dataclass(frozen=True, slots=True)
class ExpertScan:
    """What a first reading of all experts tells: kurtosis, and the weighted energy of each matrix,
    which is what a relative error of 1 in it would move the expert's output by."""

    kurtosis: float
    energy: tuple[float, float, float]  # gate, up, down


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan for every expert, and the recipe with what planning chose."""

    plans: Mapping[ExpertKey, ExpertPlan | CodecPlan]
    recipe: Recipe


def make_plans(
    config: CompressionConfig,
    model: ModelInfo,
    scans: Mapping[ExpertKey, ExpertScan],
    calibration: Calibration | None,
    measure: MeasureAll,
    prior: Mapping[int, float] | None = None,
) -> Planned:
    """Plans as the config's recipe makes them. `measure` gives curves of sample experts, `prior`
    says how much layers matter where the calibration has not measured it.

    Raises ValueError when the config does not fit the model, or the budget is too small.
    """
    recipe = config.as_recipe()
    if calibration is not None:
        recipe = replace(recipe, calibration=calibration.id)
    how = config.how
    plans: dict[ExpertKey, ExpertPlan | CodecPlan]
    if how.codec != "tiles":
        assert recipe.error_bound is not None, "error-bounded recipes have a default bound"
        plans = dict.fromkeys(scans, CodecPlan(how.codec, recipe.error_bound))
    elif how.allocation == "solver":
        plans, recipe = _solved(config, recipe, model, scans, calibration, measure, prior)
    else:
        plans = _by_rank(config, recipe, model, scans)
    for layer_codec in config.layer_codecs:
        if absent := sorted(set(layer_codec.layers) - model.moe_layers.keys()):
            raise ValueError(f"layer_codecs: layer {absent[0]} has no routed experts")
        for key in plans:
            if key.layer in layer_codec.layers:
                plans[key] = CodecPlan(layer_codec.codec, layer_codec.bound)
    return Planned(plans, recipe)


def _by_rank(
    config: CompressionConfig,
    recipe: Recipe,
    model: ModelInfo,
    scans: Mapping[ExpertKey, ExpertScan],
) -> dict[ExpertKey, ExpertPlan | CodecPlan]:
    """One width for all; ranks by kurtosis or the same for all."""
    how = config.how
    cap = rank_cap(model.expert, recipe.factor_bits)
    if how.allocation == "kurtosis":
        kurtosis = {key: scan.kurtosis for key, scan in scans.items()}
        ranks = allocate_ranks(
            kurtosis, avg_rank=recipe.avg_rank, ladder=recipe.rank_ladder, cap=cap
        )
    else:
        ranks = dict.fromkeys(scans, min(recipe.avg_rank, cap) // TILE_ROWS * TILE_ROWS)
    rank_block: BlockKind = "rank"
    return {
        key: ExpertPlan.uniform(
            how.bits[0], how.grids[0], (rank_block,) * (rank // TILE_ROWS), how.group_size
        )
        for key, rank in ranks.items()
    }


def _solved(
    config: CompressionConfig,
    recipe: Recipe,
    model: ModelInfo,
    scans: Mapping[ExpertKey, ExpertScan],
    calibration: Calibration | None,
    measure: MeasureAll,
    prior: Mapping[int, float] | None,
) -> tuple[dict[ExpertKey, ExpertPlan | CodecPlan], Recipe]:
    uses = {key: _use(key, model, scans, calibration) for key in scans}
    samples = choose_samples(model.moe_layers, uses)
    curves = curves_by_layer(samples, measure(samples))
    if calibration is None:
        curves = {layer: _cautious(of_layer) for layer, of_layer in curves.items()}
    assert recipe.budget is not None, "recipes with a solver have a default budget"
    chosen = choose_plans(
        model,
        uses,
        layer_weights(model, calibration, prior),
        curves,
        budget=recipe.budget,
        top_n=config.top_n if config.how.repairs else 0,
    )
    matrices = [m for plan in chosen.plans.values() for m in plan.matrices.values()]
    mean_bits = sum(matrix.bits for matrix in matrices) / len(matrices)
    return dict(chosen.plans), replace(recipe, bits=mean_bits, top_n=chosen.top_n)


def _cautious(curves: ExpertCurves) -> ExpertCurves:
    """Curves with squared errors, for when nobody knows where an error hurts: then few bytes are
    saved by one matrix much coarser than the rest, and a model may break at it."""
    return {
        name: [
            replace(
                choice,
                low_error=choice.low_error**2,
                restored_error=choice.restored_error**2,
            )
            for choice in choices
        ]
        for name, choices in curves.items()
    }


def depth_prior(layers: Sequence[int]) -> dict[int, float]:
    """How much a relative error in each layer is worth where nothing was measured.

    Layers near either end cost most. Measured, over the median of the layers between: smol-moe's
    first eighth 1, 3, 16 and 20, its last 1, 2, 8 and 38 (and layer 11, 148); mixtral-mini's first
    13, last 4; a fine-grained model's 3 and 2.
    """
    ends = max(1, round(ENDS_SHARE * len(layers)))
    weights = [1.0] * len(layers)
    weights[-ends:] = [LAST_WEIGHT] * ends
    weights[:ends] = [FIRST_WEIGHT] * ends
    return dict(zip(sorted(layers), weights, strict=True))


def layer_weights(
    model: ModelInfo,
    calibration: Calibration | None,
    prior: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """Loss per unit of squared error in each layer's MoE output.

    With a calibration: measured nats per unit of relative error over the output's energy; where the
    sensitivity was not measured a relative error counts as `prior` says, without one the same in
    every layer. Without a calibration: the prior, or that of their depth.
    """
    if calibration is None and prior is None:
        return depth_prior(tuple(model.moe_layers))
    measured = {} if calibration is None else calibration.layer_sensitivity
    nats = _sensitivity(tuple(model.moe_layers), measured, prior)
    if calibration is None:
        return nats
    tables = calibration.info.tables
    return {layer: nats[layer] / (tables[layer].output_energy or 1.0) for layer in nats}


def _sensitivity(
    layers: Sequence[int], measured: Mapping[int, float], prior: Mapping[int, float] | None
) -> dict[int, float]:
    """Measured nats; elsewhere the prior, scaled to the layers that have both."""
    if prior is None:
        return {layer: measured.get(layer, 1.0) for layer in layers}
    both = [layer for layer in layers if layer in measured]
    scale = 1.0
    if both:
        scale = sum(measured[layer] for layer in both) / sum(prior[layer] for layer in both)
    return {layer: measured.get(layer, scale * prior[layer]) for layer in layers}


def _use(
    key: ExpertKey,
    model: ModelInfo,
    scans: Mapping[ExpertKey, ExpertScan],
    calibration: Calibration | None,
) -> ExpertUse:
    if calibration is None:
        return prior_use(model.num_experts[key.layer], model.top_k)
    table = calibration.info.tables[key.layer]
    return ExpertUse(
        use_at_K=table.use_at_EK[key.expert],
        weight2_at_K=table.weight2_at_EK[key.expert],
        energy=dict(zip(PROJECTIONS, scans[key].energy, strict=True)),
    )


def curves_of(
    weights: ExpertWeights,
    config: CompressionConfig,
    calibration: Calibration | None,
    *,
    whole: bool = True,
) -> dict[Projection, tuple[Choice, ...]]:
    """The curves of one expert's three matrices, or one point of each."""
    how = config.how if whole else probe(config.how)
    statistics = calibration.expert(weights.key) if calibration is not None else None
    heard = weightings(statistics, how)
    return {
        name: measure_choices(
            getattr(weights, name),
            how,
            heard[name],
            factor_bits=config.factor_bits,
        )
        for name in PROJECTIONS
    }
