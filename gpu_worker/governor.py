"""The bandwidth governor: fewer bytes of compensators while waiting for bytes breaks a target.

`advance` is the controller, a pure function of what steps took. `Governor` holds its state and the
ladder of settings (`gpu_worker/quality_ladder.py`). Knows no clock, no link and no cache.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpu_worker.cost_table import CostTable
from gpu_worker.counters import StepCounters
from gpu_worker.quality_ladder import QualitySetting

logger = logging.getLogger(__name__)

WINDOW = 8
"""Decode steps whose median is the pace: one that waited for something else does not count."""
MIN_SEEN = 4
"""Steps on a rung before the governor may leave it."""
BAND = 0.1
"""Nothing changes while the pace is within this of the target, or rungs would be left in turn."""
MIN_GAIN = 0.1
"""Share of the target that has to be gained: by no less is quality given up, and only steps that
wait for copies that long can gain it."""
GAIN = 0.25
"""Weight of a step in what factors are believed to take."""
PATIENCE, MAX_PATIENCE = 8, 256
"""Calm steps before a better rung is tried; doubled each time it had to be left again at once."""
BLIND = 8
"""Times the patience after which a rung is tried although by what is known it is too slow: where
nothing is fetched any more, nothing is learned of the link."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """One decode step.

    `full_factors_s` is what the factors of the first rung would take on the link as it is now.
    """

    step_s: float
    wait_s: float  # of it, waiting for copies
    full_factors_s: float


@dataclass(frozen=True, slots=True)
class GovernorState:
    """Where the governor is, and what it saw since it came there."""

    rung: int = 0  # of the ladder; 0 is full quality
    recent: tuple[StepTime, ...] = ()
    calm: int = 0  # steps in a row that left room for more
    patience: int = PATIENCE
    on_trial: bool = False  # the last change was to a better rung, and it has not yet proven itself


def advance(
    state: GovernorState, seen: StepTime, *, target_s: float, factor_bytes: Sequence[float]
) -> GovernorState:
    """The state after a decode step. `factor_bytes` is the ladder's, rung by rung.

    Over the target by more than the band, and waiting for copies: down to the first rung that is
    predicted to keep it, but no farther than a tenth of the target is gained by it. Under it by
    more than the band, for as many steps as the patience: one rung up, if that is predicted to keep
    the target.
    """
    recent = (*state.recent, seen)[-WINDOW:]
    state = replace(state, recent=recent)
    pace_s = statistics.median(step.step_s for step in recent)
    full_s = statistics.median(step.full_factors_s for step in recent)
    wait_s = statistics.median(step.wait_s for step in recent)
    here = factor_bytes[state.rung]

    def predicted_s(rung: int) -> float:
        return pace_s + full_s * (factor_bytes[rung] - here)

    if len(recent) < MIN_SEEN:
        return state
    if pace_s > target_s * (1 + BAND):
        state = replace(state, calm=0)
        if wait_s < MIN_GAIN * target_s:
            return state
        last = len(factor_bytes) - 1
        enough_s = max(target_s, predicted_s(last) + MIN_GAIN * target_s)
        rung = next(r for r in range(state.rung, last + 1) if predicted_s(r) <= enough_s)
        if rung == state.rung:
            # Rungs that skip pairs save what nothing predicts: they are tried, one at a time.
            skips = (r for r in range(rung + 1, last + 1) if factor_bytes[r] == factor_bytes[r - 1])
            rung = next(skips, rung)
        if rung == state.rung:
            return state
        patience = min(MAX_PATIENCE, 2 * state.patience) if state.on_trial else PATIENCE
        return GovernorState(rung=rung, patience=patience)
    if pace_s > target_s * (1 - BAND):
        return replace(state, calm=0)
    state = replace(state, calm=state.calm + 1)
    if state.on_trial and state.calm >= state.patience:
        state = replace(state, on_trial=False, patience=PATIENCE)
    if state.rung == 0 or state.calm < state.patience:
        return state
    if predicted_s(state.rung - 1) > target_s and state.calm < BLIND * state.patience:
        return state
    return GovernorState(rung=state.rung - 1, patience=state.patience, on_trial=True)


class Governor:
    """One worker's governor. The thread that runs its steps owns it.

    `fetches_itself`: that thread fetches what its steps need, and so never waits for it.
    """

    def __init__(
        self,
        ladder: tuple[QualitySetting, ...],
        table: CostTable,
        *,
        target_s: float,
        fetches_itself: bool = False,
    ) -> None:
        assert ladder, "a ladder has the config's own setting at least"
        self._ladder = ladder
        self._table = table
        self._target_s = target_s
        self._fetches_itself = fetches_itself
        self._state = GovernorState()
        # Bytes of factors that a token needs on the first rung, as last seen on one that has any.
        self._full_bytes = 0.0

    @property
    def rung(self) -> int:
        """0 is full quality; the larger, the fewer bytes."""
        return self._state.rung

    @property
    def num_rungs(self) -> int:
        return len(self._ladder)

    @property
    def setting(self) -> QualitySetting:
        """What the next step runs with."""
        return self._ladder[self._state.rung]

    @property
    def knobs(self) -> dict[str, float]:
        """The rung and its settings by name, for metrics."""
        return {"rung": float(self.rung), **self.setting.knobs()}

    def describe(self, rung: int) -> str | None:
        """A rung for who gets an answer by it; None for full quality."""
        return str(self._ladder[rung]) if rung else None

    def decoded(self, step_s: float, counters: StepCounters, num_tokens: int) -> None:
        """A decode step of `num_tokens` sequences was made with `setting`."""
        link = self._table.costs().link
        moved = counters.moved_by_kind("factors")
        if self.setting.factor_bytes > 0:
            full_bytes = moved / num_tokens / self.setting.factor_bytes
            self._full_bytes += GAIN * (full_bytes - self._full_bytes)
        full_factors_s = self._full_bytes * num_tokens / link.bytes_per_s
        # Waiting for near data does not count: fewer compensators would send it more.
        wait_s = counters.wait_s - counters.near_wait_s
        if self._fetches_itself:
            wait_s = link.seconds(counters.total_moved_bytes)
        before = self._state
        self._state = advance(
            before,
            StepTime(step_s, wait_s, full_factors_s),
            target_s=self._target_s,
            factor_bytes=[setting.factor_bytes for setting in self._ladder],
        )
        if self._state.rung != before.rung:
            logger.info(
                "governor: rung %d of %d, %s (a step took %.4f s, the target is %.4f s)",
                self._state.rung,
                len(self._ladder) - 1,
                self.setting,
                step_s,
                self._target_s,
            )
