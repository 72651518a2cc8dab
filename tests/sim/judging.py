"""What must hold after a run, whatever broke: one line for each promise that was broken."""

from __future__ import annotations

from collections.abc import Iterator

from tests.sim.client import Answer
from tests.sim.simulation import REQUEST_TIMEOUT_S, Simulation

GRACE_S = 1.0
TYPED = {408: "timeout", 429: "queue_full", 503: "unavailable", 500: "internal_error"}


def judge(simulation: Simulation) -> list[str]:
    """The broken promises of a run that came to its end; empty when all were kept."""
    plan = simulation.plan
    found = list(simulation.problems)
    for answer in simulation.answers:
        found += [f"prompt {answer.ask.prompt}: {told}" for told in _judge(simulation, answer)]
        if plan.spared and not answer.left:
            found += _judge_spared(answer, may_degrade=plan.damages)
    for answer in simulation.probes:
        found += [f"when healed: {told}" for told in _judge(simulation, answer)]
        found += [f"when healed: {told}" for told in _judge_healed(simulation, answer)]
    return found


def _judge(simulation: Simulation, answer: Answer) -> Iterator[str]:
    """By its deadline, with tokens or a typed error; undegraded tokens are the right ones."""
    if answer.crash is not None:
        yield f"the app raised {answer.crash!r}"
        return
    if answer.ended_s is None:
        yield "no end"
        return
    took_s = answer.ended_s - answer.began_s
    if took_s > REQUEST_TIMEOUT_S + GRACE_S:
        yield f"took {took_s:.3f} s, its deadline was {REQUEST_TIMEOUT_S:g} s"
    if answer.left:
        return
    error = answer.error
    if error is not None:
        status = answer.status if answer.status != 200 else None
        if error.get("code") not in TYPED.values() or (
            status is not None and TYPED.get(status) != error["code"]
        ):
            yield f"an untyped error: {answer.status} {error}"
        if error.get("code") == "internal_error":
            yield f"an internal error: {error}"
        return
    if not answer.is_done:
        yield f"neither an end nor an error: {answer.status} {answer.body[-200:]!r}"
        return
    expected = simulation.assets.answers[answer.ask.prompt]
    if not answer.is_degraded and answer.text != expected:
        yield f"got {answer.text!r}, a healthy cluster says {expected!r}, and it is not flagged"


def _judge_spared(answer: Answer, *, may_degrade: bool) -> Iterator[str]:
    """Everything had an alternative: nothing fails."""
    if answer.crash is None and answer.ended_s is not None:
        if answer.error is not None:
            yield f"prompt {answer.ask.prompt} failed beside a healthy copy: {answer.error}"
        elif answer.is_degraded and not may_degrade:
            yield f"prompt {answer.ask.prompt} is degraded beside a healthy copy"


def _judge_healed(simulation: Simulation, answer: Answer) -> Iterator[str]:
    """Full quality again, unless records are damaged for good."""
    if answer.crash is None and answer.ended_s is not None and not simulation.plan.damages:
        if answer.error is not None:
            yield f"prompt {answer.ask.prompt} fails: {answer.error}"
        elif answer.is_degraded:
            yield f"prompt {answer.ask.prompt} is degraded"
