"""What became of each request, and what that says of a fault: plain values, pure functions.

Times are seconds of the monotonic clock, which all processes of one machine share.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["stream", "unary"]
Spared = Literal["nothing", "started streams", "in flight"]
"""Requests that a fault may end since nothing could answer them any more: none at all; streams that
had sent a token by a part that is gone; all that were in flight when the way to them broke."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its client saw it. `ended_s` None: it has not ended yet.

    The longest wait is for the next token, the first one too, and began at `wait_from_s`; a whole
    answer's is all of its time. `error` is empty for an answer that came whole.
    """

    number: int
    kind: Kind
    prompt: int
    started_s: float
    ended_s: float | None = None
    first_token_s: float | None = None
    wait_from_s: float = 0.0
    longest_wait_s: float = 0.0
    tokens: int = 0
    status: int | None = None
    degraded: bool = False
    error: str = ""
    text: str = ""
    door: str = ""
    refused_doors: int = 0  # proxies that took no connection before one did


@dataclass(frozen=True, slots=True)
class Times:
    """When the steady load began to be watched, what was done to the cluster, and the end."""

    from_s: float
    fault_s: float
    whole_s: float | None  # all parts stand again
    to_s: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What is counted of a fault: over all requests under way from the fault to the end."""

    sent: int
    failed: int
    failed_with_alternative: int
    degraded: int
    changed: int  # undegraded whole answers other than what the fault-free cluster says
    wait_before_s: float  # longest wait for a token before the fault
    wait_s: float  # and from it on, over streams
    full_quality_s: float | None
    tokens_per_s_before: float
    tokens_per_s_during: float
    tokens_per_s_after: float
    errors: str  # the failures, each kind once, with its count


def load(path: Path) -> list[Outcome]:
    """The requests of a client's file; the last line of one counts, the first says it began."""
    found: dict[int, Outcome] = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # else it is being written
            outcome = Outcome(**json.loads(line))
            found[outcome.number] = outcome
    return list(found.values())


def dump(outcome: Outcome) -> str:
    return json.dumps(dataclasses.asdict(outcome)) + "\n"


def figures(
    outcomes: Sequence[Outcome], times: Times, spared: Spared, reference: dict[int, str]
) -> Figures:
    """The figures of one fault. A request that never ended counts as failed.

    `reference` is the fault-free answer to every prompt.
    """
    before = [o for o in outcomes if _overlaps(o, times.from_s, times.fault_s)]
    since = [o for o in outcomes if _overlaps(o, times.fault_s, times.to_s)]
    failed = [o for o in since if o.error or o.ended_s is None]
    worse = [o for o in since if o in failed or o.degraded]
    full_s = times.whole_s
    if full_s is not None and worse:
        full_s = max(full_s, *(o.ended_s or times.to_s for o in worse))
    whole_s = times.to_s if times.whole_s is None else times.whole_s
    told: dict[str, int] = {}
    for outcome in failed:
        name = outcome.error or "did not end"
        told[name] = told.get(name, 0) + 1
    return Figures(
        sent=len(since),
        failed=len(failed),
        failed_with_alternative=sum(has_alternative(o, times.fault_s, spared) for o in failed),
        degraded=sum(o.degraded for o in since),
        changed=sum(
            not o.error and not o.degraded and o.text != reference[o.prompt]
            for o in since
            if o.ended_s is not None
        ),
        wait_before_s=_longest_wait(before, lambda end_s: end_s <= times.fault_s),
        wait_s=_longest_wait(since, lambda end_s: end_s > times.fault_s),
        full_quality_s=None if full_s is None else full_s - times.fault_s,
        tokens_per_s_before=tokens_per_s(outcomes, times.from_s, times.fault_s),
        tokens_per_s_during=tokens_per_s(outcomes, times.fault_s, whole_s),
        tokens_per_s_after=tokens_per_s(outcomes, whole_s, times.to_s),
        errors="; ".join(f"{count} x {name}" for name, count in sorted(told.items())),
    )


def has_alternative(outcome: Outcome, fault_s: float, spared: Spared) -> bool:
    """Whether another part could have answered this request that failed."""
    if spared == "nothing" or outcome.started_s > fault_s:
        return True
    started = outcome.first_token_s is not None and outcome.kind == "stream"
    return not (spared == "in flight" or started)


def tokens_per_s(outcomes: Iterable[Outcome], from_s: float, to_s: float) -> float:
    """Tokens that reached the clients per second; a request's lie evenly in its time."""
    if to_s <= from_s:
        return 0.0
    total = 0.0
    for outcome in outcomes:
        if outcome.ended_s is None:
            continue
        first_s = outcome.started_s if outcome.first_token_s is None else outcome.first_token_s
        length_s = max(1e-9, outcome.ended_s - first_s)
        inside_s = min(outcome.ended_s, to_s) - max(first_s, from_s)
        total += outcome.tokens * max(0.0, inside_s) / length_s
    return total / (to_s - from_s)


def _overlaps(outcome: Outcome, from_s: float, to_s: float) -> bool:
    return outcome.started_s < to_s and (outcome.ended_s is None or outcome.ended_s > from_s)


def _longest_wait(outcomes: Iterable[Outcome], ended: Callable[[float], bool]) -> float:
    """Over streams, of waits whose end is so: one that a fault fell into came of the fault."""
    waits = [
        outcome.longest_wait_s
        for outcome in outcomes
        if outcome.kind == "stream" and ended(outcome.wait_from_s + outcome.longest_wait_s)
    ]
    return max(waits, default=0.0)
