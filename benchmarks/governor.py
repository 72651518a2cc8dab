"""The bandwidth governor on a link that is cut in mid-run: time per token and quality, with it and
without, token by token on the same text.

`python -m benchmarks.governor [TEXT ...]` runs mixtral-mini with a rich compensator for each
expert and a device cache of the size of its codes. The link is a source that sleeps. Both workers
take turns, one token each, so that a busy machine slows both. Writes results/governor.md and .csv.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.bounded_source import BoundedSource
from benchmarks.record import RESULTS, provenance, table, write_rows
from cluster.stores import compressed_store
from cluster.texts import BUILT_IN_NOTE, read_texts
from expert_store.config import CompressionConfig
from expert_store.segment import Segment
from gpu_worker.build import OpenModel, load_tokenizer, open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.scoring import Stepper
from models import MIXTRAL_MINI

HELD_OUT = Path(__file__).resolve().parents[2] / "shared" / "mini" / "eval"
STORE = CompressionConfig(recipe="paper", avg_rank=256)
FULL_BYTES_PER_S, CALL_S = 10e6, 0.0002
PHASES = (("full", 1.0), ("a half", 0.5), ("a tenth", 0.1), ("full again", 1.0))
PROMPT_TOKENS, ANSWER_TOKENS = 16, 64
WARM_UP_WINDOWS = 2
TARGET = 1.25
"""Of the step without a governor on the full link: what the governor is asked to keep."""
REPORT = RESULTS / "governor.md"


@dataclass(frozen=True, slots=True)
class Step:
    """One answer token of one worker."""

    seconds: float
    moved_bytes: int
    factor_bytes: int
    nats: float  # of the token that came
    kl: float  # nats, from the answer of full quality
    rung: int


@dataclass(slots=True)
class Contestant:
    """A worker with a link of its own."""

    name: str
    source: BoundedSource
    opened: OpenModel
    steps: list[list[Step]] = field(default_factory=list)  # by phase

    @property
    def rung(self) -> int:
        return 0 if self.opened.governor is None else self.opened.governor.rung

    def quality(self, rung: int) -> str:
        told = None if self.opened.governor is None else self.opened.governor.describe(rung)
        return told or "full"


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One worker in one phase, for the CSV."""

    phase: str
    link_mb_per_s: float
    worker: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    steps_in_target_percent: float
    kb_per_token: float
    factor_kb_per_token: float
    link_used_percent: float
    perplexity: float
    kl_to_full: float
    qualities: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="*", type=Path, help="text files or folders of *.txt")
    parser.add_argument("--windows", type=int, default=2, help="of text in each phase")
    args = parser.parse_args(argv)
    held_out = not args.text and HELD_OUT.is_dir()
    texts = [text.text for text in read_texts([HELD_OUT] if held_out else args.text)]
    torch.set_num_threads(1)
    store = compressed_store(MIXTRAL_MINI, STORE)
    windows = cut(store, texts, WARM_UP_WINDOWS + args.windows * len(PHASES))
    plain = contestant("without", store, None)
    warm = [answer([plain], window)[0] for window in windows[:WARM_UP_WINDOWS]]
    target_s = TARGET * statistics.median(step.seconds for step in warm[-1])
    governed = contestant("governed", store, target_s)
    for window in windows[:WARM_UP_WINDOWS]:
        answer([governed], window)
    left = iter(windows[WARM_UP_WINDOWS:])
    for name, speed in PHASES:
        for worker in (plain, governed):
            worker.source.bytes_per_s = speed * FULL_BYTES_PER_S
            worker.steps.append([])
        for _ in range(args.windows):
            for worker, steps in zip(
                (plain, governed), answer([plain, governed], next(left)), strict=True
            ):
                worker.steps[-1] += steps
        print(f"{name}: {', '.join(f'{median_ms(w.steps[-1]):.1f} ms' for w in (plain, governed))}")
    check(governed)
    rows = [row_of(worker, p, target_s) for p in range(len(PHASES)) for worker in (plain, governed)]
    write_rows(REPORT.with_suffix(".csv"), rows)
    note = "" if held_out or args.text else f"\n{BUILT_IN_NOTE}\n"
    REPORT.write_text(page(rows, plain, governed, target_s) + note)
    print(f"wrote {REPORT}")
    for worker in (plain, governed):
        worker.opened.close()
    return 0


def cut(store: Path, texts: Sequence[str], count: int) -> list[torch.Tensor]:
    """[1, PROMPT + ANSWER + 1] windows, from each text in turn."""
    tokenizer = load_tokenizer(store)
    assert tokenizer is not None, f"{store} has no tokenizer"
    width = PROMPT_TOKENS + ANSWER_TOKENS + 1
    ids = [tokenizer(text)["input_ids"] for text in texts]
    windows = []
    for index in range(count):
        source, turn = ids[index % len(ids)], index // len(ids)
        part = source[turn * width : (turn + 1) * width]
        if len(part) < width:
            raise ValueError(f"text {index % len(ids)}: too short for {turn + 1} windows")
        windows.append(torch.tensor([part]))
    return windows


def contestant(name: str, store: Path, target_s: float | None) -> Contestant:
    segment = Segment(store)
    codes_bytes = sum(info.codes.num_bytes for info in segment.manifest.experts.values())
    source = BoundedSource(segment, bytes_per_s=FULL_BYTES_PER_S, call_s=CALL_S)
    config = WorkerConfig(
        device="cpu", dtype="float32", cache_bytes=codes_bytes, target_step_s=target_s
    )
    return Contestant(name, source, open_model(store, source, None, config))


def answer(workers: Sequence[Contestant], window_1T: torch.Tensor) -> list[list[Step]]:
    """The window's answer tokens, given one by one; the first worker has full quality."""
    steppers = [Stepper(worker.opened.runner, 1, window_1T.shape[1] - 1) for worker in workers]
    for stepper in steppers:
        stepper.forward(window_1T[:, :PROMPT_TOKENS], 0)
    steps: list[list[Step]] = [[] for _ in workers]
    for position in range(PROMPT_TOKENS, window_1T.shape[1] - 1):
        full_V = None
        for worker, stepper, mine in zip(workers, steppers, steps, strict=True):
            rung, started_s = worker.rung, time.perf_counter()
            logits_1TV, spent = stepper.forward(window_1T[:, position : position + 1], position)
            seconds = time.perf_counter() - started_s
            if worker.opened.governor is not None:
                worker.opened.governor.decoded(seconds, spent, 1)
            log_probs_V = logits_1TV[0, -1].float().log_softmax(dim=0)
            full_V = log_probs_V if full_V is None else full_V
            next_id = int(window_1T[0, position + 1])
            mine.append(step_of(seconds, spent, log_probs_V, full_V, next_id, rung))
    return steps


def step_of(
    seconds: float,
    spent: StepCounters,
    log_probs_V: torch.Tensor,
    full_V: torch.Tensor,
    next_id: int,
    rung: int,
) -> Step:
    return Step(
        seconds,
        spent.total_moved_bytes,
        spent.moved_by_kind("factors"),
        nats=-float(log_probs_V[next_id]),
        kl=float((full_V.exp() * (full_V - log_probs_V)).sum()),
        rung=rung,
    )


def check(governed: Contestant) -> None:
    """The gate: at full quality the governed worker says what the other says, bit for bit."""
    first = governed.steps[0]
    at_full = first[: next((i for i, step in enumerate(first) if step.rung), len(first))]
    assert at_full, "the governed worker never had full quality on the full link"
    wrong = [step.kl for step in at_full if step.kl != 0]
    assert not wrong, f"{len(wrong)} answers of full quality differ; no table on a red gate"


def row_of(worker: Contestant, phase: int, target_s: float) -> PhaseRow:
    (name, speed), steps = PHASES[phase], worker.steps[phase]
    times = [1000 * step.seconds for step in steps]
    p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    moved = sum(step.moved_bytes for step in steps)
    rungs = sorted({step.rung for step in steps})
    return PhaseRow(
        phase=name,
        link_mb_per_s=speed * FULL_BYTES_PER_S / 1e6,
        worker=worker.name,
        ms_p20=p20,
        ms_p50=p50,
        ms_p80=p80,
        steps_in_target_percent=100 * sum(s.seconds <= target_s for s in steps) / len(steps),
        kb_per_token=moved / len(steps) / 1000,
        factor_kb_per_token=sum(step.factor_bytes for step in steps) / len(steps) / 1000,
        link_used_percent=100
        * moved
        / (speed * FULL_BYTES_PER_S * sum(step.seconds for step in steps)),
        perplexity=math.exp(statistics.fmean(step.nats for step in steps)),
        kl_to_full=statistics.fmean(step.kl for step in steps),
        qualities=" / ".join(worker.quality(rung) for rung in rungs),
    )


def page(rows: Sequence[PhaseRow], plain: Contestant, governed: Contestant, target_s: float) -> str:
    manifest = plain.source.manifest
    kinds = {
        "codes": sum(info.codes.num_bytes for info in manifest.experts.values()),
        "factors": sum(i.factors.num_bytes for i in manifest.experts.values() if i.factors),
    }
    head = ["link", "MB/s", "worker", "ms/token p20", "p50", "p80", "in target %", "KB/token"]
    head += ["of factors", "link used %", "perplexity", "KL to full", "settings"]
    cells = [
        [
            row.phase,
            f"{row.link_mb_per_s:.0f}",
            row.worker,
            *(f"{value:.1f}" for value in (row.ms_p20, row.ms_p50, row.ms_p80)),
            f"{row.steps_in_target_percent:.0f}",
            f"{row.kb_per_token:.0f}",
            f"{row.factor_kb_per_token:.0f}",
            f"{row.link_used_percent:.0f}",
            f"{row.perplexity:.2f}",
            f"{row.kl_to_full:.4f}",
            row.qualities,
        ]
        for row in rows
    ]
    lines = [
        "# The bandwidth governor on a link that is cut in mid-run",
        "",
        provenance(),
        "",
        f"mixtral-mini, recipe paper with mean rank {STORE.avg_rank}: "
        f"{kinds['codes'] / 1e6:.1f} MB of codes, {kinds['factors'] / 1e6:.1f} MB of factors, "
        f"Top-{manifest.recipe.top_n}; a "
        "cache of the size of the codes; batch 1; one thread. The link is a source that sleeps, "
        f"{1000 * CALL_S:.1f} ms a call besides its bytes. Tokens of the text are given, so both "
        f"workers answer the same; {len(plain.steps[0])} answer tokens a phase, the workers taking "
        f"turns. Target: {1000 * target_s:.1f} ms, {TARGET:g} of the step without a governor on "
        "the full link.",
        "",
        "KL is from the other worker's answer, which always has full quality. The phases are of "
        "different text: compare perplexities within a phase only.",
        "",
        table(head, cells),
        "",
        *(reaction(governed, phase, target_s) for phase in range(1, len(PHASES))),
    ]
    return "\n".join(lines) + "\n"


def reaction(governed: Contestant, phase: int, target_s: float) -> str:
    """How long the governor took to where it stayed."""
    steps = governed.steps[phase]
    last = steps[-1].rung
    settled = next(i for i in range(len(steps)) if all(s.rung == last for s in steps[i:]))
    late = sum(step.seconds > target_s for step in steps[:settled])
    return (
        f"- {PHASES[phase][0]}: after {settled} tokens at {governed.quality(last)}, where it "
        f"stayed; {late} of them took longer than the target."
    )


def median_ms(steps: Sequence[Step]) -> float:
    return 1000 * statistics.median(step.seconds for step in steps)


if __name__ == "__main__":
    raise SystemExit(main())
