"""What moetier would do on a machine and what its owner should know: pure functions of a `Machine`.

Proposes where nothing was configured; the running system decides by its own config, not by this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.machine import Machine

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30

ESSENTIAL = ("torch", "transformers", "ray", "grpcio", "safetensors")
"""Packages without which `moetier serve` cannot start."""
CPU_CACHE_BYTES = 512 * MEBIBYTE
"""On CPU a slot only saves a copy out of memory that is as near, so a small cache is enough."""
GPU_CACHE_SHARE = 0.6
"""Of the free device memory; the rest is for the dense part, the KV cache and activations."""
MIN_SHM_BYTES = GIBIBYTE
"""Below this Ray's object store cannot hold a store segment; containers often get 64 MiB."""
MIN_MEMORY_BYTES = 4 * GIBIBYTE
MIN_DISK_BYTES = 5 * GIBIBYTE


@dataclass(frozen=True, slots=True)
class Finding:
    """What the owner should know, and what to do about it. An error keeps moetier from serving."""

    severity: Literal["error", "warning"]
    what: str
    do: str


@dataclass(frozen=True, slots=True)
class Advice:
    """What moetier would choose here by itself, and the findings, errors first."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    backend: Literal["cpu_fp32", "triton"]
    ndp_backend: Literal["cpu_int8"]
    ndp_threads: int
    expert_cache_bytes: int
    transport: Literal["object_store", "grpc"]
    findings: tuple[Finding, ...]

    @property
    def can_serve(self) -> bool:
        return all(finding.severity != "error" for finding in self.findings)


def advise(machine: Machine) -> Advice:
    """The choices and findings for this machine."""
    gpus = machine.accelerators.gpus
    cores = machine.cpu.usable_cores
    if gpus:
        cache_bytes = int(min(gpu.free_bytes for gpu in gpus) * GPU_CACHE_SHARE)
        # One core stays with the GPU worker's own Python, which launches the kernels.
        ndp_threads = max(1, cores - 1)
    else:
        cache_bytes = min(CPU_CACHE_BYTES, machine.memory.available_bytes // 8)
        # The GPU worker computes on CPU too: half each. More threads than cores cost a
        # scheduler quantum per barrier (8 ms instead of 0.5 ms a layer, measured on 2 cores).
        ndp_threads = max(1, cores // 2)
    shm = machine.shared_memory
    roomy = shm is not None and shm.total_bytes >= MIN_SHM_BYTES
    findings = sorted(_findings(machine), key=lambda finding: finding.severity)
    return Advice(
        device="cuda" if gpus else "cpu",
        dtype="bfloat16" if gpus else "float32",
        backend="triton" if gpus else "cpu_fp32",
        ndp_backend="cpu_int8",
        ndp_threads=ndp_threads,
        expert_cache_bytes=cache_bytes,
        transport="object_store" if roomy else "grpc",
        findings=tuple(findings),
    )


def _findings(machine: Machine) -> Iterator[Finding]:
    yield from _package_findings(machine)
    yield from _cpu_findings(machine)
    yield from _gpu_findings(machine)
    yield from _space_findings(machine)
    if machine.redis is not None and not machine.redis.startswith("ok"):
        yield Finding(
            "warning",
            f"Redis: {machine.redis}",
            "check the address, or use directory.kind: memory, which needs none",
        )
    if machine.bundled_model is None:
        yield Finding(
            "warning",
            "the bundled model mixtral-mini is not there",
            "install the whole wheel again, or name a model: moetier compress MODEL STORE",
        )


def _package_findings(machine: Machine) -> Iterator[Finding]:
    for name in ESSENTIAL:
        if machine.versions.get(name) is None:
            yield Finding(
                "error",
                f"Python package {name} is not installed",
                "pip install -c constraints.txt moetier (or make demo in a checkout)",
            )
    if machine.versions.get("hqq") is None:
        yield Finding(
            "warning",
            "Python package hqq is not installed: compress --recipe paper cannot run",
            "pip install -c constraints.txt moetier",
        )


def _cpu_findings(machine: Machine) -> Iterator[Finding]:
    cpu = machine.cpu
    if machine.native_isa is None:
        compiler = (
            "a compiler is here: install moetier again"
            if machine.compiler
            else "install a C++ compiler (Debian: apt-get install g++), then moetier again"
        )
        yield Finding(
            "warning",
            "the native CPU kernels are not built: the portable path is many times slower",
            compiler,
        )
    elif machine.native_isa == "scalar":
        yield Finding(
            "warning",
            f"{cpu.model} has no instruction set that the fast CPU kernels use",
            "run near-data workers on a CPU with AVX2, better AVX-512 VNNI",
        )
    if cpu.quota_cores is not None and cpu.quota_cores < cpu.allowed_cores:
        yield Finding(
            "warning",
            f"this container sees {cpu.allowed_cores} cores but may use {cpu.quota_cores:g}",
            f"set ndp.num_threads and OMP_NUM_THREADS to at most {cpu.usable_cores}",
        )


def _gpu_findings(machine: Machine) -> Iterator[Finding]:
    accelerators = machine.accelerators
    if accelerators.problem is not None and machine.versions.get("torch") is not None:
        yield Finding(
            "error",
            f"torch does not work: {accelerators.problem}",
            "install torch again as constraints.txt says, or a build that fits the GPU's driver",
        )
    elif accelerators.driver_seen and not accelerators.gpus:
        built = accelerators.torch_cuda
        yield Finding(
            "warning",
            "an NVIDIA driver is here, but torch "
            + (f"(CUDA {built}) sees no GPU" if built else "was built without CUDA"),
            "check nvidia-smi and CUDA_VISIBLE_DEVICES"
            if built
            else "install a CUDA build of the torch version in constraints.txt",
        )
    if accelerators.gpus and machine.versions.get("triton") is None:
        yield Finding(
            "error",
            "a GPU is here, but Python package triton is not",
            "pip install triton, as constraints.txt says",
        )


def _space_findings(machine: Machine) -> Iterator[Finding]:
    memory, shm, cache = machine.memory, machine.shared_memory, machine.cache
    if memory.available_bytes < MIN_MEMORY_BYTES:
        limit = "" if memory.limit_bytes is None else " under the container's limit"
        yield Finding(
            "warning",
            f"{memory.available_bytes / GIBIBYTE:.1f} GiB of memory free{limit}",
            f"leave at least {MIN_MEMORY_BYTES / GIBIBYTE:.0f} GiB: Ray alone takes about one",
        )
    if shm is None or shm.total_bytes < MIN_SHM_BYTES:
        size = "missing" if shm is None else f"{shm.total_bytes / MEBIBYTE:.0f} MiB"
        yield Finding(
            "warning",
            f"/dev/shm is {size}: Ray's object store falls back to disk",
            "docker run --shm-size=2g, or an emptyDir of medium Memory in Kubernetes; "
            "until then use store.transport: grpc",
        )
    if cache is None or cache.free_bytes < MIN_DISK_BYTES:
        free = "no space" if cache is None else f"{cache.free_bytes / GIBIBYTE:.1f} GiB"
        place = "" if cache is None else f" in {cache.path}"
        yield Finding(
            "warning",
            f"{free} of disk free{place} for stores",
            f"free some, or point MOETIER_CACHE elsewhere; {MIN_DISK_BYTES // GIBIBYTE} GiB is "
            "comfortable for small models",
        )
