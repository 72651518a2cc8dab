"""What this machine has: cores, memory, /dev/shm, instruction sets, GPU, packages, Redis, disk.

Reads only; a thing that is missing or unreadable is None or empty, never an exception. Decides
nothing: that is `cluster/doctor.py`. Of the heavy packages only torch is imported, for the GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.redis_probe import probe_redis

PACKAGES = ("torch", "transformers", "ray", "triton", "hqq", "redis", "grpcio", "safetensors")
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8")
"""x86 instruction sets that CPU kernels of this kind use; other machines report none of them."""
UNLIMITED = 1 << 60
"""A cgroup v1 limit above this means none (it is the largest page-aligned signed number)."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """Cores: of the machine, those this process may run on, and the CPU quota of its container."""

    model: str
    total_cores: int
    allowed_cores: int
    quota_cores: float | None
    flags: tuple[str, ...]

    @property
    def usable_cores(self) -> int:
        """Whole cores that may be busy at once, at least 1."""
        quota = self.allowed_cores if self.quota_cores is None else self.quota_cores
        return max(1, int(min(self.allowed_cores, quota)))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `available_bytes` respects the container's limit, which is None when there is none."""

    total_bytes: int
    limit_bytes: int | None
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of the file system that holds `path`."""

    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Accelerators:
    """GPUs that torch can use; what torch was built for; whether the driver shows a GPU at all."""

    gpus: tuple[Gpu, ...]
    torch_cuda: str | None
    driver_seen: bool
    problem: str | None


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything the doctor knows."""

    system: str
    python: str
    cpu: Cpu
    memory: Memory
    shared_memory: Space | None
    accelerators: Accelerators
    native_isa: str | None
    compiler: str | None
    versions: dict[str, str | None]
    redis_server: str | None
    redis: str | None  # None: not asked; "ok" or what is wrong
    bundled_model: str | None
    cache: Space | None


def read_machine(
    cache: Path, *, redis_url: str | None = None, model: Path | None = None, root: Path = Path("/")
) -> Machine:
    """Look at everything once; about two seconds, most of it importing torch.

    `root` stands for / where /proc, /sys and /dev are read. Raises ValueError for a redis_url that
    is not one.
    """
    redis = None if redis_url is None else probe_redis(redis_url)
    has_model = model is not None and (model / "config.json").is_file()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpu=read_cpu(root),
        memory=read_memory(root),
        shared_memory=read_space(root / "dev/shm"),
        accelerators=read_accelerators(root),
        native_isa=read_native_isa(),
        compiler=first_found("c++", "g++", "clang++"),
        versions={name: read_version(name) for name in PACKAGES},
        redis_server=first_found("redis-server", "valkey-server"),
        redis=redis,
        bundled_model=str(model) if has_model else None,
        cache=read_space(cache),
    )


def read_cpu(root: Path) -> Cpu:
    info = read_text(root / "proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    present = set(named.get("flags", "").split())
    total = os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return Cpu(
        model=named.get("model name") or platform.processor() or platform.machine(),
        total_cores=total,
        allowed_cores=len(affinity(0)) if affinity else total,
        quota_cores=read_quota(root),
        flags=tuple(flag for flag in FLAGS if flag in present),
    )


def read_quota(root: Path) -> float | None:
    """Cores' worth of CPU time that the container may use; the tightest of the nested groups."""
    quotas = []
    for folder in cgroup_folders(root):
        quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota = read_text(folder / "cpu.cfs_quota_us").strip()
            period = read_text(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def read_memory(root: Path) -> Memory:
    kilobytes = {}
    for line in read_text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        kilobytes[name] = int(value.split()[0]) if value.split()[:1] else 0
    total = kilobytes.get("MemTotal", 0) * 1024
    available = kilobytes.get("MemAvailable", 0) * 1024
    limit = None
    for folder in cgroup_folders(root):
        bound = read_number(folder, "memory.max", "memory.limit_in_bytes")
        if bound is None or bound >= UNLIMITED:
            continue
        used = read_number(folder, "memory.current", "memory.usage_in_bytes") or 0
        limit = bound if limit is None else min(limit, bound)
        available = min(available, max(0, bound - used)) if total else max(0, bound - used)
    return Memory(total, limit, available)


def cgroup_folders(root: Path) -> list[Path]:
    """Where this process' limits may stand: its groups and their ancestors, cgroup v2 and v1."""
    folders = []
    base = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top = base
        elif {"cpu", "memory"} & set(controllers.split(",")):
            top = base / controllers
        else:
            continue
        group = Path(path.lstrip("/"))
        folders += [top / part for part in (group, *group.parents)]
    return folders or [base]


def read_number(folder: Path, *names: str) -> int | None:
    """The whole number in the first of these files that holds one."""
    for name in names:
        text = read_text(folder / name).strip()
        if text.isdigit():
            return int(text)
    return None


def read_space(path: Path) -> Space | None:
    """Space of the file system of `path`, or of its nearest parent that exists."""
    for place in (path, *path.parents):
        try:
            usage = shutil.disk_usage(place)
        except OSError:
            continue
        return Space(str(path), usage.total, usage.free)
    return None


def read_accelerators(root: Path) -> Accelerators:
    driver_seen = (root / "proc/driver/nvidia/version").exists()
    try:
        torch = importlib.import_module("torch")
        if not torch.cuda.is_available():
            return Accelerators((), torch.version.cuda, driver_seen, None)
        gpus = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            gpus.append(Gpu(torch.cuda.get_device_name(index), f"{major}.{minor}", total, free))
        return Accelerators(tuple(gpus), torch.version.cuda, driver_seen, None)
    # A torch that is missing, broken or at odds with its driver: told, not raised.
    except (ImportError, OSError, RuntimeError) as error:
        return Accelerators((), None, driver_seen, str(error))


def read_native_isa() -> str | None:
    """The instruction set our native kernels would use; None when they or torch are not there."""
    try:
        isa: str | None = importlib.import_module("kernels.ops").native_isa()
    except (ImportError, OSError):
        return None
    return isa


def read_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_found(*commands: str) -> str | None:
    """Path of the first of these commands that is installed."""
    return next((path for path in map(shutil.which, commands) if path), None)


def read_text(path: Path) -> str:
    """The file's text; empty when it cannot be read, which for /proc and /sys means not there."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
