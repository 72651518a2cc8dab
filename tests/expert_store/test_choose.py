"""Goal: the chooser spends the budget where tokens are, and says what it spends.

Method: curves and uses made by hand, small enough to reason about.
"""

from __future__ import annotations

import pytest

from expert_store.budget import Choice
from expert_store.choose import ExpertUse, choose_plans, moved_weights, prior_use
from expert_store.plan import MatrixPlan
from expert_store.types import PROJECTIONS, ExpertKey, ExpertShape, ModelInfo

MODEL = ModelInfo(
    name="made-up",
    model_type="mixtral",
    num_layers=2,
    top_k=2,
    vocab_size=16,
    max_positions=16,
    expert=ExpertShape(hidden=64, ffn=128, activation="silu", has_bias=False),
    moe_layers={0: "a", 1: "b"},
    num_experts={0: 4, 1: 4},
)
KEYS = [ExpertKey(layer, expert) for layer in (0, 1) for expert in range(4)]
WEIGHTS = 64 * 128


def choice(bits: int, blocks: int, low: float, restored: float) -> Choice:
    plan = MatrixPlan(bits, "symmetric", ("plane",) * blocks)
    return Choice(plan, bits * WEIGHTS // 8, blocks * WEIGHTS // 8, low, restored)


CHOICES = (
    choice(2, 0, 0.12, 0.12),
    choice(2, 1, 0.12, 0.03),
    choice(3, 0, 0.035, 0.035),
    choice(3, 1, 0.035, 0.01),
    choice(4, 0, 0.01, 0.01),
)
CURVES = {layer: dict.fromkeys(PROJECTIONS, CHOICES) for layer in (0, 1)}
EVEN = dict.fromkeys((0, 1), 1.0)


def test_a_prior_use_sums_to_top_k_experts_per_token():
    uses = {key: prior_use(4, 2) for key in KEYS}
    assert sum(use.use for use in uses.values()) == pytest.approx(2 * 2)
    assert moved_weights(MODEL, uses) == pytest.approx(4 * 3 * WEIGHTS)
    assert prior_use(8, 2).weight2_at_K == pytest.approx((2 / 3, 1 / 3))


@pytest.mark.parametrize("budget", [2.0, 2.25, 2.5, 3.0, 3.7, 4.0])
def test_what_is_said_to_be_spent_is_what_the_plans_cost(budget: float):
    uses = {key: prior_use(4, 2) for key in KEYS}
    chosen = choose_plans(MODEL, uses, EVEN, CURVES, budget=budget)
    spent = 0.0
    for key, plan in chosen.plans.items():
        repair = plan.repair_bytes(MODEL.expert, factor_bits=3, factor_grid="symmetric")
        share = sum(uses[key].use_at_K[: chosen.top_n])
        # The hand-made choices count no scales; count blocks and bits as they do.
        codes = sum(matrix.bits for matrix in plan.matrices.values()) * WEIGHTS // 8
        planes = sum(matrix.num_planes for matrix in plan.matrices.values()) * WEIGHTS // 8
        assert (repair == 0) == (planes == 0)
        spent += uses[key].use * codes + share * planes
    assert chosen.bytes_per_token == pytest.approx(spent)
    assert chosen.bits_per_weight <= budget * (1 + 1e-9)
    assert chosen.bits_per_weight == pytest.approx(8 * spent / moved_weights(MODEL, uses))


def test_skewed_weights_restore_the_first_and_even_weights_widen_all():
    skewed = ExpertUse((0.25, 0.25), (0.81, 0.01), dict.fromkeys(PROJECTIONS, 1.0))
    even = ExpertUse((0.25, 0.25), (0.25, 0.25), dict.fromkeys(PROJECTIONS, 1.0))
    restored = choose_plans(MODEL, dict.fromkeys(KEYS, skewed), EVEN, CURVES, budget=2.5)
    assert restored.top_n == 1
    assert all(m.num_planes == 1 for p in restored.plans.values() for m in p.matrices.values())
    widened = choose_plans(MODEL, dict.fromkeys(KEYS, even), EVEN, CURVES, budget=3.0)
    assert all(
        m.bits == 3 or m.num_planes for p in widened.plans.values() for m in p.matrices.values()
    )


def test_the_layer_that_matters_gets_the_bytes():
    uses = {key: prior_use(4, 2) for key in KEYS}
    chosen = choose_plans(MODEL, uses, {0: 1.0, 1: 100.0}, CURVES, budget=2.5, top_n=1)

    def bits(layer: int) -> float:
        plans = [plan for key, plan in chosen.plans.items() if key.layer == layer]
        return sum(m.bits + m.num_planes for plan in plans for m in plan.matrices.values())

    assert bits(1) > bits(0)


def test_a_fixed_top_n_is_kept_and_zero_restores_nothing():
    uses = {key: prior_use(4, 2) for key in KEYS}
    chosen = choose_plans(MODEL, uses, EVEN, CURVES, budget=3.0, top_n=0)
    assert chosen.top_n == 0
    # Without restored pairs a block repairs nothing that is used: none is bought for its effect.
    assert chosen.loss == pytest.approx(
        sum(
            use.weight(0, 2) * next(c for c in CHOICES if c.plan == plan.matrices[name]).low_error
            for key, plan in chosen.plans.items()
            for use in [uses[key]]
            for name in PROJECTIONS
        )
    )


def test_a_budget_below_the_cheapest_codes_says_the_least_it_could_be():
    uses = {key: prior_use(4, 2) for key in KEYS}
    with pytest.raises(ValueError, match=r"got 1.5 bits per weight moved.*need 2\.000"):
        choose_plans(MODEL, uses, EVEN, CURVES, budget=1.5)
