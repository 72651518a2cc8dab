"""What a worker did lately, per second: the gauges that autoscaling decides on, from two snapshots.

Knows counts and times only.
"""

from __future__ import annotations

from gpu_worker.messages import WorkerStats

MIN_WINDOW_S = 0.2
"""Asked again sooner, the last answer holds: a rate over less is noise."""


class LoadRates:
    """Turns a worker's totals into rates over the time since it was last asked.

    Answer tokens count as such from a request's first one on, though that one came out of its
    prompt's step; prompt tokens are all others that were computed.
    """

    def __init__(self) -> None:
        self._last: tuple[float, WorkerStats] | None = None
        self._gauges: dict[str, float] = {}

    def gauges(self, stats: WorkerStats, now_s: float) -> dict[str, float]:
        """All gauges by name; the rates are missing until there are two moments to compare."""
        counts: dict[str, float] = {
            "moetier_running_sequences": stats.running_sequences,
            "moetier_waiting_sequences": stats.waiting_sequences,
            "moetier_waiting_tokens": stats.waiting_tokens,
        }
        if self._last is None:
            self._last = (now_s, stats)
        elif now_s - self._last[0] >= MIN_WINDOW_S:
            self._gauges = _rates(self._last[1], stats, now_s - self._last[0])
            self._last = (now_s, stats)
        return counts | self._gauges


def _rates(before: WorkerStats, after: WorkerStats, seconds: float) -> dict[str, float]:
    computed = after.computed_tokens - before.computed_tokens
    answered = after.output_tokens - before.output_tokens
    busy_s = max(after.busy_s - before.busy_s, 0.0)
    waited_s = max(_waited_s(after) - _waited_s(before), 0.0)
    return {
        "moetier_arrivals_per_s": max(_accepted(after) - _accepted(before), 0) / seconds,
        "moetier_prompt_tokens_per_s": max(computed - answered, 0) / seconds,
        "moetier_answer_tokens_per_s": answered / seconds,
        "moetier_steps_per_s": (after.steps - before.steps) / seconds,
        "moetier_busy_share": min(busy_s / seconds, 1.0),
        "moetier_wait_share": min(waited_s / busy_s, 1.0) if busy_s else 0.0,
    }


def _accepted(stats: WorkerStats) -> int:
    """Requests so far: those that ended and those that are here."""
    return sum(stats.finished.values()) + stats.running_sequences + stats.waiting_sequences


def _waited_s(stats: WorkerStats) -> float:
    """Of its steps' time, what went into waiting for copies and near-data answers."""
    return float(stats.counters.get("wait_s", 0.0))
