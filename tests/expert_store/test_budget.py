"""Goal: the solver never exceeds its budget, never wastes what would fit, and is optimal.

Method: hypothesis draws small knapsacks; brute force over all choices is the oracle.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.budget import Choice, Item, solve
from expert_store.plan import MatrixPlan

PLAN = MatrixPlan(2, "symmetric")


@st.composite
def choices(draw: st.DrawFn) -> tuple[Choice, ...]:
    """As measured curves are: dearer codes lose less, a repair never makes it worse."""
    number = st.integers(1, 40)
    made = []
    for _ in range(draw(st.integers(1, 4))):
        low = draw(number) / 10
        restored = low * draw(st.integers(0, 10)) / 10
        made.append(Choice(PLAN, draw(number), draw(st.integers(0, 20)), low, restored))
    return tuple(made)


@st.composite
def items(draw: st.DrawFn) -> list[Item]:
    share = st.sampled_from([0.0, 0.1, 0.5, 1.0])
    return [
        Item(draw(choices()), draw(share), draw(share), draw(share), draw(share))
        for _ in range(draw(st.integers(1, 4)))
    ]


def everything(problem: list[Item]) -> list[tuple[float, float]]:
    """(cost, loss) of every combination."""
    found = []
    for picked in itertools.product(*(item.choices for item in problem)):
        pairs = list(zip(problem, picked, strict=True))
        found.append((sum(i.cost(c) for i, c in pairs), sum(i.loss(c) for i, c in pairs)))
    return found


@settings(deadline=None, max_examples=200)
@given(items(), st.floats(1.0, 3.0))
def test_the_budget_is_never_exceeded_and_the_books_balance(problem: list[Item], room: float):
    cheapest = sum(min(item.cost(choice) for choice in item.choices) for item in problem)
    budget = cheapest * room + 1e-9
    solution = solve(problem, budget)
    pairs = [(item, item.choices[i]) for item, i in zip(problem, solution.chosen, strict=True)]
    assert solution.bytes_per_token <= budget * (1 + 1e-9)
    assert solution.bytes_per_token == pytest.approx(sum(i.cost(c) for i, c in pairs))
    assert solution.loss == pytest.approx(sum(i.loss(c) for i, c in pairs))


@settings(deadline=None, max_examples=200)
@given(items(), st.floats(1.0, 3.0))
def test_no_combination_of_the_same_bytes_loses_less(problem: list[Item], room: float):
    """The greedy ends on the lower hull of all combinations: what it spends, it spends best."""
    cheapest = sum(min(item.cost(choice) for choice in item.choices) for item in problem)
    solution = solve(problem, cheapest * room + 1e-9)
    # A budget between two hull points is filled by later, smaller steps; then only the bound of
    # one step's saving holds. Where no step was skipped it is the optimum for what it spent.
    steps = [
        max(item.loss(choice) for choice in item.choices)
        - min(item.loss(choice) for choice in item.choices)
        for item in problem
    ]
    best = min(
        loss
        for cost, loss in everything(problem)
        if cost <= solution.bytes_per_token * (1 + 1e-9) + 1e-9
    )
    assert solution.loss <= best + max(steps) + 1e-9


@settings(deadline=None, max_examples=100)
@given(items())
def test_with_room_for_all_every_item_loses_its_least(problem: list[Item]):
    solution = solve(problem, 1e9)
    least = sum(min(item.loss(choice) for choice in item.choices) for item in problem)
    assert solution.loss == pytest.approx(least)


@settings(deadline=None, max_examples=100)
@given(items(), st.floats(1.0, 2.0), st.floats(1.0, 2.0))
def test_more_budget_never_loses_more_at_hull_points(problem: list[Item], room: float, more: float):
    """At the budgets where a step ends, a larger budget gives a loss that is not larger."""
    cheapest = sum(min(item.cost(choice) for choice in item.choices) for item in problem)
    small = solve(problem, cheapest * room + 1e-9)
    large = solve(problem, cheapest * room * more * 4 + 40.0 * len(problem) * 4)
    assert large.loss <= small.loss + 1e-9


def test_compensator_bytes_count_only_where_they_are_fetched():
    """A repair that few uses fetch is bought before wider codes that every use moves."""
    codes = Choice(PLAN, 100, 0, 1.0, 1.0)
    repaired = Choice(PLAN, 100, 100, 1.0, 0.2)
    wider = Choice(PLAN, 200, 0, 0.2, 0.2)
    item = Item((codes, repaired, wider), 1.0, 0.25, weight_low=0.1, weight_restored=0.9)
    assert solve([item], 125.0).chosen == (1,)
    assert solve([item], 200.0).chosen == (2,)
    rarely = Item((codes, repaired, wider), 1.0, 1.0, weight_low=0.9, weight_restored=0.1)
    assert solve([rarely], 200.0).chosen == (2,)


def test_an_expert_that_no_token_uses_costs_nothing_and_takes_the_best():
    item = Item(
        (Choice(PLAN, 100, 0, 1.0, 1.0), Choice(PLAN, 200, 0, 0.1, 0.1)), 0.0, 0.0, 0.0, 0.0
    )
    assert solve([item], 0.0).bytes_per_token == 0.0


def test_a_budget_under_the_cheapest_is_refused_with_both_figures():
    item = Item((Choice(PLAN, 100, 0, 1.0, 1.0),), 1.0, 0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"got 50 bytes per token.*need 100; raise the budget"):
        solve([item], 50.0)


def test_a_choice_with_negative_figures_is_refused():
    with pytest.raises(ValueError, match="negative bytes"):
        Choice(PLAN, -1, 0, 1.0, 1.0)
    with pytest.raises(ValueError, match="errors must be 0 or more"):
        Choice(PLAN, 1, 0, float("nan"), 1.0)
