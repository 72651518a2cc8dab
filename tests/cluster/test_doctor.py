"""Goal: the doctor's choices and findings follow from the machine; each finding says what to do.

Method: pure cases against one healthy made-up machine, each changed in one place.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cluster.commands import doctor
from cluster.doctor import GIBIBYTE, MEBIBYTE, advise
from cluster.machine import PACKAGES, Accelerators, Cpu, Gpu, Machine, Memory, Space

NO_GPU = Accelerators((), None, False, None)
H200 = Gpu("NVIDIA H200", "9.0", 140 * GIBIBYTE, 100 * GIBIBYTE)
HEALTHY = Machine(
    system="Linux x86_64",
    python="3.11.7",
    cpu=Cpu("a cpu", 8, 8, None, ("avx2", "avx512_vnni")),
    memory=Memory(64 * GIBIBYTE, None, 60 * GIBIBYTE),
    shared_memory=Space("/dev/shm", 32 * GIBIBYTE, 32 * GIBIBYTE),
    accelerators=NO_GPU,
    native_isa="avx512vnni",
    compiler="/usr/bin/c++",
    versions=dict.fromkeys(PACKAGES, "1.0"),
    redis_server=None,
    redis=None,
    bundled_model="/somewhere",
    cache=Space("/cache", 100 * GIBIBYTE, 50 * GIBIBYTE),
)


def versions_without(*names: str) -> dict[str, str | None]:
    return {**HEALTHY.versions, **dict.fromkeys(names)}


def test_healthy_cpu_machine_has_nothing_to_complain_about() -> None:
    advice = advise(HEALTHY)
    assert advice.findings == ()
    assert advice.can_serve
    assert (advice.device, advice.dtype, advice.backend) == ("cpu", "float32", "cpu_fp32")
    assert advice.ndp_threads == 4  # half of 8: the GPU worker computes on the others
    assert advice.expert_cache_bytes == 512 * MEBIBYTE
    assert advice.transport == "object_store"


def test_gpu_machine_keeps_one_core_and_uses_most_of_the_smallest_gpu() -> None:
    small = replace(H200, free_bytes=50 * GIBIBYTE)
    advice = advise(replace(HEALTHY, accelerators=Accelerators((H200, small), "13.0", True, None)))
    assert (advice.device, advice.dtype, advice.backend) == ("cuda", "bfloat16", "triton")
    assert advice.ndp_threads == 7
    assert advice.expert_cache_bytes == 30 * GIBIBYTE
    assert advice.findings == ()


@pytest.mark.parametrize(
    ("cores", "quota", "usable", "threads"),
    [(8, None, 8, 4), (8, 2.5, 2, 1), (8, 0.5, 1, 1), (2, 16.0, 2, 1), (1, None, 1, 1)],
)
def test_threads_fit_affinity_and_quota(cores, quota, usable, threads) -> None:
    machine = replace(HEALTHY, cpu=Cpu("a cpu", 64, cores, quota, ()))
    assert machine.cpu.usable_cores == usable
    assert advise(machine).ndp_threads == threads


def test_little_memory_shrinks_the_cache() -> None:
    machine = replace(HEALTHY, memory=Memory(64 * GIBIBYTE, 2 * GIBIBYTE, GIBIBYTE))
    advice = advise(machine)
    assert advice.expert_cache_bytes == GIBIBYTE // 8
    assert "1.0 GiB of memory free under the container's limit" in advice.findings[0].what


FINDINGS = {
    "no kernels, compiler": (
        {"native_isa": None},
        "warning",
        "kernels are not built",
        "install moetier again",
    ),
    "no kernels": (
        {"native_isa": None, "compiler": None},
        "warning",
        "kernels are not built",
        "g++",
    ),
    "scalar": ({"native_isa": "scalar"}, "warning", "no instruction set", "AVX2"),
    "quota": (
        {"cpu": Cpu("a cpu", 8, 8, 1.5, ())},
        "warning",
        "sees 8 cores but may use 1.5",
        "at most 1",
    ),
    "no torch": ({"versions": versions_without("torch")}, "error", "package torch", "pip install"),
    "no ray": ({"versions": versions_without("ray")}, "error", "package ray", "pip install"),
    "no hqq": ({"versions": versions_without("hqq")}, "warning", "package hqq", "pip install"),
    "no triton on gpu": (
        {
            "versions": versions_without("triton"),
            "accelerators": Accelerators((H200,), "13.0", True, None),
        },
        "error",
        "triton is not",
        "pip install triton",
    ),
    "broken torch": (
        {"accelerators": Accelerators((), None, True, "libcudart.so.13: no such file")},
        "error",
        "libcudart.so.13",
        "install torch again",
    ),
    "cpu torch on gpu": (
        {"accelerators": Accelerators((), None, True, None)},
        "warning",
        "without CUDA",
        "CUDA build",
    ),
    "hidden gpu": (
        {"accelerators": Accelerators((), "13.0", True, None)},
        "warning",
        "sees no GPU",
        "nvidia-smi",
    ),
    "small shm": (
        {"shared_memory": Space("/dev/shm", 64 * MEBIBYTE, 64 * MEBIBYTE)},
        "warning",
        "/dev/shm is 64 MiB",
        "--shm-size",
    ),
    "no shm": ({"shared_memory": None}, "warning", "/dev/shm is missing", "emptyDir"),
    "full disk": (
        {"cache": Space("/cache", 100 * GIBIBYTE, GIBIBYTE)},
        "warning",
        "1.0 GiB of disk free in /cache",
        "MOETIER_CACHE",
    ),
    "no cache": ({"cache": None}, "warning", "no space of disk free", "MOETIER_CACHE"),
    "redis away": ({"redis": "not reachable at x:1"}, "warning", "not reachable", "memory"),
    "no model": ({"bundled_model": None}, "warning", "mixtral-mini", "wheel"),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_each_fault_is_found_alone_with_its_remedy(case: str) -> None:
    change, severity, what, do = FINDINGS[case]
    machine = replace(HEALTHY, **change)
    (finding,) = advise(machine).findings
    assert finding.severity == severity
    assert what in finding.what
    assert do in finding.do
    assert advise(machine).can_serve == (severity != "error")
    assert finding.what in doctor.as_text(machine, advise(machine))


def test_errors_come_first() -> None:
    machine = replace(
        HEALTHY, native_isa=None, versions=versions_without("ray"), bundled_model=None
    )
    severities = [finding.severity for finding in advise(machine).findings]
    assert severities == ["error", "warning", "warning"]


@pytest.mark.parametrize("shm", [HEALTHY.shared_memory, None])
def test_transport_follows_shared_memory(shm) -> None:
    advice = advise(replace(HEALTHY, shared_memory=shm))
    assert advice.transport == ("object_store" if shm else "grpc")


@pytest.mark.parametrize("redis", ["ok", "ok, wants a password"])
def test_answering_redis_is_fine(redis: str) -> None:
    machine = replace(HEALTHY, redis=redis)
    assert advise(machine).findings == ()
    assert redis in doctor.as_text(machine, advise(machine))


def test_json_holds_everything_the_table_says() -> None:
    machine = replace(HEALTHY, native_isa=None)
    report = json.loads(doctor.as_json(machine, advise(machine)))
    assert report["machine"]["memory"]["total_bytes"] == 64 * GIBIBYTE
    assert report["machine"]["usable_cores"] == 8
    assert report["advice"]["ndp_threads"] == 4
    assert report["advice"]["findings"][0]["do"]
    assert report["can_serve"] is True
