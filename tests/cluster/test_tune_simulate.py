"""Goal: the simulated cluster loses no request unsaid, pays for what runs, and decides as Serve.

Method: hand-made deciders with known answers, invariants on seeded traces, and Serve's own policy
against the arithmetic of its documentation. No Ray is started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from cluster.autoscaling_rules import ServiceTimes, Targets, Worker
from cluster.autoscaling_settings import AutoscalingSettings
from cluster.tune.generate import Made, generate
from cluster.tune.serve_decision import ServeDecider
from cluster.tune.simulate import Outcome, Site, View, simulate
from cluster.tune.trace import Request, Trace

SERVICE = ServiceTimes(0.03, 0.004, 0.0015, 128, 48)
SITE = Site(SERVICE, Worker(slots=4, prefill_chunk=128), start_s=20, max_replicas=5)


class Plan:
    """Decides by the clock: (from second, replicas) pairs; notes what it was shown."""

    look_back_s = 10.0
    metrics_interval_s = 2.0
    reads_gauges = True

    def __init__(self, *plan: tuple[float, int]) -> None:
        self.plan = plan
        self.seen: list[View] = []

    def decide(self, view: View) -> int:
        self.seen.append(view)
        return [num for from_s, num in self.plan if view.now_s >= from_s][-1]


def evenly(num: int, every_s: float, prompt: int = 10, answer: int = 10) -> Trace:
    return Trace("even", tuple(Request(n * every_s, prompt, answer) for n in range(num)))


def test_what_runs_is_paid_from_order_to_end() -> None:
    # One all the time, a second one from 30 to 60: it serves from 50 on, is idle and ends at once.
    outcome = simulate(evenly(101, 1.0), SITE, Plan((0, 1), (30, 2), (60, 1)))
    assert outcome.replica_s == pytest.approx(100 + 30, abs=1.5)
    ready = {moment.now_s: moment.ready for moment in outcome.moments}
    assert (ready[29], ready[49], ready[51], ready[61]) == (1, 1, 2, 1)


def test_a_worker_that_is_to_end_serves_what_it_has_for_a_while() -> None:
    long = Trace(
        "long", (*(Request(25 + 0.1 * n, 10, 1500) for n in range(4)), Request(200.0, 1, 1))
    )
    kept = simulate(long, SITE, Plan((0, 2), (30, 1)), seed=1)
    # A second of decoding gives about 26 tokens: 15 s more are not enough for 1500 of them.
    assert 1 <= sum(served.lost for served in kept.served) <= 3
    patient = dataclasses.replace(SITE, drain_s=300.0)
    kept = simulate(long, patient, Plan((0, 2), (30, 1)), seed=1)
    assert not any(served.lost for served in kept.served)


def test_gauges_are_what_serve_would_have_got() -> None:
    plan = Plan((0, 1))
    simulate(evenly(120, 0.5, prompt=20, answer=5), SITE, plan)
    late = [view for view in plan.seen if 40 < view.now_s < 59]
    for name, expected in (
        ("moetier_arrivals_per_s", 2.0),
        ("moetier_prompt_tokens_per_s", 2.0 * 19),  # the first answer token counts as its own
        ("moetier_answer_tokens_per_s", 2.0 * 5),
    ):
        means = [view.gauges[name][0] for view in late]
        assert means == [pytest.approx(expected, rel=0.25)] * len(means)
    busy = late[-1].gauges["moetier_busy_share"][0]
    # Each request costs one step of its prompt and four of one token, alone or two at a time.
    assert busy == pytest.approx(2 * (0.03 + 20 * 0.0015 + 4 * 0.034), rel=0.15)
    assert plan.seen[0].gauges == {}


def test_too_much_is_refused_not_queued_for_ever() -> None:
    site = dataclasses.replace(SITE, max_waiting=2, max_queued=3)
    flood = Trace("flood", tuple(Request(0.0, 10, 10) for _ in range(50)))
    outcome = simulate(flood, site, Plan((0, 1)))
    assert sum(served.lost for served in outcome.served) == 50 - (4 + 2) - 3


def check(outcome: Outcome, trace: Trace, site: Site) -> None:
    assert [served.request for served in outcome.served] == list(trace.requests)
    for served in outcome.served:
        if served.lost:
            continue
        assert served.first_s is not None
        assert served.end_s is not None
        least = site.service.prefill_s(min(served.request.prompt_tokens, 128))
        assert served.first_s >= served.request.arrival_s + least - 1e-6
        assert served.per_token_s >= site.service.decode_s(1) - 1e-6 or (
            served.request.answer_tokens == 1
        )
    assert all(0 <= moment.ready <= site.max_replicas * 2 for moment in outcome.moments)
    assert all(
        site.min_replicas <= moment.target <= site.max_replicas for moment in outcome.moments
    )


OURS = AutoscalingSettings(
    max_replicas=5,
    upscale_delay_s=0,
    downscale_delay_s=60,
    downscale_to_zero_delay_s=60,
    targets=Targets(ttft_s=2.0, per_token_s=0.1),
    service=SERVICE,
)


def deciders(low: int = 1) -> Sequence[ServeDecider]:
    ours = dataclasses.replace(OURS, min_replicas=low)
    limits = {"min_replicas": low, "max_replicas": 5, "initial_replicas": 1}
    return (
        ServeDecider(ours.serve_config(slots=4, prefill_chunk=128)),
        ServeDecider({**limits, "target_ongoing_requests": 2, "downscale_delay_s": 60.0}),
    )


@pytest.mark.parametrize("kind", ["step", "bursts"])
@pytest.mark.parametrize("which", [0, 1])
def test_every_request_ends_and_runs_repeat(kind: str, which: int) -> None:
    trace = generate(Made(kind, 900, 1.0, 128, 48, seed=7))
    outcome = simulate(trace, SITE, deciders()[which], seed=3)
    check(outcome, trace, SITE)
    assert outcome == simulate(trace, SITE, deciders()[which], seed=3)
    assert max(moment.target for moment in outcome.moments) > 1


@pytest.mark.parametrize("which", [0, 1])
def test_nothing_to_do_costs_nothing_and_the_next_request_starts_one(which: int) -> None:
    site = dataclasses.replace(SITE, min_replicas=0)
    trace = Trace("rare", (Request(0.0, 10, 10), Request(400.0, 10, 10), Request(900.0, 10, 10)))
    outcome = simulate(trace, site, deciders(low=0)[which])
    check(outcome, trace, site)
    assert not any(served.lost for served in outcome.served)
    targets = {moment.now_s: moment.target for moment in outcome.moments}
    assert targets[300] == targets[800] == 0
    # At once, and then a worker has to start.
    assert outcome.served[1].ttft_s == pytest.approx(20, abs=2.5)


def view(now_s: float, target: int, num: int, total: float) -> View:
    return View(now_s, target, tuple(range(num)), total, 0.0, {}, 1, 10)


def test_serves_default_is_its_own() -> None:
    decider = ServeDecider(
        {
            "min_replicas": 1,
            "max_replicas": 10,
            "target_ongoing_requests": 2,
            "upscale_delay_s": 30,
            "downscale_delay_s": 60,
        }
    )
    # 12 requests, 2 each: 6 replicas, once that was wanted for 30 s.
    assert [decider.decide(view(at, 2, 2, 12.0)) for at in (0, 10, 29, 30)] == [2, 2, 2, 6]
    # 3 requests: 2 replicas, after 60 s.
    assert [decider.decide(view(at, 6, 6, 3.0)) for at in (40, 99, 100)] == [6, 6, 2]
    # None runs and one waits: at once.
    assert decider.decide(view(200, 0, 0, 1.0)) == 1


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="max_replicas"):
        ServeDecider({"min_replicas": 3, "max_replicas": 2})
    with pytest.raises(ValueError, match="start_s: got -1"):
        dataclasses.replace(SITE, start_s=-1)
    with pytest.raises(ValueError, match="limits: got 3 to 2"):
        dataclasses.replace(SITE, min_replicas=3, max_replicas=2)
