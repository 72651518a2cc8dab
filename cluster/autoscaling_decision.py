"""One decision on the number of GPU workers: a pure function of the load and what was remembered.

Up at once or after a short while, down only after a calm time in which fewer would always have
done. Imports nothing but the rules beside it: Serve's controller runs this, and `moetier tune`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.autoscaling_rules import (
    LoadSnapshot,
    ServiceTimes,
    Targets,
    Worker,
    counts_fit,
    predict,
    replicas_for,
    slowdown,
)

SLOW_TIMES = 3.0
"""The slower of two averages of arrivals looks back so many times as far; they show a trend."""
MAX_TREND = 4.0
"""A rise is extrapolated to at most so many times the load."""
DEFAULT_UP_S, DEFAULT_CALM_S = 10.0, 300.0


@dataclass(frozen=True, slots=True)
class Delays:
    """How long a wish must last before it is followed.

    - up_s: seconds that more workers must be wanted.
    - calm_s: seconds that fewer must have been enough; the most wanted in that time is kept.
    - zero_s: as calm_s, for the last worker where none at all are allowed.
    """

    up_s: float = DEFAULT_UP_S
    calm_s: float = DEFAULT_CALM_S
    zero_s: float = DEFAULT_CALM_S

    def __post_init__(self) -> None:
        for name in ("up_s", "calm_s", "zero_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}: got {value!r}, expected seconds from 0 to 86400")
            if not 0 <= value <= 86400:
                raise ValueError(f"{name}: got {value}, expected 0 to 86400 seconds")


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves for the next, all of it numbers: Serve keeps it as a mapping.

    - at_s: when the last decision was made.
    - fast_per_s, slow_per_s: arrivals, averaged over a short and a long time.
    - up_since_s: since when more workers are wanted; None while none are.
    - enough: (seconds, workers) that would have been enough, newest last and only those that some
      later one does not exceed: their first is the most that was wanted.
    """

    at_s: float | None = None
    fast_per_s: float = 0.0
    slow_per_s: float = 0.0
    up_since_s: float | None = None
    enough: tuple[tuple[float, int], ...] = ()

    @staticmethod
    def of(state: Mapping[str, Any]) -> Memory:
        """Read back what `as_state` gave; a state without our part is a fresh start."""
        kept = state.get("moetier")
        if not isinstance(kept, Mapping):
            return Memory()
        enough = tuple((float(at), int(num)) for at, num in kept["enough"])
        return Memory(
            kept["at_s"], kept["fast_per_s"], kept["slow_per_s"], kept["up_since_s"], enough
        )

    def as_state(self) -> dict[str, Any]:
        return {
            "moetier": {
                "at_s": self.at_s,
                "fast_per_s": self.fast_per_s,
                "slow_per_s": self.slow_per_s,
                "up_since_s": self.up_since_s,
                "enough": [list(each) for each in self.enough],
            }
        }


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a policy is told. Raises ValueError where times are targets but not known."""

    targets: Targets = Targets()
    service: ServiceTimes | None = None
    delays: Delays = Delays()
    worker: Worker = Worker()

    def __post_init__(self) -> None:
        if self.targets.predicts and self.service is None:
            raise ValueError(
                "service: got nothing, but ttft_s and per_token_s are predicted from it; fit it "
                "with moetier tune --fit, or leave both out"
            )


@dataclass(frozen=True, slots=True)
class Decision:
    """How many workers there should be, and what the next decision must know."""

    num_replicas: int
    memory: Memory
    held: bool = False  # more were wanted, but the memory tier is what everyone waits for


def decide(load: LoadSnapshot, memory: Memory, now_s: float, settings: Settings) -> Decision:
    """Replicas for this load, within its limits. The same question twice has the same answer."""
    memory, arrivals_per_s = _averaged(load, memory, now_s, settings.targets)
    up, enough = wanted(load, arrivals_per_s, settings)
    if load.target_replicas and not load.reporting_replicas:
        # The first is still starting: ended before it ever ran, nobody would know the model.
        up, enough = max(up, 1), max(enough, 1)
    limit, held = settings.targets.tier_limit, False
    if limit is not None and load.wait_share >= limit and up > load.target_replicas > 0:
        up, enough, held = load.target_replicas, load.target_replicas, True
    num, memory = settle(
        up, enough, memory, load.target_replicas, now_s=now_s, delays=settings.delays
    )
    num = min(max(num, load.min_replicas), load.max_replicas)
    return Decision(num, memory, held)


def wanted(load: LoadSnapshot, arrivals_per_s: float, settings: Settings) -> tuple[int, int]:
    """(fewest replicas that keep the targets, fewest that would do so with the calm margin)."""
    targets, service = settings.targets, settings.service
    if not targets.predicts or service is None:
        tight = replace(
            targets,
            sequences_per_replica=targets.sequences_per_replica * targets.calm_margin,
            waiting_tokens_per_replica=targets.waiting_tokens_per_replica * targets.calm_margin,
        )
        return (
            replicas_for(lambda num: counts_fit(load, targets, num), load),
            replicas_for(lambda num: counts_fit(load, tight, num), load),
        )
    slowed = service.times(slowdown(load, service))

    def fewest(share: float) -> int:
        # With less to spare, both the load counts for more and the targets for less.
        more = targets.headroom / share

        def fits(num: int) -> bool:
            waits = predict(load, arrivals_per_s, num, slowed, settings.worker, more)
            return waits.within(targets, share)

        return replicas_for(fits, load)

    return fewest(1.0), fewest(targets.calm_margin)


def settle(
    up: int, enough: int, memory: Memory, target: int, *, now_s: float, delays: Delays
) -> tuple[int, Memory]:
    """What of two wishes is followed now: `up` are needed, with `enough` (at least as many) there
    would be something to spare. Pure; used for memory nodes as well.
    """
    # Where nothing is remembered yet, what runs counts as wanted until now.
    before = memory.enough or ((now_s, max(target, enough)),)
    kept = [(at_s, num) for at_s, num in before if num > enough] + [(now_s, enough)]
    kept = [(at_s, num) for at_s, num in kept if at_s >= now_s - max(delays.calm_s, delays.zero_s)]
    if up > target:
        since_s = now_s if memory.up_since_s is None else memory.up_since_s
        if now_s - since_s >= delays.up_s:
            return up, replace(memory, up_since_s=None, enough=tuple(kept))
        return target, replace(memory, up_since_s=since_s, enough=tuple(kept))
    calm_s = delays.zero_s if (target, enough) == (1, 0) else delays.calm_s
    most = max(num for at_s, num in kept if at_s >= now_s - calm_s)
    return min(target, most), replace(memory, up_since_s=None, enough=tuple(kept))


def _averaged(
    load: LoadSnapshot, memory: Memory, now_s: float, targets: Targets
) -> tuple[Memory, float]:
    """The arrivals to count on, `lead_s` ahead, from two exponential averages.

    On a steady rise an average over a time t lags by its slope times t, so the difference of two
    shows the slope.
    """
    seen = load.arrivals_per_s
    fast_s, slow_s = targets.smooth_s, targets.smooth_s * SLOW_TIMES
    if memory.at_s is None:
        fast = slow = seen
    else:
        passed_s = max(now_s - memory.at_s, 0.0)
        fast = seen + (memory.fast_per_s - seen) * math.exp(-passed_s / fast_s)
        slow = seen + (memory.slow_per_s - seen) * math.exp(-passed_s / slow_s)
    slope = max((fast - slow) / (slow_s - fast_s), 0.0)
    ahead = fast + slope * (fast_s + targets.lead_s) if targets.lead_s else fast
    ahead = min(ahead, MAX_TREND * fast)
    return replace(memory, at_s=now_s, fast_per_s=fast, slow_per_s=slow), ahead
