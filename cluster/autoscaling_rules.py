"""How long requests will wait with n GPU workers, and so how many are needed: pure functions.

A step of a worker is taken to cost a fixed time, a time for each sequence it decodes and a time for
each prompt token; `moetier tune` fits the three. Imports neither Ray nor our other modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

SEQUENCES_PER_REPLICA = 8.0
"""Default target; of the order of the slots of one replica."""
WAITING_TOKENS_PER_REPLICA = 4096.0
"""Default target; a few seconds of prefill for a replica."""
MIN_SLOWDOWN, MAX_SLOWDOWN = 0.5, 10.0
"""What measured steps may say of the fitted ones; beyond, it is the measurement that is wrong."""
MIN_BUSY_SHARE = 0.05
"""A replica that is busy for less than this says nothing about how slow steps are."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The load at which one worker is full, or the waiting that is still good; and how carefully.

    - sequences_per_replica: sequences, running or waiting, that one replica should hold; decides
      where neither ttft_s nor per_token_s is given.
    - waiting_tokens_per_replica: prompt tokens, not yet computed, that one replica may owe; decides
      likewise.
    - ttft_s: seconds until the first token that are still good; needs `service`. null is any.
    - per_token_s: seconds for each further token that are still good; likewise.
    - headroom: workers are counted for this many times the load that is seen.
    - calm_margin: a worker is given up only if the rest would keep this share of the targets.
    - lead_s: seconds ahead for which a rising load is extrapolated; of the order of what a worker
      takes to start. 0 extrapolates nothing.
    - smooth_s: seconds over which arrivals are averaged.
    - tier_limit: no worker is added while those that run spend this share of their time waiting
      for the memory tier (0 to 1): another one would only wait beside them. null adds anyway.
    """

    sequences_per_replica: float = SEQUENCES_PER_REPLICA
    waiting_tokens_per_replica: float = WAITING_TOKENS_PER_REPLICA
    ttft_s: float | None = None
    per_token_s: float | None = None
    headroom: float = 1.2
    calm_margin: float = 0.9
    lead_s: float = 0.0
    smooth_s: float = 15.0
    tier_limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("sequences_per_replica", "waiting_tokens_per_replica", "smooth_s"):
            _positive(name, getattr(self, name))
        for name in ("ttft_s", "per_token_s"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        _between("headroom", self.headroom, 0.1, 10)
        _between("calm_margin", self.calm_margin, 0.05, 1)
        _between("lead_s", self.lead_s, 0, 3600)
        if self.tier_limit is not None:
            _between("tier_limit", self.tier_limit, 0.05, 1)

    @property
    def predicts(self) -> bool:
        """Whether times are the target, not counts."""
        return self.ttft_s is not None or self.per_token_s is not None


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """What steps cost and what requests are like: `moetier tune --fit` measures it.

    - step_s: seconds of any step, whatever is in it.
    - sequence_s: seconds that each sequence adds to a step that decodes.
    - prompt_token_s: seconds that each prompt token adds to a step that computes prompts.
    - prompt_tokens, answer_tokens: of a usual request.
    """

    step_s: float
    sequence_s: float
    prompt_token_s: float
    prompt_tokens: float
    answer_tokens: float

    def __post_init__(self) -> None:
        for name in ("step_s", "prompt_tokens", "answer_tokens"):
            _positive(name, getattr(self, name))
        for name in ("sequence_s", "prompt_token_s"):
            _between(name, getattr(self, name), 0, 3600)

    def decode_s(self, num_sequences: float) -> float:
        """Seconds of a step that gives each of so many sequences a token."""
        return self.step_s + self.sequence_s * num_sequences

    def prefill_s(self, num_tokens: float) -> float:
        """Seconds of a step that computes so many tokens of one prompt."""
        return self.step_s + self.prompt_token_s * num_tokens

    def times(self, slowdown: float) -> ServiceTimes:
        """The same requests on a worker that is so many times slower."""
        return ServiceTimes(
            self.step_s * slowdown,
            self.sequence_s * slowdown,
            self.prompt_token_s * slowdown,
            self.prompt_tokens,
            self.answer_tokens,
        )


@dataclass(frozen=True, slots=True)
class Worker:
    """What of a worker's config matters here: its slots, and the prompt tokens of one step."""

    slots: int = 8
    prefill_chunk: int = 256

    def __post_init__(self) -> None:
        for name in ("slots", "prefill_chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a whole number of 1 or more")


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """Load of one deployment at one moment, summed over its replicas, and the limits to stay in.

    The loads are floats because Serve averages gauges over its look-back window. Rates are per
    second; `busy_share` and `wait_share` are means over the replicas that report.
    Raises ValueError for a negative or non-finite load and for limits that exclude each other.
    """

    running_sequences: float
    waiting_sequences: float
    waiting_tokens: float
    queued_requests: float  # at Serve's handles, accepted by no replica yet
    min_replicas: int
    max_replicas: int
    target_replicas: int = 0  # what was decided last
    reporting_replicas: int = 0
    arrivals_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    answer_tokens_per_s: float = 0.0
    steps_per_s: float = 0.0
    busy_share: float = 0.0
    wait_share: float = 0.0  # of the busy time, for copies or near-data answers

    def __post_init__(self) -> None:
        for name in _LOADS:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: got {value}, expected a finite number >= 0")
        if not self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"limits: got min_replicas {self.min_replicas}, max_replicas {self.max_replicas}, "
                "expected 0 <= min_replicas <= max_replicas"
            )

    @property
    def sequences(self) -> float:
        return self.running_sequences + self.waiting_sequences + self.queued_requests

    @property
    def is_idle(self) -> bool:
        """Nothing to do at all; below half a sequence it is only the tail of an average."""
        return self.sequences < 0.05 and self.waiting_tokens < 1 and self.arrivals_per_s < 1e-6


_LOADS = tuple(field.name for field in fields(LoadSnapshot))


@dataclass(frozen=True, slots=True)
class Waiting:
    """What requests are predicted to wait; inf where the load would only grow."""

    ttft_s: float
    per_token_s: float

    def within(self, targets: Targets, share: float = 1.0) -> bool:
        """Whether both are within that share of the targets; an absent target needs a bound."""
        return (
            self.ttft_s <= share * (targets.ttft_s or math.inf)
            and self.per_token_s <= share * (targets.per_token_s or math.inf)
            and math.isfinite(self.ttft_s + self.per_token_s)
        )


def slowdown(load: LoadSnapshot, service: ServiceTimes) -> float:
    """How many times longer steps take now than was fitted: a slow link or near-data worker shows
    up here, and so does a fit on another machine. 1 while too little is done to tell.
    """
    if not load.reporting_replicas or load.busy_share < MIN_BUSY_SHARE:
        return 1.0
    fitted = (
        load.steps_per_s * service.step_s
        + load.answer_tokens_per_s * service.sequence_s
        + load.prompt_tokens_per_s * service.prompt_token_s
    ) / load.reporting_replicas
    if fitted < MIN_BUSY_SHARE:
        return 1.0
    return min(max(load.busy_share / fitted, MIN_SLOWDOWN), MAX_SLOWDOWN)


def predict(
    load: LoadSnapshot,
    demand_per_s: float,
    num: int,
    service: ServiceTimes,
    worker: Worker,
    times: float = 1.0,
) -> Waiting:
    """What requests wait if `num` replicas share the load evenly; pure queueing arithmetic.

    `demand_per_s` is the requests that arrive each second; `times` counts it and the rates that are
    seen for more than they are. With p prompt tokens and d answer tokens
    a second for each replica, chunks of c tokens, and a decode step after each chunk:

        prefill share    f = p * (prompt_token_s + step_s / c)
        sequences        b = d * step_s / (1 - f - d * sequence_s)    as b (1 - f) / decode(b) = d
        per token          = decode(b) / (1 - f)
        a prompt token   x = prompt_token_s + (step_s + decode(b)) / c
        first token        = backlog * x + prompt_tokens * x / (1 - p x) + wait for a slot

    the middle term being the mean of an M/M/1 queue. Waits are inf where a denominator is not
    positive or more than `slots` sequences would run.
    """
    if num < 1:
        # Whatever came before: who asks next waits for a start, and that was allowed.
        return Waiting(0, 0) if load.is_idle else Waiting(math.inf, math.inf)
    chunk, slots = min(service.prompt_tokens, worker.prefill_chunk), worker.slots
    each = times / num
    prompt_rate = max(load.prompt_tokens_per_s, demand_per_s * service.prompt_tokens) * each
    answer_rate = max(load.answer_tokens_per_s, demand_per_s * service.answer_tokens) * each
    left = 1 - prompt_rate * (service.prompt_token_s + service.step_s / chunk)
    room = left - answer_rate * service.sequence_s
    if room <= 0:
        return Waiting(math.inf, math.inf)
    running = answer_rate * service.step_s / room
    if running > slots:
        return Waiting(math.inf, math.inf)
    decode_s = service.decode_s(running)
    token_s = service.prompt_token_s + (service.step_s + decode_s) / chunk
    idle = 1 - prompt_rate * token_s
    if idle <= 0:
        return Waiting(math.inf, math.inf)
    owed = (load.waiting_tokens + load.queued_requests * service.prompt_tokens) / num
    excess = max(load.sequences / num - slots, 0.0)
    slot_s = excess * service.answer_tokens * service.decode_s(slots) / slots
    ttft_s = owed * token_s + service.prompt_tokens * token_s / idle + slot_s
    return Waiting(ttft_s, decode_s / left)


def replicas_for(fits: Callable[[int], bool], load: LoadSnapshot) -> int:
    """The fewest replicas within the limits that fit; the most allowed where none does.

    `fits` must stay true once it is true: found by halving.
    """
    low, high = max(load.min_replicas, 0 if load.is_idle else 1), max(load.max_replicas, 0)
    low = min(low, high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def counts_fit(load: LoadSnapshot, targets: Targets, num: int) -> bool:
    """Whether no count is over its target with `num` replicas.

    Two counts, because either can fill a replica alone: many short sequences take all slots, one
    long prompt holds up every step. Requests still queued at a handle have an unknown length, so
    they count as sequences only.
    """
    return (
        load.sequences <= num * targets.sequences_per_replica
        and load.waiting_tokens <= num * targets.waiting_tokens_per_replica
    )


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: got {value!r}, expected a positive number")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: got {value}, expected a positive, finite number")


def _between(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: got {value!r}, expected a number from {least:g} to {most:g}")
    if not least <= value <= most:
        raise ValueError(f"{name}: got {value}, expected {least:g} to {most:g}")
