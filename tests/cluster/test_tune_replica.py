"""Goal: a simulated worker does what the scheduler does, many steps at once.

Method: the real `gpu_worker.scheduler.Scheduler` is stepped one step at a time with the same fitted
times, on random requests; first tokens and ends must agree, whenever the worker is looked at.
"""

from __future__ import annotations

import random

import pytest

from cluster.autoscaling_rules import ServiceTimes, Worker
from cluster.tune.replica import Replica, Served
from cluster.tune.trace import Request
from gpu_worker.scheduler import Scheduler
from gpu_worker.sequence import SamplingParams, Sequence

SERVICE = ServiceTimes(0.02, 0.003, 0.001, 1, 1)
WORKER = Worker(slots=3, prefill_chunk=16)


def drawn(seed: int, num: int = 40) -> list[Request]:
    draw = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(num):
        now += draw.choice([0.0, 0.01, 0.2, 2.0]) * draw.random()
        requests.append(Request(now, draw.randint(1, 60), draw.randint(1, 40)))
    return requests


def by_the_scheduler(requests: list[Request]) -> tuple[list[tuple[float, float]], float, int]:
    """(first token, end) of each, seconds busy, and steps: one step after another."""
    scheduler = Scheduler(num_slots=WORKER.slots, max_waiting=10**6, prefill_chunk=16)
    live = {str(n): request for n, request in enumerate(requests)}
    first: dict[str, float] = {}
    end: dict[str, float] = {}
    coming = list(live.items())
    now = busy_s = 0.0
    steps = 0
    while coming or scheduler.has_work:
        if not scheduler.has_work:
            now = max(now, coming[0][1].arrival_s)
        while coming and coming[0][1].arrival_s <= now:
            name, request = coming.pop(0)
            prompt = tuple([0] * request.prompt_tokens)
            scheduler.add(Sequence(name, prompt, SamplingParams(max_tokens=None)))
        batch = scheduler.schedule()
        assert batch is not None
        is_prefill = batch.sequences[0].state == "prefill"
        seconds = (
            SERVICE.prefill_s(batch.num_tokens)
            if is_prefill
            else SERVICE.decode_s(len(batch.sequences))
        )
        now, busy_s, steps = now + seconds, busy_s + seconds, steps + 1
        scheduler.computed(batch)
        for sequence in batch.sequences:
            if sequence.state != "running":
                continue
            sequence.output_ids.append(0)
            name = sequence.request_id
            first.setdefault(name, now)
            if len(sequence.output_ids) == live[name].answer_tokens:
                end[name] = now
                scheduler.finish(sequence, "length")
    return [(first[name], end[name]) for name in live], busy_s, steps


@pytest.mark.parametrize("look_s", [None, 0.013, 0.7])
@pytest.mark.parametrize("seed", range(6))
def test_as_the_scheduler_step_by_step(seed: int, look_s: float | None) -> None:
    requests = drawn(seed)
    expected, busy_s, steps = by_the_scheduler(requests)
    replica = Replica(0, 0.0, SERVICE, WORKER)
    served = [Served(request) for request in requests]
    looks = 0.0
    for each in served:
        while look_s is not None and looks < each.request.arrival_s:
            replica.advance(looks)
            looks += look_s
        replica.advance(each.request.arrival_s)
        replica.accept(each, each.request.arrival_s)
    replica.advance(1e6)
    got = [(each.first_s, each.end_s) for each in served]
    assert got == [pytest.approx(times, abs=1e-6) for times in expected]
    assert replica.steps == steps
    assert replica.busy_s == pytest.approx(busy_s)
    assert replica.prompt_tokens == sum(r.prompt_tokens for r in requests)
    assert replica.answer_tokens == sum(r.answer_tokens for r in requests)
    assert (replica.num_ongoing, replica.waiting_tokens) == (0, 0)


def test_who_is_abandoned_is_lost() -> None:
    replica = Replica(0, 0.0, SERVICE, WORKER)
    served = [Served(Request(0.0, 100, 100)) for _ in range(5)]
    for each in served:
        replica.accept(each, 0.0)
    replica.advance(0.5)
    assert replica.num_ongoing == 5
    assert replica.abandon() != []
    assert all(each.lost for each in served)
    assert replica.num_ongoing == replica.waiting_tokens == 0


def test_latencies_of_what_was_served() -> None:
    one = Served(Request(2.0, 5, 1), first_s=3.0, end_s=3.0)
    assert (one.ttft_s, one.per_token_s) == (1.0, 0.0)
    many = Served(Request(2.0, 5, 11), first_s=3.0, end_s=5.0)
    assert many.per_token_s == pytest.approx(0.2)
    assert Served(Request(2.0, 5, 11)).ttft_s == float("inf")
