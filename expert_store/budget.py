"""A budget of bytes moved per token to one choice per matrix: a knapsack over convex hulls.

Pure: plain numbers in, indices out. Knows no weight, no file and no quantiser. What a choice costs
and loses is told by `expert_store/curves.py`, how often it is paid by the calibration.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from expert_store.plan import MatrixPlan


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store one matrix. Errors are relative weighted error energies (0 is exact)."""

    plan: MatrixPlan
    code_bytes: int
    repair_bytes: int
    low_error: float  # of the codes alone
    restored_error: float  # of the codes with the repair

    def __post_init__(self) -> None:
        if self.code_bytes < 0 or self.repair_bytes < 0:
            raise ValueError(f"choice: negative bytes in {self}")
        if not (self.low_error >= 0 and self.restored_error >= 0):
            raise ValueError(f"choice: errors must be 0 or more, got {self}")


@dataclass(frozen=True, slots=True)
class Item:
    """One matrix of one expert, and how much each of its choices matters.

    `use` is the expected number of times per token that its codes move (cache 0, batch 1: the share
    of tokens that use the expert), `use_restored` likewise for its compensator. `weight_low` and
    `weight_restored` are what a relative error of 1 costs (any unit, one for all items) in uses
    without and with the compensator.
    """

    choices: Sequence[Choice]
    use: float
    use_restored: float
    weight_low: float
    weight_restored: float

    def cost(self, choice: Choice) -> float:
        """Expected bytes moved per token."""
        return self.use * choice.code_bytes + self.use_restored * choice.repair_bytes

    def loss(self, choice: Choice) -> float:
        """Expected loss per token."""
        low = self.weight_low * choice.low_error
        return low + self.weight_restored * choice.restored_error


@dataclass(frozen=True, slots=True)
class Solution:
    """The index of each item's choice, and what all of them cost and lose together."""

    chosen: tuple[int, ...]
    bytes_per_token: float
    loss: float


def solve(items: Sequence[Item], budget_bytes: float) -> Solution:
    """The choices with the least total loss found under `budget_bytes` moved per token.

    Every item starts with its cheapest choice and climbs the lower convex hull of its (cost, loss)
    points; of all next steps the one with the most loss saved per byte goes first, as long as it
    fits. That is optimal for the budgets at which a step ends (Lagrange; Everett 1963), and at most
    one step's saving from optimal between them. The budget is never exceeded.

    Raises ValueError when even the cheapest choices cost more than the budget.
    """
    hulls = [_hull(item) for item in items]
    at = [0] * len(items)
    spent = sum(hull[0][0] for hull in hulls)
    if spent > budget_bytes * (1 + 1e-12):
        raise ValueError(
            f"budget: got {budget_bytes:.0f} bytes per token, but the cheapest choices already "
            f"need {spent:.0f}; raise the budget"
        )
    heap = [_step(hull, 0, i) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        hull, now = hulls[i], at[i]
        more = hull[now + 1][0] - hull[now][0]
        if spent + more > budget_bytes:
            continue  # a cheaper step of another item may still fit
        at[i], spent = now + 1, spent + more
        if now + 2 < len(hull):
            heapq.heappush(heap, _step(hull, now + 1, i))
    chosen = tuple(hulls[i][at[i]][2] for i in range(len(items)))
    pairs = [(item, item.choices[index]) for item, index in zip(items, chosen, strict=True)]
    return Solution(
        chosen=chosen,
        bytes_per_token=sum(item.cost(choice) for item, choice in pairs),
        loss=sum(item.loss(choice) for item, choice in pairs),
    )


_Point = tuple[float, float, int]
"""Cost, loss, index of the choice."""


def _hull(item: Item) -> list[_Point]:
    """The lower convex hull of an item's choices: rising cost, falling loss, falling slope."""
    if not item.choices:
        raise ValueError("item: no choices to choose from")
    points = sorted((item.cost(c), item.loss(c), i) for i, c in enumerate(item.choices))
    hull: list[_Point] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue  # dearer and no better
        while hull and point[0] == hull[-1][0]:
            hull.pop()  # costs the same and loses more: an expert that nobody uses costs nothing
        while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(first: _Point, second: _Point) -> float:
    """Loss saved per byte."""
    return (first[1] - second[1]) / (second[0] - first[0])


def _step(hull: list[_Point], now: int, item: int) -> tuple[float, int]:
    return -_slope(hull[now], hull[now + 1]), item
