"""Runs seeds: what went wrong with each, the smallest plan that still does, a table of many."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.sim.assets import PROMPTS, Assets
from tests.sim.clockwork import Stuck
from tests.sim.fault_plan import Plan, draw
from tests.sim.judging import judge
from tests.sim.simulation import Simulation


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: the promises it broke, its log, and how much happened."""

    plan: Plan
    problems: tuple[str, ...]
    events: tuple[str, ...]
    num_steps: int
    num_ok: int
    num_degraded: int
    num_failed: int

    @property
    def digest(self) -> str:
        """The same for the same events at the same times."""
        return hashlib.sha256("\n".join(self.events).encode()).hexdigest()[:16]


def run_plan(plan: Plan, assets: Assets) -> Outcome:
    """Play one plan and judge it."""
    simulation = Simulation(plan, assets)
    try:
        simulation.run()
        problems = judge(simulation)
    except Stuck as error:
        problems = [f"stuck: {error}"]
    ended = [
        a for a in simulation.answers if a.ended_s is not None and not a.left and a.crash is None
    ]
    failed = [answer for answer in ended if answer.error is not None]
    return Outcome(
        plan,
        tuple(problems),
        tuple(simulation.events),
        simulation.num_steps,
        num_ok=len(ended) - len(failed),
        num_degraded=sum(a.is_degraded for a in ended if a.error is None),
        num_failed=len(failed),
    )


def run_seed(seed: int, assets: Assets) -> Outcome:
    return run_plan(draw(seed, num_prompts=len(PROMPTS)), assets)


def first_failure(
    seeds: Iterable[int], assets: Assets, told: Callable[[Outcome], None] = lambda _: None
) -> Outcome | None:
    """The first seed that breaks a promise."""
    for seed in seeds:
        outcome = run_seed(seed, assets)
        told(outcome)
        if outcome.problems:
            return outcome
    return None


def shrink(outcome: Outcome, assets: Assets) -> Outcome:
    """Drop faults and requests one by one as long as some promise stays broken."""
    smaller = True
    while smaller:
        smaller = False
        for fault in outcome.plan.faults:
            tried = run_plan(outcome.plan.without(fault), assets)
            if tried.problems:
                outcome, smaller = tried, True
                break
    return outcome
