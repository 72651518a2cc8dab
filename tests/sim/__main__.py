"""`python -m tests.sim --seed N` replays one run and prints its log; `--runs N` tries many."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.sim.assets import PROMPTS, make_assets
from tests.sim.fault_plan import draw
from tests.sim.running import Outcome, run_plan, run_seed, shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this one and print its log")
    parser.add_argument("--runs", type=int, default=100, help="how many seeds to try")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--shrink", action="store_true", help="drop faults that are not needed")
    said = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="moetier-sim-") as folder:
        if said.seed is not None:
            return replay(said.seed, Path(folder), shrinks=said.shrink)
        return run_many(range(said.first, said.first + said.runs), Path(folder))


def replay(seed: int, folder: Path, *, shrinks: bool) -> int:
    """One seed, with everything that happened."""
    assets = make_assets(folder)
    outcome = run_plan(draw(seed, num_prompts=len(PROMPTS)), assets)
    if shrinks and outcome.problems:
        outcome = shrink(outcome, assets)
    tell(outcome)
    return 1 if outcome.problems else 0


def run_many(seeds: range, folder: Path) -> int:
    """Many seeds; the failing ones by number."""
    assets = make_assets(folder)
    total: Counter[str] = Counter()
    failing: list[int] = []
    began_s = time.monotonic()
    for seed in seeds:
        outcome = run_seed(seed, assets)
        total["runs"] += 1
        total["faults"] += len(outcome.plan.faults)
        total["steps"] += outcome.num_steps
        total["answered"] += outcome.num_ok
        total["degraded"] += outcome.num_degraded
        total["refused with a typed error"] += outcome.num_failed
        if outcome.problems:
            failing.append(seed)
            say(f"seed {seed} FAILS: {outcome.problems[0][:600]}")
    took_s = time.monotonic() - began_s
    say(", ".join(f"{count} {name}" for name, count in total.items()) + f", {took_s:.1f} s")
    if failing:
        say(f"{len(failing)} seeds fail; replay one: python -m tests.sim --seed {failing[0]}")
    return 1 if failing else 0


def tell(outcome: Outcome) -> None:
    """The choices, the log and the broken promises of one run."""
    plan = outcome.plan
    say(
        f"seed {plan.seed}: near data {plan.near_data}, prefetch {plan.prefetch}, "
        f"compression {plan.compression}, cache {plan.cache_bytes} bytes"
    )
    for event in outcome.events:
        say(event)
    for problem in outcome.problems:
        say(f"BROKEN: {problem}")
    say(f"log digest {outcome.digest}, {outcome.num_steps} steps")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
