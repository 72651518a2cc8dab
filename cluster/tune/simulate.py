"""A cluster in simulated time: requests, workers that start and end, and whoever decides how many.

Discrete events, one seed. Serve's part is as Ray 2.60 has it: the router takes the less loaded of
two workers, what finds no room waits at the handle, metrics are averaged over the look-back window
and pushed at an interval, a worker that is to end takes nothing new and is cut after a while.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cluster.autoscaling_rules import ServiceTimes, Worker
from cluster.tune.replica import Replica, Served
from cluster.tune.trace import Trace
from gpu_worker.load_rates import LoadRates
from gpu_worker.messages import WorkerStats

RECORD_SHARE = 0.2
"""Serve records a metric each time this part of its look-back window has passed, or sooner."""
MIN_RECORD_S = 1.0
"""But no more often than this here: what it costs to simulate buys nothing."""
TICK_S = 1.0
"""Between two decisions. Serve asks more often, but its metrics are not newer for it."""
END_S = 900.0
"""So long after its last arrival a trace's requests may still be served."""


@dataclass(frozen=True, slots=True)
class Site:
    """What is simulated besides the policy.

    - service, worker: what a step costs, and the worker's slots and chunks.
    - start_s: seconds from the decision for a worker until it takes requests.
    - min_replicas, max_replicas: bounds.
    - max_waiting: requests that one worker keeps waiting beyond its slots.
    - max_queued: requests that wait at the handle; more are refused.
    - initial_replicas: workers at the trace's start, if more than the least; ready at once.
    - drain_s: seconds that a worker that is to end has for what it began.
    """

    service: ServiceTimes
    worker: Worker = Worker()
    start_s: float = 30.0
    min_replicas: int = 1
    max_replicas: int = 8
    max_waiting: int = 32
    max_queued: int = 64
    initial_replicas: int = 1
    drain_s: float = 15.0

    def __post_init__(self) -> None:
        if not 0 <= self.start_s <= 86400:
            raise ValueError(f"start_s: got {self.start_s}, expected 0 to 86400")
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"limits: got {self.min_replicas} to {self.max_replicas} replicas, "
                "expected 0 <= min <= max and max >= 1"
            )


@dataclass(frozen=True, slots=True)
class View:
    """What Serve knows when it decides; loads are averages over the look-back window."""

    now_s: float
    target: int
    replicas: tuple[int, ...]  # that take requests
    total_requests: float
    queued_requests: float
    gauges: Mapping[str, Mapping[int, float]]  # by name, by replica
    min_replicas: int
    max_replicas: int


class Decider(Protocol):
    """A policy with all that Serve does around it. Carries its own state."""

    @property
    def look_back_s(self) -> float: ...
    @property
    def metrics_interval_s(self) -> float: ...
    @property
    def reads_gauges(self) -> bool: ...

    def decide(self, view: View) -> int: ...


@dataclass(frozen=True, slots=True)
class Moment:
    """A point of the curves over time."""

    now_s: float
    ready: int
    target: int
    ongoing: int
    queued: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. A worker costs from its order until its end, or the trace's."""

    served: tuple[Served, ...]
    replica_s: float
    moments: tuple[Moment, ...]


@dataclass(slots=True)
class _Source:
    """Samples of one replica's gauges, or of the handle, and their running sums."""

    rates: LoadRates = field(default_factory=LoadRates)
    samples: deque[tuple[float, Mapping[str, float]]] = field(default_factory=deque)
    sums: Counter[str] = field(default_factory=Counter)

    def add(self, now_s: float, values: Mapping[str, float]) -> None:
        self.samples.append((now_s, values))
        self.sums.update(values)

    def mean(self, after_s: float) -> dict[str, float]:
        while self.samples and self.samples[0][0] <= after_s:
            self.sums.subtract(self.samples.popleft()[1])
        # Sums of floats that were taken away again may come out a hair below 0.
        num = len(self.samples)
        return {name: max(total / num, 0.0) for name, total in self.sums.items()} if num else {}


def simulate(
    trace: Trace, site: Site, decider: Decider, *, seed: int = 0, tick_s: float = TICK_S
) -> Outcome:
    """Run the trace to its end."""
    return _Cluster(trace, site, decider, random.Random(seed)).run(tick_s)


class _Cluster:
    def __init__(self, trace: Trace, site: Site, decider: Decider, draw: random.Random) -> None:
        self._trace, self._site, self._decider, self._draw = trace, site, decider, draw
        self._served = [Served(request) for request in trace.requests]
        self._queue: deque[Served] = deque()
        self._replicas: list[Replica] = []  # all that cost something
        self._target = min(max(site.min_replicas, site.initial_replicas), site.max_replicas)
        self._num_started = 0
        self._replica_s = 0.0
        self._drain_until: dict[int, float] = {}
        self._handle = _Source()
        self._sources: dict[int, _Source] = {}
        self._pushed: dict[str, dict[int, float]] = {}
        self._load = {"total": 0.0, "queued": 0.0}
        self._moments: list[Moment] = []
        for _ in range(self._target):
            self._start(0.0, ready_s=0.0)

    def run(self, tick_s: float) -> Outcome:
        end_s = self._trace.end_s
        record_s = min(RECORD_SHARE * self._decider.look_back_s, self._decider.metrics_interval_s)
        record_s = max(record_s, MIN_RECORD_S)
        tick_at = sample_at = 0.0
        push_at = self._decider.metrics_interval_s
        arrivals = iter(self._served)
        coming = next(arrivals, None)
        last_s = 0.0
        while coming is not None or (self._num_ongoing and last_s < end_s + END_S):
            now_s = min(tick_at, sample_at)
            if coming is not None and coming.request.arrival_s <= now_s:
                now_s = coming.request.arrival_s
                self._pay(last_s, min(now_s, end_s))
                self._arrive(coming, now_s)
                coming = next(arrivals, None)
            elif sample_at <= tick_at:
                self._pay(last_s, min(now_s, end_s))
                self._sample(now_s, push=now_s >= push_at)
                push_at += self._decider.metrics_interval_s if now_s >= push_at else 0.0
                sample_at += record_s
            else:
                self._pay(last_s, min(now_s, end_s))
                self._tick(now_s)
                tick_at += tick_s
            last_s = now_s
        for served in (*self._queue, *(s for r in self._replicas for s in r.abandon())):
            served.lost = True
        return Outcome(tuple(self._served), self._replica_s, tuple(self._moments))

    @property
    def _num_ongoing(self) -> int:
        return len(self._queue) + sum(replica.num_ongoing for replica in self._replicas)

    def _pay(self, from_s: float, to_s: float) -> None:
        self._replica_s += max(to_s - from_s, 0.0) * len(self._replicas)

    def _start(self, now_s: float, *, ready_s: float) -> None:
        replica = Replica(self._num_started, ready_s, self._site.service, self._site.worker)
        self._num_started += 1
        self._replicas.append(replica)
        self._sources[replica.name] = _Source()

    def _ready(self, now_s: float) -> list[Replica]:
        return [r for r in self._replicas if r.ready_s <= now_s and not r.is_draining]

    def _arrive(self, served: Served, now_s: float) -> None:
        if not self._queue and self._route(served, now_s):
            return
        if len(self._queue) >= self._site.max_queued:
            served.lost = True
            return
        self._queue.append(served)

    def _route(self, served: Served, now_s: float) -> bool:
        """To the less loaded of two, drawn; where those are full, to any that is not."""
        ready = self._ready(now_s)
        room = self._site.worker.slots + self._site.max_waiting
        drawn = ready if len(ready) <= 2 else self._draw.sample(ready, 2)
        for candidates in (drawn, ready):
            for replica in candidates:
                replica.advance(now_s)
            best = min(candidates, key=lambda replica: replica.num_ongoing, default=None)
            if best is not None and best.num_ongoing < room:
                best.accept(served, now_s)
                return True
        return False

    def _tick(self, now_s: float) -> None:
        for replica in self._replicas:
            replica.advance(now_s)
        while self._queue and self._route(self._queue[0], now_s):
            self._queue.popleft()
        ready = self._ready(now_s)
        names = tuple(replica.name for replica in ready)
        # With nobody to serve them, handles push at once what waits.
        waiting = float(len(self._queue))
        total, queued = self._load["total"], self._load["queued"]
        view = View(
            now_s,
            self._target,
            names,
            total if ready else waiting,
            queued if ready else waiting,
            self._pushed,
            self._site.min_replicas,
            self._site.max_replicas,
        )
        wanted = self._decider.decide(view)
        self._target = min(max(wanted, self._site.min_replicas), self._site.max_replicas)
        self._follow(now_s)
        ongoing = sum(replica.num_ongoing for replica in self._replicas)
        self._moments.append(Moment(now_s, len(ready), self._target, ongoing, len(self._queue)))

    def _follow(self, now_s: float) -> None:
        """Start or end workers, those first that have not started yet; let drained ones go."""
        kept = [replica for replica in self._replicas if not replica.is_draining]
        for _ in range(self._target - len(kept)):
            self._start(now_s, ready_s=now_s + self._site.start_s)
        for replica in sorted(kept, key=lambda r: -r.ready_s)[: max(len(kept) - self._target, 0)]:
            replica.is_draining = True
            self._drain_until[replica.name] = now_s + self._site.drain_s
        for replica in list(self._replicas):
            if not replica.is_draining:
                continue
            if replica.num_ongoing == 0 or now_s >= self._drain_until[replica.name]:
                replica.abandon()
                self._replicas.remove(replica)
                self._sources.pop(replica.name)

    def _sample(self, now_s: float, *, push: bool) -> None:
        since_s = now_s - self._decider.look_back_s
        for replica in self._replicas:
            replica.advance(now_s)
        counts = {"total": float(self._num_ongoing), "queued": float(len(self._queue))}
        self._handle.add(now_s, counts)
        ready = self._ready(now_s) if self._decider.reads_gauges else ()
        for replica in ready:
            source = self._sources[replica.name]
            source.add(now_s, source.rates.gauges(_stats(replica), now_s))
        if not push:
            return
        self._load = self._handle.mean(since_s)
        self._pushed = {}
        for replica in ready:
            for name, value in self._sources[replica.name].mean(since_s).items():
                self._pushed.setdefault(name, {})[replica.name] = value


def _stats(replica: Replica) -> WorkerStats:
    """What the real worker would report."""
    return WorkerStats(
        str(replica.name),
        replica.num_running,
        replica.num_waiting,
        replica.waiting_tokens,
        steps=replica.steps,
        computed_tokens=replica.prompt_tokens + replica.answer_tokens,
        output_tokens=replica.answer_tokens,
        finished={"ended": replica.accepted - replica.num_ongoing},
        busy_s=replica.busy_s,
    )
