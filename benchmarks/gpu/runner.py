"""Runs the steps, each in a process of its own: a fault, a hang or a lost CUDA context ends one.

`python -m benchmarks.gpu.runner STEP --findings FILE` is such a process. A tiny run has no GPU to
lose and stays in one process. Steps of one stage run side by side; stages follow each other.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.gpu.recorder import Check, Finding, Recorder, read_findings
from benchmarks.gpu.setting import ROOT, Setting

TOTAL_S = 515
"""All steps together: the device machine gives a command 10 minutes, `make gpu-check` takes 9."""
LEAST_S = 15
"""A step with less time left is not started."""
ERROR_TAIL = 2500


@dataclass(frozen=True, slots=True)
class Step:
    """One step: `module.run(setting, recorder, **options)`, and the seconds it may take."""

    name: str
    title: str
    module: str
    budget_s: float
    options: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a step. "red": it failed, was stopped, or a check of it failed."""

    step: Step
    status: Literal["green", "red"]
    seconds: float
    findings: tuple[Finding, ...]
    failure: str = ""  # why it did not end by itself


def _gate(bits: int, grid: str) -> Step:
    return Step(
        f"gate-{grid}-{bits}",
        f"Gate, {bits} bits {grid}: Triton kernels against the reference",
        "benchmarks.gpu.gate",
        150,
        {"bits": bits, "grid": grid},
    )


STAGES: tuple[tuple[Step, ...], ...] = (
    (Step("machine", "Machine and versions", "benchmarks.gpu.machine", 110),),
    # Most of the gate is compiling, on the CPU's cores; times are taken only in later stages.
    (
        *(_gate(bits, "affine") for bits in (2, 3, 4)),
        *(_gate(bits, "symmetric") for bits in (1, 2, 3, 4)),
    ),
    (Step("decode", "Decode: share of copy bandwidth", "benchmarks.gpu.bandwidth", 140),),
    (Step("steps", "Whole steps: experts grouped, one by one, bf16", "benchmarks.gpu.steps", 70),),
    (Step("prefill", "Prefill: TFLOP/s", "benchmarks.gpu.prefill", 60),),
    (Step("system", "One-process system on a store", "benchmarks.gpu.system", 110),),
    (Step("streaming", "Streaming and overlap", "benchmarks.gpu.streaming", 80),),
    (Step("offload", "The headline over PCIe", "benchmarks.gpu.offload", 90),),
    (Step("tests", "Unit tests on the device", "benchmarks.gpu.unit_tests", 110),),
    # Last: what time is left goes to others' kernels, which tune themselves first.
    (Step("peers", "Beside gemlite", "benchmarks.gpu.peers", 80),),
)
STEPS = {step.name: step for stage in STAGES for step in stage}

RunStep = Callable[[Step, Path, float], str]
"""(step, findings file, seconds it may take) -> why it failed, "" when it ended by itself."""


def run_all(
    stages: Sequence[Sequence[Step]],
    run_step: RunStep,
    folder: Path,
    *,
    total_s: float = TOTAL_S,
    side_by_side: bool = True,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Every step's result, in order; one that fails never keeps the next from running."""
    end_s = clock() + total_s
    results: list[Result] = []
    for stage in stages:
        left_s = end_s - clock()
        with ThreadPoolExecutor(len(stage) if side_by_side else 1) as pool:
            run = functools.partial(_run_one, run_step, folder, left_s, clock)
            for result in pool.map(run, stage):
                say(f"{result.status:5} {result.seconds:6.1f} s  {result.step.title}")
                results.append(result)
    return results


def _run_one(
    run_step: RunStep, folder: Path, left_s: float, clock: Callable[[], float], step: Step
) -> Result:
    if left_s < LEAST_S:
        failure = f"not started: {left_s:.0f} s were left of the whole run's time"
        return Result(step, "red", 0.0, (), failure)
    path, start_s = folder / f"{step.name}.jsonl", clock()
    failure = run_step(step, path, min(step.budget_s, left_s))
    findings = tuple(read_findings(path))
    failed = any(isinstance(finding, Check) and not finding.passed for finding in findings)
    return Result(
        step, "red" if failure or failed else "green", clock() - start_s, findings, failure
    )


def in_own_process(setting: Setting) -> RunStep:
    """Run steps as processes, stopped when their time is over."""

    def run_step(step: Step, path: Path, limit_s: float) -> str:
        command = [sys.executable, "-m", "benchmarks.gpu.runner", step.name]
        command += ["--findings", str(path), "--store", str(setting.store)]
        command += ["--tiny"] if setting.tiny else []
        return run_process(command, limit_s)

    return run_step


def run_process(command: list[str], limit_s: float) -> str:
    """Why the process failed, with the end of what it said; "" when it did not."""
    try:
        told = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"stopped after its {limit_s:.0f} s; what it had found until then is kept"
    if told.returncode == 0:
        return ""
    return f"exit code {told.returncode}\n{(told.stdout + told.stderr)[-ERROR_TAIL:]}"


def in_this_process(setting: Setting) -> RunStep:
    """Run steps here, one after another: for a tiny run."""

    def run_step(step: Step, path: Path, limit_s: float) -> str:
        try:
            execute(step, setting, path)
        except Exception:  # noqa: BLE001 - reported as the step's failure; the next step runs
            return traceback.format_exc()[-ERROR_TAIL:]
        return ""

    return run_step


def execute(step: Step, setting: Setting, path: Path) -> None:
    """Run one step here and now; what it raises is the caller's."""
    module = importlib.import_module(step.module)
    module.run(setting, Recorder(path, tiny=setting.tiny), **step.options)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one step of the GPU check.")
    parser.add_argument("step", choices=sorted(STEPS))
    parser.add_argument("--findings", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    setting = Setting(tiny=arguments.tiny, store=arguments.store)
    execute(STEPS[arguments.step], setting, arguments.findings)


if __name__ == "__main__":
    main()
