"""What goes wrong in one run, when and for how long: drawn from the seed, printable, shrinkable.

Pure values. What a fault does to the cluster is `tests/sim/breaking.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal[
    "crash_store",
    "crash_near_data",
    "crash_worker",
    "crash_manager",
    "power_off",
    "slow",
    "cut",
    "corrupt",
    "no_heartbeat",
    "redis_away",
]
WEIGHTS: dict[Kind, int] = {
    "crash_store": 5,
    "crash_near_data": 5,
    "crash_worker": 3,
    "crash_manager": 1,
    "power_off": 3,
    "slow": 4,
    "cut": 4,
    "corrupt": 4,
    "no_heartbeat": 2,
    "redis_away": 2,
}
OF_MEMORY_HOST: frozenset[Kind] = frozenset(
    ("crash_store", "crash_near_data", "power_off", "slow", "corrupt", "no_heartbeat")
)
GPU_HOSTS = ("gpu-0", "gpu-1")
MEMORY_HOSTS = ("mem-0", "mem-1")
FIRST_S, LAST_S, HEALED_S = 1.0, 7.0, 12.0
"""Seconds after the cluster is up: when faults begin, and when the last of them is over."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong at `at_s` on `host`, over after `for_s` where it has an end.

    `peer` is the other end of a cut link; `amount` seconds of delay for slow; `record` what is
    damaged: (kind, layer, expert).
    """

    kind: Kind
    at_s: float
    for_s: float
    host: str
    peer: str = ""
    amount: float = 0.0
    record: tuple[str, int, int] = ("", 0, 0)

    def __str__(self) -> str:
        more = " ".join(str(part) for part in (self.peer, self.amount or "", *self.record) if part)
        return f"{self.kind} {self.host} {more} for {self.for_s:.2f} s".replace("  ", " ")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a client: which of the known prompts, when, how, and when it hangs up."""

    at_s: float
    prompt: int
    ingress: int
    stream: bool
    leaves_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One run: its faults, its requests, and the choices of its config."""

    seed: int
    faults: tuple[Fault, ...]
    asks: tuple[Ask, ...]
    near_data: str
    prefetch: str
    compression: str
    cache_bytes: int

    @property
    def spared(self) -> bool:
        """Whether everything has an alternative at any time: at most one memory host is hit."""
        hit = {fault.host for fault in self.faults}
        return len(hit) <= 1 and all(fault.kind in OF_MEMORY_HOST for fault in self.faults)

    @property
    def damages(self) -> bool:
        return any(fault.kind == "corrupt" for fault in self.faults)

    def without(self, fault: Fault) -> Plan:
        return replace(self, faults=tuple(f for f in self.faults if f is not fault))


def draw(seed: int, *, num_prompts: int, layers: int = 2, experts: int = 4) -> Plan:
    """The plan of a seed; the same for ever as long as this function is."""
    rng = random.Random(f"moetier {seed}")
    asks = [_ask(rng, num_prompts) for _ in range(rng.randint(3, 5))]
    sort = rng.random()
    hosts: Sequence[str] = MEMORY_HOSTS
    kinds = dict(WEIGHTS)
    num_faults = rng.randint(1, 5)
    if sort < 0.08:
        num_faults = 0
    elif sort < 0.5:
        hosts = (rng.choice(MEMORY_HOSTS),)
        kinds = {kind: weight for kind, weight in WEIGHTS.items() if kind in OF_MEMORY_HOST}
    faults = [_fault(rng, kinds, hosts, layers, experts) for _ in range(num_faults)]
    if len(hosts) > 1 and rng.random() < 0.5:
        # Every copy of a record is lost: the answer is degraded, or fails.
        lost = replace(_fault(rng, {"corrupt": 1}, hosts, layers, experts), at_s=FIRST_S)
        kind = "factors" if rng.random() < 0.75 else "codes"
        faults += [replace(lost, host=host, record=(kind, *lost.record[1:])) for host in hosts]
    return Plan(
        seed,
        tuple(sorted(faults, key=lambda fault: fault.at_s)),
        tuple(sorted(asks, key=lambda ask: ask.at_s)),
        near_data=rng.choice(("off", "low_bit", "all")),
        prefetch=rng.choice(("always", "never")),
        compression=rng.choice(("none", "none", "zstd")),
        cache_bytes=rng.choice((0, 40_000, 400_000)),
    )


def _ask(rng: random.Random, num_prompts: int) -> Ask:
    return Ask(
        at_s=round(rng.uniform(0.5, LAST_S), 3),
        prompt=rng.randrange(num_prompts),
        ingress=rng.randrange(2),
        stream=rng.random() < 0.5,
        leaves_after_s=round(rng.uniform(0.01, 0.3), 3) if rng.random() < 0.1 else None,
    )


def _fault(
    rng: random.Random,
    kinds: dict[Kind, int],
    hosts: Sequence[str],
    layers: int,
    experts: int,
) -> Fault:
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    at_s = round(rng.uniform(FIRST_S, LAST_S), 3)
    for_s = round(min(rng.expovariate(0.5) + 0.05, HEALED_S - at_s), 3)
    host = rng.choice(hosts)
    fault = Fault(kind, at_s, for_s, host)
    if kind == "crash_worker":
        return replace(fault, host=rng.choice(GPU_HOSTS))
    if kind in ("crash_manager", "redis_away"):
        return replace(fault, host="head")
    if kind == "cut":
        return replace(fault, host=rng.choice(GPU_HOSTS), peer=host)
    if kind == "slow":
        return replace(fault, amount=round(rng.choice((0.05, 0.3, 2.0, 6.0)) * rng.random(), 3))
    if kind == "corrupt":
        record = (rng.choice(("codes", "factors")), rng.randrange(layers), rng.randrange(experts))
        return replace(fault, record=record)
    return fault
