"""A whole tuning: searches each contestant on some traces, judges the chosen ones on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.autoscaling_settings import AutoscalingSettings
from cluster.tune.contest import Contestant, Promise, contestants, score, settings_for, typical
from cluster.tune.search import Score, Trial, Values, best_for, choose, pareto, search
from cluster.tune.serve_decision import ServeDecider
from cluster.tune.simulate import Outcome, Site, simulate
from cluster.tune.trace import Trace

TICK_S = 2.0
"""Between two decisions: of the order of the metrics' age, and hundreds of runs take minutes."""

Progress = Callable[[str, int, int], None]
"""Contestant, trials done, trials to do."""


@dataclass(frozen=True, slots=True)
class Result:
    """One contestant: its trials on the traces tuned on, the chosen, and that on the others."""

    name: str
    trials: tuple[Trial, ...]
    chosen: Trial
    reached: bool  # whether the chosen one is within the limit, on the traces tuned on
    held_out: Score
    outcome: Outcome  # of the chosen one on the first held-out trace

    @property
    def front(self) -> list[Trial]:
        return pareto(self.trials)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was tuned for, and every contestant's result; ours is the first.

    `equal_cost` is ours chosen otherwise: what misses least at no more than the hours of Serve's
    default with all its knobs tuned; None where nothing of ours is as cheap.
    """

    promise: Promise
    site: Site
    tuned_on: tuple[str, ...]
    held_out: tuple[str, ...]
    results: tuple[Result, ...]
    settings: AutoscalingSettings  # ours, chosen
    equal_cost: tuple[Trial, Score] | None

    @property
    def ours(self) -> Result:
        return self.results[0]


def tune(
    traces: Sequence[Trace],
    held_out: Sequence[Trace],
    site: Site,
    promise: Promise,
    *,
    runs: int,
    seed: int = 0,
    progress: Progress = lambda name, done, total: None,
) -> Tuning:
    """Search on `traces`, judge on `held_out`. Same arguments, same result."""
    service = typical(site.service, traces)
    results: list[Result] = []
    contest = contestants(promise, site, service)

    def outcomes_of(contestant: Contestant, values: Values, on: Sequence[Trace]) -> list[Outcome]:
        return [
            simulate(
                trace,
                site,
                ServeDecider(contestant.options(values)),
                seed=seed + number,
                tick_s=TICK_S,
            )
            for number, trace in enumerate(on)
        ]

    for contestant in contest:
        done = 0

        def evaluate(values: Values, contestant: Contestant = contestant) -> Score:
            nonlocal done
            done += 1
            progress(contestant.name, done, runs)
            return score(outcomes_of(contestant, values, traces), promise)

        # Who has more knobs begins with what was found for fewer of them, so as to be no worse.
        fewer = [{**contestant.start, **r.chosen.values} for r in results[1:]]
        trials = search(
            contestant.knobs,
            evaluate,
            runs=runs,
            limit=promise.limit,
            seed=seed,
            starts=[contestant.start, *fewer],
        )
        chosen, reached = choose(trials, promise.limit)
        judged = outcomes_of(contestant, chosen.values, held_out)
        name, held = contestant.name, score(judged, promise)
        results.append(Result(name, tuple(trials), chosen, reached, held, judged[0]))
    equal = best_for(results[0].trials, results[-1].chosen.score.hours)
    equal_cost = None
    if equal is not None:
        equal_cost = equal, score(outcomes_of(contest[0], equal.values, held_out), promise)
    return Tuning(
        promise,
        site,
        tuple(trace.name for trace in traces),
        tuple(trace.name for trace in held_out),
        tuple(results),
        settings_for(results[0].chosen.values, promise, site, service),
        equal_cost,
    )
