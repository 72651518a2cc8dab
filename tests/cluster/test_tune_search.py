"""Goal: the search finds what is good, says what it cannot find, and step times come out of steps.

Method: made-up scores whose best is known, steps made from known times with noise, properties.
"""

from __future__ import annotations

import random

import pytest

from cluster.tune.fit import Fit, Step, fit
from cluster.tune.search import (
    Knob,
    Score,
    Trial,
    Values,
    best_for,
    choose,
    latin_hypercube,
    pareto,
    search,
)

KNOBS = (Knob("more", 1, 100, is_log=True), Knob("other", -1, 1))


def made_up(values: Values) -> Score:
    """More costs more and misses less; `other` should be 0.3."""
    violations = 1 / values["more"] + 0.05 * abs(values["other"] - 0.3)
    return Score(violations, values["more"] + values["other"] ** 2, violations)


def test_the_cheapest_within_the_limit_is_found() -> None:
    trials = search(KNOBS, made_up, runs=80, limit=0.05, seed=1)
    assert len(trials) == 80
    chosen, reached = choose(trials, 0.05)
    assert reached
    assert chosen.score.hours < 24  # 20.1 is the best there is
    assert trials == search(KNOBS, made_up, runs=80, limit=0.05, seed=1)
    assert trials != search(KNOBS, made_up, runs=80, limit=0.05, seed=2)
    first_half = choose(trials[:40], 0.05)[0]
    assert chosen.score.hours <= first_half.score.hours


def test_what_cannot_be_reached_is_said_and_the_best_given() -> None:
    trials = search(KNOBS, made_up, runs=20, limit=0.0, seed=1)
    chosen, reached = choose(trials, 0.0)
    assert not reached
    assert chosen.score.violations == min(trial.score.violations for trial in trials)
    with pytest.raises(ValueError, match="runs: got 1"):
        search(KNOBS, made_up, runs=1, limit=0.0, seed=1)


def test_a_mean_within_the_limit_is_not_enough() -> None:
    lucky = Trial({}, Score(violations=0.01, hours=1, worst=0.04))
    even = Trial({}, Score(violations=0.015, hours=2, worst=0.02))
    assert choose([lucky, even], 0.02) == (even, True)
    assert choose([lucky, even], 0.015) == (even, False)


def test_places_are_spread() -> None:
    places = latin_hypercube(3, 50, random.Random(2))
    for column in zip(*places, strict=True):
        assert sorted(int(at * 50) for at in column) == list(range(50))


def test_known_settings_are_tried_first() -> None:
    start = {"more": 25.0, "other": 0.5}
    trials = search(KNOBS, made_up, runs=10, limit=0.05, seed=1, starts=[start])
    assert trials[0].values == start
    assert len(trials) == 10


def test_knobs_stay_in_their_range() -> None:
    assert [KNOBS[0].place(value) for value in (0.1, 1, 10, 1000)] == [0, 0, 0.5, 1]
    assert KNOBS[1].place(0.5) == 0.75
    assert [KNOBS[0].at(place) for place in (-1, 0, 0.5, 1, 2)] == [1, 1, 10, 100, 100]
    assert KNOBS[1].at(0.75) == 0.5


def test_front_and_equal_cost() -> None:
    trials = [
        Trial({}, Score(violations, hours, violations))
        for violations, hours in ((0.5, 1), (0.2, 2), (0.3, 3), (0.2, 4), (0.1, 5))
    ]
    assert [(t.score.violations, t.score.hours) for t in pareto(trials)] == [
        (0.5, 1),
        (0.2, 2),
        (0.1, 5),
    ]
    best = best_for(trials, 3.5)
    assert best is not None
    assert (best.score.violations, best.score.hours) == (0.2, 2)
    assert best_for(trials, 0.5) is None


def steps(step_s: float, sequence_s: float, token_s: float, seed: int = 0) -> list[Step]:
    draw = random.Random(seed)
    made = []
    for sequences in (1, 2, 4, 8):
        for prompt in (0, 16 * sequences, 32 * sequences):
            for _ in range(9):
                noise = 1 + abs(draw.gauss(0, 0.02)) + (3 if draw.random() < 0.1 else 0)
                num = 0 if prompt else sequences
                seconds = (step_s + sequence_s * num + token_s * prompt) * noise
                made.append(Step(prompt, num, seconds))
    return made


def test_times_are_found_again_under_noise_and_outliers() -> None:
    found = fit(steps(0.02, 0.003, 0.001))
    assert found.step_s == pytest.approx(0.02, rel=0.1)
    assert found.sequence_s == pytest.approx(0.003, rel=0.1)
    assert found.prompt_token_s == pytest.approx(0.001, rel=0.1)
    assert found.error < 0.05
    assert found.num_steps == 4 * 3 * 9


def test_no_time_is_negative() -> None:
    # Larger batches that are quicker: noise, not a gain.
    found = fit([Step(0, 1, 0.03), Step(0, 8, 0.02), Step(100, 0, 0.1), Step(10, 0, 0.03)])
    assert found.sequence_s == 0
    assert found.step_s > 0
    assert found.prompt_token_s > 0


def test_too_few_kinds_of_steps_are_no_fit() -> None:
    for few in ([], [Step(0, 1, 0.1)] * 9, [Step(8, 0, 0.1), Step(0, 1, 0.1)]):
        with pytest.raises(ValueError, match="measure longer"):
            fit(few)
    with pytest.raises(ValueError, match="step_s: got 0"):
        Fit(0, 0, 0)
