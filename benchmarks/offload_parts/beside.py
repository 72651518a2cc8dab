"""What a user would run today on one machine, and our engine with everything resident, in turns.

None of them crosses the link: all have the whole model in local memory, which a GPU node whose
experts do not fit has not. Needs the extra `bench-offload`; what is not installed is left out.
"""

from __future__ import annotations

import importlib.util
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.offload_parts.contestants import RESIDENT
from benchmarks.offload_parts.hosts import ROOT, Node, TwoHosts
from benchmarks.offload_parts.rows import NO_LINK, Repetition
from benchmarks.offload_parts.stage import GateIsRed, Stage
from benchmarks.offload_parts.turn import Work

NATS_TOLERANCE = 0.02
"""Nats per token between our original and a rival's bfloat16: other sums of the same weights."""
EXTRA = "pip install 'moetier[bench-offload]'"


@dataclass(frozen=True, slots=True)
class Rival:
    """One way to run the checkpoint. `needs` are modules; `module` serves it."""

    key: str
    label: str
    module: str
    needs: tuple[str, ...]
    kind: str
    is_exact: bool = True  # bfloat16: its loss must be the original's


RIVALS = (
    Rival("th", "transformers, bf16 in memory", "rival_transformers", (), "memory"),
    Rival(
        "ta", "transformers + accelerate, experts on disk", "rival_transformers", ("accelerate",),
        "disk",
    ),
    Rival("lb", "llama.cpp, bf16 GGUF", "rival_llama", ("llama_cpp", "gguf"), "bf16"),
    Rival(
        "lq", "llama.cpp, Q4_0 GGUF", "rival_llama", ("llama_cpp", "gguf"), "q4_0", is_exact=False
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Beside:
    """What was measured without a link."""

    labels: Mapping[str, str]
    repetitions: Sequence[Repetition]
    more_nats: Mapping[str, float]  # than our original's, on the gate's windows
    left_out: Mapping[str, str]  # label -> why


def measure_beside(
    hosts: TwoHosts,
    stage: Stage,
    model: Path,
    original: Path,
    works: Sequence[Work],
    scratch: Path,
    say: Callable[[str], None],
) -> Beside:
    """Every rival that can run and our resident engines, interleaved. Raises GateIsRed."""
    nodes: dict[str, Node] = {}
    left_out: dict[str, str] = {}
    for rival in RIVALS:
        missing = [name for name in rival.needs if importlib.util.find_spec(name) is None]
        if missing:
            left_out[rival.label] = f"{', '.join(missing)} not installed: {EXTRA}"
            continue
        arguments = _prepared(rival, model, scratch)
        nodes[rival.key] = hosts.start(
            "gpu", f"benchmarks.offload_parts.{rival.module}", *arguments
        )
    ours = stage.open_resident(RESIDENT)
    more_nats = _gate(nodes, ours, original, works[0])
    say(f"gate: green: losses over the original's are {more_nats}")
    labels = {item.key: item.label for item in (*RIVALS, *RESIDENT) if item.label not in left_out}
    repetitions = []
    shuffled = random.Random(0)
    for number, work in enumerate(works):
        order = list(labels)
        shuffled.shuffle(order)
        for key in order:
            if key in nodes:
                answer = nodes[key].ask(do="turn", work=asdict(work))
            else:
                answer = ours.ask(do="turn", key=key, work=asdict(work))
            repetitions.append(Repetition.of(answer, key, number, NO_LINK, math.inf))
            say(f"no link, {number}: {labels[key]:44} {repetitions[-1].told}")
    ours.ask(do="close_all")
    return Beside(labels, repetitions, more_nats, left_out)


def _prepared(rival: Rival, model: Path, scratch: Path) -> list[str]:
    """The arguments of its module, after writing the file it wants."""
    if rival.kind == "memory":
        return [str(model)]
    if rival.kind == "disk":
        return [str(model), str(scratch / "offloaded")]
    file = scratch / f"{rival.kind}.gguf"
    module = "benchmarks.offload_parts.gguf_file"
    command = [sys.executable, "-m", module, str(model), str(file), rival.kind]
    subprocess.run(command, cwd=ROOT, check=True)
    return [str(file)]


def _gate(nodes: Mapping[str, Node], ours: Node, original: Path, work: Work) -> dict[str, float]:
    """Each rival's mean loss over ours, of the original; bfloat16 ones must be alike."""
    windows = work.texts
    truth = statistics.fmean(ours.ask(do="nats", store=str(original), windows=windows))
    more = {}
    for rival in RIVALS:
        if rival.key not in nodes:
            continue
        got = statistics.fmean(nodes[rival.key].ask(do="nats", windows=windows))
        more[rival.key] = got - truth
        if rival.is_exact and abs(got - truth) > NATS_TOLERANCE:
            raise GateIsRed(
                f"{rival.label}: {got:.4f} nats per token where our original has {truth:.4f}; "
                "it does not run the same weights"
            )
    return more
