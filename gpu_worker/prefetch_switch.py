"""Whether fetching ahead pays here: tried against not doing it, on real steps, again and again.

A guess that is wrong costs bytes, and on a link without idle time also time; how much only the
steps themselves can tell. Pure: seconds come in, a yes or no goes out.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Literal

Prefetch = Literal["adaptive", "always", "never"]
"""adaptive: when steps were faster with it."""

TRIAL_STEPS = 8
"""Steps with and as many without, taking turns, before a decision."""
HOLD_STEPS = 128
"""Steps that a decision lasts; twice as long each time that a trial confirms it."""
MAX_HOLD_STEPS = 4096


@dataclass(slots=True)
class _Arm:
    """What is known for steps of one size."""

    with_s: list[float] = field(default_factory=list)
    without_s: list[float] = field(default_factory=list)
    pays: bool | None = None  # None before the first decision
    hold: int = 0  # steps that the present decision still lasts
    last_hold: int = HOLD_STEPS // 2


class PrefetchSwitch:
    """One decision for each size of step, in powers of two of its token rows."""

    def __init__(self, mode: Prefetch) -> None:
        self._mode = mode
        self._arms: dict[int, _Arm] = {}

    def is_on(self, num_rows: int) -> bool:
        """Whether the step of this many token rows should fetch ahead."""
        if self._mode != "adaptive":
            return self._mode == "always"
        arm = self._arms.get(num_rows.bit_length())
        if arm is None:
            return True
        if arm.hold > 0:
            return arm.pays is True
        return len(arm.with_s) <= len(arm.without_s)

    def observe(self, num_rows: int, seconds: float, *, was_on: bool) -> None:
        """A step of this many rows took that long."""
        if self._mode != "adaptive":
            return
        arm = self._arms.setdefault(num_rows.bit_length(), _Arm())
        if arm.hold > 0:
            arm.hold -= 1
            return
        (arm.with_s if was_on else arm.without_s).append(seconds / num_rows)
        if len(arm.with_s) >= TRIAL_STEPS and len(arm.without_s) >= TRIAL_STEPS:
            self._decide(arm)

    def _decide(self, arm: _Arm) -> None:
        pays = statistics.median(arm.with_s) < statistics.median(arm.without_s)
        arm.last_hold = min(2 * arm.last_hold, MAX_HOLD_STEPS) if pays == arm.pays else HOLD_STEPS
        arm.pays, arm.hold = pays, arm.last_hold
        arm.with_s.clear()
        arm.without_s.clear()
