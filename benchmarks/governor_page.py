"""What the governor's benchmark tells of each phase: a row per worker, and how fast it reacted.

Pure: steps in, text out. Who runs the steps is `benchmarks/governor.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.record import table


@dataclass(frozen=True, slots=True)
class Step:
    """One answer token of one worker."""

    seconds: float
    moved_bytes: int
    factor_bytes: int
    nats: float  # of the token that came
    kl: float  # nats, from the answer of full quality
    quality: str
    predicted_s: float  # of the MoE layers; 0 where no costs are measured
    layer_s: float


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One worker in one phase, for the CSV."""

    phase: str
    link_mb_per_s: float
    worker: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    steps_in_target_percent: float
    kb_per_token: float
    factor_kb_per_token: float
    link_used_percent: float
    perplexity: float
    kl_to_full: float
    predicted_over_real: float | None  # time of MoE layers
    qualities: str


def row_of(
    phase: str, worker: str, steps: Sequence[Step], *, bytes_per_s: float, target_s: float
) -> PhaseRow:
    times = [1000 * step.seconds for step in steps]
    p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    moved = sum(step.moved_bytes for step in steps)
    ratios = [step.predicted_s / step.layer_s for step in steps if step.predicted_s]
    return PhaseRow(
        phase=phase,
        link_mb_per_s=bytes_per_s / 1e6,
        worker=worker,
        ms_p20=p20,
        ms_p50=p50,
        ms_p80=p80,
        steps_in_target_percent=100 * sum(s.seconds <= target_s for s in steps) / len(steps),
        kb_per_token=moved / len(steps) / 1000,
        factor_kb_per_token=sum(step.factor_bytes for step in steps) / len(steps) / 1000,
        link_used_percent=100 * moved / (bytes_per_s * sum(step.seconds for step in steps)),
        perplexity=math.exp(statistics.fmean(step.nats for step in steps)),
        kl_to_full=statistics.fmean(step.kl for step in steps),
        predicted_over_real=statistics.median(ratios) if ratios else None,
        qualities=" / ".join(dict.fromkeys(step.quality for step in steps)),
    )


def table_of(rows: Sequence[PhaseRow]) -> str:
    head = ["link", "MB/s", "worker", "ms/token p20", "p50", "p80", "in target %", "KB/token"]
    head += ["of factors", "link used %", "perplexity", "KL to full", "predicted/real", "settings"]
    return table(
        head,
        [
            [
                row.phase,
                f"{row.link_mb_per_s:g}",
                row.worker,
                *(f"{value:.1f}" for value in (row.ms_p20, row.ms_p50, row.ms_p80)),
                f"{row.steps_in_target_percent:.0f}",
                f"{row.kb_per_token:.0f}",
                f"{row.factor_kb_per_token:.0f}",
                f"{row.link_used_percent:.0f}",
                f"{row.perplexity:.2f}",
                f"{row.kl_to_full:.4f}",
                "-" if row.predicted_over_real is None else f"{row.predicted_over_real:.2f}",
                row.qualities,
            ]
            for row in rows
        ],
    )


def reaction(phase: str, steps: Sequence[Step], target_s: float) -> str:
    """How long the governor took to where it was at the phase's end."""
    last = steps[-1].quality
    settled = next(i for i in range(len(steps)) if all(s.quality == last for s in steps[i:]))
    changes = sum(a.quality != b.quality for a, b in zip(steps, steps[1:], strict=False))
    late = sum(step.seconds > target_s for step in steps)
    return (
        f"- {phase}: {changes} changes of setting, the last after {settled} of {len(steps)} tokens "
        f"({last}); {late} tokens took longer than the target."
    )
