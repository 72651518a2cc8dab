"""Step 6: the unit tests that touch the device, compiled and run on it instead of interpreted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.setting import ROOT, Setting

FILES = (
    "tests/kernels/test_triton.py",
    "tests/kernels/test_triton_grouped.py",
    "tests/kernels/test_triton_block_code.py",
    "tests/gpu_worker/test_streamer_gpu.py",
)
TINY = ("tests/cluster/test_table.py", "--noconftest")
"""Shows that tests are started and read; quick, because it imports no torch."""
LIMIT_S = 100
TAIL = 2500


def run(setting: Setting, recorder: Recorder) -> None:
    if importlib.util.find_spec("pytest") is None:
        recorder.note("pytest is not installed here: the unit tests were not run")
        return
    chosen = TINY if setting.tiny else FILES
    if not setting.tiny and importlib.util.find_spec("xdist"):
        chosen = (*chosen, "-n", "4")  # most of the time is compiling
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if setting.tiny else "0"}
    try:
        told = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        recorder.check("unit tests", f"end within {LIMIT_S} s", False, detail=_text(error.stdout))
        return
    output = told.stdout + told.stderr
    passed = re.search(r"(\d+) passed", output)
    recorder.check(
        "unit tests",
        " ".join(chosen),
        told.returncode == 0 and passed is not None,
        detail=output.strip().splitlines()[-1][:200] if output.strip() else "no output",
    )
    recorder.note(f"```\n{output[-TAIL:]}\n```")


def _text(output: bytes | str | None) -> str:
    return (output.decode(errors="replace") if isinstance(output, bytes) else output or "")[-500:]
