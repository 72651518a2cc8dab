"""The whole one-process system on one CUDA GPU: gates first, then measurements, then a report.

`make gpu-check` runs every step in under 9 minutes and writes benchmarks/results/gpu/. `--prepare`
makes the store that a machine without hqq needs; `--tiny` proves the script itself on a CPU.
Exit codes: 0 all green, 1 something red, 2 no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.setting import RESULTS, ROOT, STORE, TINY_RESULTS, Setting

NO_GPU = """gpu_check: this machine has no GPU that torch can use, so nothing was checked.
Run it on one (benchmarks/results/gpu/README.md), or try the script itself with --tiny."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--store", type=Path, default=STORE, help=f"default: {STORE}")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}")
    parser.add_argument("--commit", default="", help="where the tree has no git")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, under the interpreter")
    parser.add_argument("--prepare", action="store_true", help="make the store (needs hqq)")
    given = parser.parse_args(arguments)
    if given.prepare:
        return _prepare(given.store)
    # Before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1" if given.tiny else "0"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    hardware = platform.processor() or platform.machine() if given.tiny else _gpu_name()
    if hardware is None:
        print(NO_GPU, file=sys.stderr)
        return 2
    out = given.out or (TINY_RESULTS if given.tiny else RESULTS)
    setting = Setting(tiny=given.tiny, store=given.store.absolute())
    return _run(setting, hardware, given.commit or _commit(), out)


def _run(setting: Setting, hardware: str, commit: str, out: Path) -> int:
    # Imported here: these load torch, which a check for a GPU does not wait for.
    from benchmarks.gpu import report
    from benchmarks.gpu.runner import STAGES, in_own_process, in_this_process, run_all

    run_step = in_this_process(setting) if setting.tiny else in_own_process(setting)
    with tempfile.TemporaryDirectory(prefix="moetier-gpu-") as folder:
        results = run_all(STAGES, run_step, Path(folder), side_by_side=not setting.tiny)
    today = datetime.date.today().isoformat()
    run = report.Run(results, hardware, commit, today, setting.tiny)
    paths = report.write(run, out)
    if device_out := os.environ.get("OUT"):
        for path in paths:
            shutil.copy(path, device_out)
    if not setting.tiny:
        print(report.render(run)[-9000:])
    print(f"{'green' if run.is_green else 'RED'}: wrote {paths[0]}")
    return 0 if run.is_green else 1


def _prepare(store: Path) -> int:
    from benchmarks.gpu.store import prepare

    prepare(store)
    files = [path for path in store.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"wrote {store}: {size / 2**20:.1f} MiB; carry this folder to the GPU machine")
    return 0


def _gpu_name() -> str | None:
    """Asked in another process: a process that has touched CUDA should not start others."""
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if told.returncode:
        raise RuntimeError(f"torch cannot be asked for a GPU: {told.stderr[-500:]}")
    return told.stdout.strip() or None


def _commit() -> str:
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
