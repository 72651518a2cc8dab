"""`moetier doctor`: prints what this machine has and what moetier would do with it."""

from __future__ import annotations

import argparse
import dataclasses
import json

from cluster.doctor import GIBIBYTE, MEBIBYTE, Advice, advise
from cluster.environment import cache_folder
from cluster.machine import Machine, Space, read_machine
from cluster.table import counted, format_table
from models import MIXTRAL_MINI

HELP = """What this machine has, and what moetier would do with it.

Reads cores, memory, instruction sets, GPU, package versions, Redis and disk; changes nothing.
Exit code 0 when moetier can serve here (warnings or not), 1 when something essential is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--redis",
        metavar="URL",
        help="also see whether a Redis answers there, e.g. redis://10.0.0.5:6379 (no password)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises ValueError for a --redis that is not a Redis URL."""
    machine = read_machine(cache_folder(), redis_url=args.redis, model=MIXTRAL_MINI)
    advice = advise(machine)
    print(as_json(machine, advice) if args.json else as_text(machine, advice))
    return 0 if advice.can_serve else 1


def as_json(machine: Machine, advice: Advice) -> str:
    """Bytes stay bytes; the two halves are the fields of `Machine` and `Advice`."""
    report = {
        "machine": dataclasses.asdict(machine) | {"usable_cores": machine.cpu.usable_cores},
        "advice": dataclasses.asdict(advice),
        "can_serve": advice.can_serve,
    }
    return json.dumps(report, indent=2)


def as_text(machine: Machine, advice: Advice) -> str:
    has = [{"this machine has": name, "": value} for name, value in machine_rows(machine)]
    would = [{"moetier would use": name, "": value} for name, value in advice_rows(advice)]
    parts = [format_table(has), format_table(would)]
    if advice.findings:
        lines = [f"{item.severity}: {item.what}\n  do: {item.do}" for item in advice.findings]
        parts.append("\n".join(lines))
    else:
        parts.append("nothing to complain about")
    return "\n\n".join(parts)


def machine_rows(machine: Machine) -> list[tuple[str, str]]:
    cpu, memory, accelerators = machine.cpu, machine.memory, machine.accelerators
    quota = "" if cpu.quota_cores is None else f", container quota {cpu.quota_cores:g}"
    limit = "" if memory.limit_bytes is None else f", limit {gib(memory.limit_bytes)}"
    gpus = [
        f"{gpu.name} (sm {gpu.capability}), {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"
        for gpu in accelerators.gpus
    ]
    rows = [
        ("system", f"{machine.system}, Python {machine.python}"),
        ("cpu", cpu.model),
        ("cores", f"{cpu.total_cores}, usable {cpu.usable_cores}{quota}"),
        ("instruction sets", " ".join(cpu.flags) or "none that matter"),
        ("native kernels", machine.native_isa or "not built"),
        ("compiler", machine.compiler or "none"),
        ("memory", f"{gib(memory.available_bytes)} of {gib(memory.total_bytes)} free{limit}"),
        ("/dev/shm", space(machine.shared_memory)),
        ("gpu", "; ".join(gpus) or "none"),
        *((name, version or "not installed") for name, version in machine.versions.items()),
        ("redis server", machine.redis_server or "not installed (needed by directory: redis only)"),
        ("bundled model", machine.bundled_model or "missing"),
        ("cache", f"{machine.cache.path}: {space(machine.cache)}" if machine.cache else "none"),
    ]
    if machine.redis is not None:
        rows.append(("redis asked", machine.redis))
    return rows


def advice_rows(advice: Advice) -> list[tuple[str, str]]:
    return [
        ("device", f"{advice.device}, {advice.dtype}"),
        ("backend", advice.backend),
        (
            "near-data workers",
            f"{advice.ndp_backend}, {counted(advice.ndp_threads, 'compute thread')}",
        ),
        ("expert cache", f"{advice.expert_cache_bytes / MEBIBYTE:.0f} MiB"),
        ("transport", advice.transport),
    ]


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIBIBYTE:.1f} GiB"


def space(found: Space | None) -> str:
    return f"{gib(found.free_bytes)} of {gib(found.total_bytes)} free" if found else "none"
