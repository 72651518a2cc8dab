"""Step 1: what this machine is, and the native CPU kernels where a compiler can build them."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.setting import ROOT, Setting
from kernels import ops

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "grpcio", "ray", "hqq")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,pstate"
BUILD_S = 90


def run(setting: Setting, recorder: Recorder) -> None:
    recorder.note(f"{platform.platform()}, Python {platform.python_version()}")
    recorder.note(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    if setting.tiny:
        recorder.note("tiny: on the CPU, kernels under Triton's interpreter")
    else:
        recorder.note(_output(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]))
        device = torch.cuda.get_device_properties(0)
        recorder.note(
            f"{device.name}, compute capability {device.major}.{device.minor}, "
            f"{device.multi_processor_count} multiprocessors, L2 {device.L2_cache_size >> 20} MiB, "
            f"{device.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
        )
        recorder.check(
            "machine", "a tensor on the device adds", bool((torch.ones(4).cuda() + 1).sum() == 8)
        )
        _build_native(recorder)
    recorder.note(f"native CPU kernels: {ops.native_isa() or 'none, the portable torch path'}")


def _build_native(recorder: Recorder) -> None:
    """Optional: the CPU side of the comparison is only slower without them."""
    if ops.native_isa() is not None or not (shutil.which("g++") or shutil.which("c++")):
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        told = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=BUILD_S, check=False
        )
    except subprocess.TimeoutExpired:
        recorder.note(f"building the native kernels took over {BUILD_S} s and was stopped")
        return
    if told.returncode or told.stderr.strip():
        recorder.note(f"building the native kernels said: {told.stderr.strip()[-600:]}")
    importlib.invalidate_caches()
    ops._native.cache_clear()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _output(command: list[str]) -> str:
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (told.stdout + told.stderr).strip()
