"""The bandwidth governor on a link that is cut in mid-run: time per token and quality, with it and
without, token by token on the same text.

`python -m benchmarks.governor [TEXT ...]` runs mixtral-mini with a compensator for every pair and
a device cache of the size of its codes. The link is a source that sleeps. Both workers take turns,
one token each, so that a busy machine slows both. Writes results/governor.md and .csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.bounded_source import BoundedSource
from benchmarks.governor_page import PhaseRow, Step, reaction, row_of, table_of
from benchmarks.record import RESULTS, provenance, write_rows
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
STORE = CompressionConfig(recipe="milo", avg_rank=128)
FULL_BYTES_PER_S, CALL_S = 10e6, 0.0002
PHASES = (("full", 1.0), ("a half", 0.5), ("a tenth", 0.1), ("full again", 1.0))
PROMPT_TOKENS, ANSWER_TOKENS = 16, 48
WARM_UP_WINDOWS = 2
TARGET = 1.25
"""Of the step without a governor on the full link: what the governor is asked to keep."""
FULL = "full"
REPORT = RESULTS / "governor.md"


@dataclass(slots=True)
class Contestant:
    """A worker with a link of its own."""

    name: str
    source: BoundedSource
    opened: OpenModel
    steps: list[list[Step]] = field(default_factory=list)  # by phase

    @property
    def quality(self) -> str:
        governor = self.opened.governor
        return FULL if governor is None else governor.describe(governor.rung) or FULL


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
    # What fills the cache is slower: only the last window says what a step takes.
    target_s = TARGET * statistics.median(step.seconds for step in warm[-1])
    governed = contestant("governed", store, target_s)
    for window in windows[:WARM_UP_WINDOWS]:
        answer([governed], window, governing=False)
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
    rows = [
        row_of(name, w.name, w.steps[p], bytes_per_s=speed * FULL_BYTES_PER_S, target_s=target_s)
        for p, (name, speed) in enumerate(PHASES)
        for w in (plain, governed)
    ]
    write_rows(REPORT.with_suffix(".csv"), rows)
    note = "" if held_out or args.text else f"\n{BUILT_IN_NOTE}\n"
    REPORT.write_text(page(plain, governed, rows, target_s) + note)
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
        device="cpu",
        dtype="float32",
        restore="all",
        cache_bytes=codes_bytes,
        target_step_s=target_s,
    )
    return Contestant(name, source, open_model(store, source, None, config))


def answer(
    workers: Sequence[Contestant], window_1T: torch.Tensor, *, governing: bool = True
) -> list[list[Step]]:
    """The window's answer tokens, given one by one; the first worker has full quality."""
    steppers = [Stepper(worker.opened.runner, 1, window_1T.shape[1] - 1) for worker in workers]
    for stepper in steppers:
        stepper.forward(window_1T[:, :PROMPT_TOKENS], 0)
    steps: list[list[Step]] = [[] for _ in workers]
    for position in range(PROMPT_TOKENS, window_1T.shape[1] - 1):
        full_V = None
        for worker, stepper, mine in zip(workers, steppers, steps, strict=True):
            quality, started_s = worker.quality, time.perf_counter()
            logits_1TV, spent = stepper.forward(window_1T[:, position : position + 1], position)
            seconds = time.perf_counter() - started_s
            if governing and worker.opened.governor is not None:
                worker.opened.governor.decoded(seconds, spent, 1)
            log_probs_V = logits_1TV[0, -1].float().log_softmax(dim=0)
            full_V = log_probs_V if full_V is None else full_V
            next_id = int(window_1T[0, position + 1])
            mine.append(step_of(seconds, spent, log_probs_V, full_V, next_id, quality))
    return steps


def step_of(
    seconds: float,
    spent: StepCounters,
    log_probs_V: torch.Tensor,
    full_V: torch.Tensor,
    next_id: int,
    quality: str,
) -> Step:
    return Step(
        seconds,
        spent.total_moved_bytes,
        spent.moved_by_kind("factors"),
        nats=-float(log_probs_V[next_id]),
        kl=float((full_V.exp() * (full_V - log_probs_V)).sum()),
        quality=quality,
        predicted_s=spent.predicted_s,
        layer_s=spent.layer_s,
    )


def check(governed: Contestant) -> None:
    """The gate: at full quality the governed worker says what the other says, bit for bit."""
    first = governed.steps[0]
    lower = (index for index, step in enumerate(first) if step.quality != FULL)
    at_full = first[: next(lower, len(first))]
    assert at_full, "the governed worker never had full quality on the full link"
    wrong = [step.kl for step in at_full if step.kl != 0]
    assert not wrong, f"{len(wrong)} answers of full quality differ; no table on a red gate"


def page(plain: Contestant, governed: Contestant, rows: Sequence[PhaseRow], target_s: float) -> str:
    manifest = plain.source.manifest
    codes = sum(info.codes.num_bytes for info in manifest.experts.values())
    factors = sum(info.factors.num_bytes for info in manifest.experts.values() if info.factors)
    lines = [
        "# The bandwidth governor on a link that is cut in mid-run",
        "",
        provenance(),
        "",
        f"mixtral-mini, recipe {STORE.recipe} with mean rank {STORE.avg_rank}: "
        f"{codes / 1e6:.1f} MB of codes, {factors / 1e6:.1f} MB of factors, all pairs restored; a "
        "device cache of the size of the codes; batch 1; one thread. The link is a source that "
        f"sleeps, {1000 * CALL_S:.1f} ms a call besides its bytes. Tokens of the text are given, "
        f"so both workers answer the same: {len(plain.steps[0])} tokens a phase, the workers "
        f"taking turns. Target: {1000 * target_s:.1f} ms, {TARGET:g} of the step without a "
        "governor on the full link.",
        "",
        "KL is from the other worker's answer, which always has full quality. The phases are of "
        "different text: compare perplexities within a phase only. Predicted/real is the time of "
        "a step's MoE layers by the planner's costs over what they took, median.",
        "",
        table_of(rows),
        "",
        *(
            reaction(name, steps, target_s)
            for (name, _), steps in zip(PHASES, governed.steps, strict=True)
        ),
    ]
    return "\n".join(lines) + "\n"


def median_ms(steps: Sequence[Step]) -> float:
    return 1000 * statistics.median(step.seconds for step in steps)


if __name__ == "__main__":
    raise SystemExit(main())
