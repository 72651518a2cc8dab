"""How many store copies and near-data workers the memory tier should have: one pure decision.

Tiers are no Serve deployments, so nothing here is applied by Serve: whoever places them (the tier
manager, an operator) asks `decide_memory` and does as it says, or shows it. Imports only the rules
beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.autoscaling_decision import Delays, Memory, settle


@dataclass(frozen=True, slots=True)
class Extent:
    """How many there are of a kind, and how many there may be."""

    running: int
    least: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most or self.running < 0:
            raise ValueError(
                f"extent: got {self.running} running of {self.least} to {self.most}, expected "
                "0 <= least <= most and running >= 0"
            )

    def limit(self, wanted: float) -> int:
        return max(self.least, math.ceil(min(wanted, float(self.most)) - 1e-9))


@dataclass(frozen=True, slots=True)
class MemoryLoad:
    """The memory tier at one moment.

    - store, ndp: copies of the store (each on a node of its own), and near-data workers.
    - link_use: for each store copy, the share of its link that is in use, 0 to 1.
    - ndp_use: for each near-data worker, the share of the time it computes.
    - link_wait, ndp_wait: parts of the GPU workers' step time that they wait for copies and for
      near-data answers: whether a busy tier hurts anyone.

    Raises ValueError for shares that are not from 0 to 1.
    """

    store: Extent
    ndp: Extent
    link_use: tuple[float, ...] = ()
    ndp_use: tuple[float, ...] = ()
    link_wait: float = 0.0
    ndp_wait: float = 0.0

    def __post_init__(self) -> None:
        shares = (*self.link_use, *self.ndp_use, self.link_wait, self.ndp_wait)
        if wrong := [share for share in shares if not 0 <= share <= 1]:
            raise ValueError(f"shares: got {wrong[0]}, expected 0 to 1")


@dataclass(frozen=True, slots=True)
class MemoryTargets:
    """When the tier is as busy as it should be.

    - use: share of a link, or of a near-data worker's time, that should be in use at most.
    - wait: part of the GPU workers' time that may go into waiting before more is added.
    - calm_margin: less is kept only where the rest would be used for this part of `use` at most.
    """

    use: float = 0.7
    wait: float = 0.15
    calm_margin: float = 0.8

    def __post_init__(self) -> None:
        for name, least, most in (
            ("use", 0.05, 1.0),
            ("wait", 0.0, 1.0),
            ("calm_margin", 0.05, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name}: got {value}, expected {least:g} to {most:g}")


@dataclass(frozen=True, slots=True)
class MemoryDecision:
    """What the tier should have, and what the next decision must know."""

    store: int
    ndp: int
    memory: tuple[Memory, Memory]


def decide_memory(
    load: MemoryLoad,
    memory: tuple[Memory, Memory],
    now_s: float,
    *,
    targets: MemoryTargets | None = None,
    delays: Delays | None = None,
) -> MemoryDecision:
    """Store copies and near-data workers for this load, each within its limits.

    Of n that are used for u on average, n u / target are needed. More are added only while someone
    waits for them: a busy link that nobody waits for is a well used one. Nothing is added where the
    mean is within the target and only the busiest is over it: that is a matter of heat, which
    `cluster/segment_placement.py` spreads.
    """
    targets, delays = targets or MemoryTargets(), delays or Delays()
    store, store_memory = _settled(
        load.store, load.link_use, load.link_wait, memory[0], now_s, targets, delays
    )
    ndp, ndp_memory = _settled(
        load.ndp, load.ndp_use, load.ndp_wait, memory[1], now_s, targets, delays
    )
    return MemoryDecision(store, ndp, (store_memory, ndp_memory))


def _settled(
    extent: Extent,
    use: tuple[float, ...],
    wait: float,
    memory: Memory,
    now_s: float,
    targets: MemoryTargets,
    delays: Delays,
) -> tuple[int, Memory]:
    """One kind: what is needed now, what would do with something to spare, and the delays."""
    used = sum(use)  # in nodes
    needed = extent.limit(used / targets.use)
    enough = max(extent.limit(used / (targets.use * targets.calm_margin)), needed)
    if wait <= targets.wait:
        # Nobody is hurt: no more than there is, and what there is only while it is used.
        needed = min(needed, max(extent.running, extent.least))
        enough = min(enough, max(extent.running, extent.least))
    if not use:
        # Nothing is known of who runs: leave it as it is.
        needed = enough = extent.limit(extent.running)
    num, kept = settle(needed, enough, memory, extent.running, now_s=now_s, delays=delays)
    return min(max(num, extent.least), extent.most), kept
