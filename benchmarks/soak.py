"""Mixed load with random faults for as long as one likes, and whether anything grows or stays.

`python -m benchmarks.soak --minutes 60` breaks the cluster of `benchmarks/faults` again and again
(seeded) and watches memory, descriptors and threads of every process, and /dev/shm of every host;
then shuts it down and looks for what is left. Needs root, Linux namespaces and redis-server.
"""

from __future__ import annotations

import argparse
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.faults.catalogue import ALL, Fault
from benchmarks.faults.leftovers import footprint, leftovers
from benchmarks.faults.outcomes import Outcome, tokens_per_s
from benchmarks.faults.run import CLIENTS, WHOLE_S, LoadedCluster, loaded_cluster
from benchmarks.faults.samples import SETTLE_S, Sampler, Trend, shared_ends, trends
from benchmarks.record import RESULTS, provenance, table

logger = logging.getLogger(__name__)

PAGE = RESULTS / "soak.md"
CHOSEN = ("store", "ndp", "worker", "ingress", "manager", "link", "throttle", "redis", "damage")
TOO_SHORT = "This run is too short to tell a leak from a start: slopes are those of first requests."
PAUSE_S = (5.0, 25.0)
"""Fault-free seconds between a cluster that is whole again and the next fault: from, to."""
LIVED, SETTLED = 6, 12
"""Parts of the run: a process that lived less has no trend, and its first so much is none."""
LONG_S = 1200.0
INIT = "bash"  # process 1 of each host
MB = 1e6
GROWS_MB_PER_H = 20.0
"""Less than this, or than twice its standard error, is called flat."""


@dataclass(slots=True)
class Run:
    """What is known of a soak so far."""

    minutes: float
    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    not_whole: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    trends: list[Trend] = field(default_factory=list)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # So that SIGTERM too takes the way through which everything is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    text = page(soak(arguments.minutes, arguments.seed))
    PAGE.write_text(text)
    print(text)


def soak(minutes: float, seed: int) -> Run:
    """Load and faults for so long, then the end of it all."""
    run = Run(minutes, seed)
    with loaded_cluster(seed=seed) as cluster:
        prints = footprint(cluster.deployment)
        began_s = time.monotonic()
        with Sampler(cluster.deployment) as sampler:
            break_again_and_again(cluster, run, random.Random(seed), began_s + minutes * 60)
        run.seconds = time.monotonic() - began_s
        run.outcomes = [o for o in cluster.outcomes() if o.ended_s is not None]
        run.trends = trends(
            sampler.samples,
            least_s=max(30.0, run.seconds / LIVED),
            settle_s=max(SETTLE_S, run.seconds / SETTLED),
        )
        run.shared = dict(shared_ends(sampler.shared))
        # Hosts that were started anew have namespaces that the first look could not see.
        after = footprint(cluster.deployment)
    run.left = [*leftovers(prints), *leftovers(after)]
    return run


def break_again_and_again(
    cluster: LoadedCluster, run: Run, choose: random.Random, until_s: float
) -> None:
    """One fault after another, each on a cluster that is whole."""
    faults = [fault for fault in ALL if fault.key in CHOSEN]
    while (pause_s := choose.uniform(*PAUSE_S)) + time.monotonic() < until_s:
        time.sleep(pause_s)
        fault = choose.choice(faults)
        logger.info("%s", fault.name)
        run.faults[fault.name] += 1
        if not suffer(cluster, fault):
            run.not_whole.append(fault.name)
            return


def suffer(cluster: LoadedCluster, fault: Fault) -> bool:
    """Break, heal, mend; whether it is whole again."""
    deployment = cluster.deployment
    fault.inject(deployment)
    if fault.heal is not None:
        time.sleep(fault.heal_after_s)
        fault.heal(deployment)
    if fault.mend is not None:
        deployment.until_full(WHOLE_S)
        fault.mend(deployment)
    return deployment.until_full(WHOLE_S) is not None


def page(run: Run) -> str:
    failed = [outcome for outcome in run.outcomes if outcome.error]
    errors = Counter(outcome.error for outcome in failed)
    started_s = min((outcome.started_s for outcome in run.outcomes), default=0.0)
    rate = tokens_per_s(run.outcomes, started_s, started_s + run.seconds)
    lines = [
        "# Load and random faults for a long time",
        "",
        f"Written by `python -m benchmarks.soak --minutes {run.minutes:g} --seed {run.seed}`; "
        f"{provenance()}",
        "",
        f"{CLIENTS} clients for {run.seconds / 60:.0f} minutes: {len(run.outcomes)} requests, "
        f"{len(failed)} failed, {sum(o.degraded for o in run.outcomes)} degraded, "
        f"{rate:.1f} tokens/s over all.",
        "",
        "Faults: "
        + ("; ".join(f"{n} x {name}" for name, n in sorted(run.faults.items())) or "-")
        + ".",
        "Not whole again after: " + ("; ".join(run.not_whole) or "none of them") + ".",
        "",
        "Failures: "
        + ("; ".join(f"{n} x {name}" for name, n in sorted(errors.items())) or "none")
        + ".",
        "",
        "## Memory, descriptors, threads",
        "",
        f"Of every process that lived 1/{LIVED} of the run after its start-up (1/{SETTLED} of the "
        f"run, {SETTLE_S:g} s at least): anonymous memory and the slope of a least-squares line "
        "with its standard error (samples of one process follow each other, so the true error is "
        "larger), over all of that and over its second half; descriptors and threads at both ends. "
        "Threads are started as calls first need that many at once, and each keeps about a MB: "
        "memory that grows until then is no leak. So it grows if both slopes are above "
        f"{GROWS_MB_PER_H:g} MB/h and twice their errors.",
        *([TOO_SHORT] if run.seconds < LONG_S else []),
        "",
        _trend_table(run.trends),
        "",
        "/dev/shm of each host, MB at both ends: "
        + ", ".join(f"{h} {a / MB:.0f} -> {b / MB:.0f}" for h, (a, b) in sorted(run.shared.items()))
        + ".",
        "",
        "## Left after shutdown",
        "",
        "Looked for: processes, namespaces, mounts, unix sockets, temporary folders.",
        "",
        *([f"- {each}" for each in run.left] or ["Nothing."]),
        "",
    ]
    return "\n".join(lines)


def _trend_table(found: Sequence[Trend]) -> str:
    head = (
        *("process", "host", "minutes", "MB", "MB/h", "+-", "2nd half, MB/h", "+-"),
        *("files", "threads", "memory"),
    )
    return table(
        head,
        [
            (
                trend.role,
                trend.host,
                f"{trend.seconds / 60:.1f}",
                f"{trend.own_bytes / MB:.0f}",
                f"{trend.bytes_per_h / MB:+.1f}",
                f"{trend.error_bytes_per_h / MB:.1f}",
                f"{trend.late_bytes_per_h / MB:+.1f}",
                f"{trend.late_error_bytes_per_h / MB:.1f}",
                f"{trend.num_files[0]} -> {trend.num_files[1]}",
                f"{trend.num_threads[0]} -> {trend.num_threads[1]}",
                "grows" if grows(trend) else "flat",
            )
            for trend in found
            if trend.role != INIT
        ],
    )


def grows(trend: Trend) -> bool:
    """Whether its memory rises by more than noise and more than is worth a word, to the end."""
    return all(
        per_h > max(GROWS_MB_PER_H * MB, 2 * error)
        for per_h, error in (
            (trend.bytes_per_h, trend.error_bytes_per_h),
            (trend.late_bytes_per_h, trend.late_error_bytes_per_h),
        )
    )


if __name__ == "__main__":
    main()
