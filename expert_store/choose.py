"""From what experts are used for and what choices lose to a plan for every expert.

Pure: knows no weight and no file. The knapsack itself is `expert_store/budget.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expert_store.budget import Choice, Item, Solution, solve
from expert_store.plan import ExpertPlan
from expert_store.types import PROJECTIONS, ExpertKey, ModelInfo, Projection

Curves = Mapping[int, Mapping[Projection, Sequence[Choice]]]
"""Layer -> projection -> what that layer's matrices may be stored as, and what each loses."""

MANY_POSITIONS = 4
"""Up to this top-k every number of restored experts is tried; above, a few."""


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """How often an expert is used, by position in the token's order of router weights, and what a
    relative error of 1 in each of its matrices would move its output by (mean squared norm)."""

    use_at_K: tuple[float, ...]
    weight2_at_K: tuple[float, ...]
    energy: Mapping[Projection, float]

    @property
    def use(self) -> float:
        return sum(self.use_at_K)

    def weight(self, first: int, last: int | None) -> float:
        """Squared router weight per token of the layer, at positions first..last-1."""
        pairs = zip(self.use_at_K[first:last], self.weight2_at_K[first:last], strict=True)
        return sum(use * weight2 for use, weight2 in pairs)


@dataclass(frozen=True, slots=True)
class Choosing:
    """Plans for all experts, how many of a token's experts to restore, what it costs and loses."""

    plans: Mapping[ExpertKey, ExpertPlan]
    top_n: int
    bytes_per_token: float  # expected, with an empty cache and one sequence
    bits_per_weight: float  # those bytes over the weights of the experts that a token uses
    loss: float  # predicted; nats where the layers' sensitivities are, else no unit


def prior_use(num_experts: int, top_k: int) -> ExpertUse:
    """What to assume of an expert without calibration: used as often as every other, router weights
    falling as 1, 1/2, 1/3, ... (0.67 and 0.33 for top-2), every matrix equally important.

    A router weight counts by itself, not by its square: the squares hold when the errors of a
    token's experts are independent, which those of experts grown from one layer are not.
    """
    shares = [1 / (i + 1) for i in range(top_k)]
    return ExpertUse(
        use_at_K=(1 / num_experts,) * top_k,
        weight2_at_K=tuple(share / sum(shares) for share in shares),
        energy=dict.fromkeys(PROJECTIONS, 1.0),
    )


def choose_plans(
    model: ModelInfo,
    uses: Mapping[ExpertKey, ExpertUse],
    layer_weight: Mapping[int, float],
    curves: Curves,
    *,
    budget: float,
    top_n: int | None = None,
) -> Choosing:
    """The plans with the least predicted loss at `budget` bits per expert weight moved.

    `layer_weight` is the loss per unit of squared error in a layer's MoE output. With top_n None
    the number of restored experts that loses least is chosen too.

    Raises ValueError when the budget is below the cheapest codes, naming the least it could be.
    """
    weights = moved_weights(model, uses)
    candidates = [top_n] if top_n is not None else _candidates(model.top_k)
    best: tuple[Solution, int] | None = None
    for candidate in candidates:
        items = [_items(key, uses, layer_weight, curves, candidate) for key in sorted(uses)]
        flat = [item for of_expert in items for item in of_expert]
        solution = _solved(flat, budget, weights)
        # Of equal losses the smaller n: its compensators serve fewer pairs.
        if best is None or solution.loss < best[0].loss * (1 - 1e-9):
            best = solution, candidate
    assert best is not None, "there is at least one candidate"
    solution, chosen_n = best
    return Choosing(
        plans=_plans(uses, curves, solution.chosen, chosen_n),
        top_n=chosen_n,
        bytes_per_token=solution.bytes_per_token,
        bits_per_weight=8 * solution.bytes_per_token / weights,
        loss=solution.loss,
    )


def moved_weights(model: ModelInfo, uses: Mapping[ExpertKey, ExpertUse]) -> float:
    """Expert weights that one token uses on average: top_k experts of every MoE layer."""
    per_expert = 3 * model.expert.hidden * model.expert.ffn
    return per_expert * sum(use.use for use in uses.values())


def _candidates(top_k: int) -> list[int]:
    if top_k <= MANY_POSITIONS:
        return list(range(top_k + 1))
    return sorted({0, 1, 2, 3, top_k // 2, top_k})


def _items(
    key: ExpertKey,
    uses: Mapping[ExpertKey, ExpertUse],
    layer_weight: Mapping[int, float],
    curves: Curves,
    top_n: int,
) -> list[Item]:
    use, weight = uses[key], layer_weight[key.layer]
    return [
        Item(
            choices=curves[key.layer][name],
            use=use.use,
            use_restored=sum(use.use_at_K[:top_n]),
            weight_low=weight * use.energy[name] * use.weight(top_n, len(use.use_at_K)),
            weight_restored=weight * use.energy[name] * use.weight(0, top_n),
        )
        for name in PROJECTIONS
    ]


def _solved(items: Sequence[Item], budget: float, weights: float) -> Solution:
    cheapest = sum(min(item.cost(choice) for choice in item.choices) for item in items)
    budget_bytes = budget * weights / 8
    if cheapest > budget_bytes * (1 + 1e-12):
        raise ValueError(
            f"budget: got {budget:g} bits per weight moved, but the cheapest codes of this recipe "
            f"need {8 * cheapest / weights:.3f}; raise the budget"
        )
    return solve(items, budget_bytes)


def _plans(
    uses: Mapping[ExpertKey, ExpertUse], curves: Curves, chosen: Sequence[int], top_n: int
) -> dict[ExpertKey, ExpertPlan]:
    picked = iter(chosen)
    plans = {}
    for key in sorted(uses):
        matrices = {name: curves[key.layer][name][next(picked)].plan for name in PROJECTIONS}
        restored, all_uses = uses[key].weight(0, top_n), uses[key].weight(0, None)
        plans[key] = ExpertPlan(matrices, restored / all_uses if all_uses else 0.5)
    return plans
