"""Step 4: the engine on a real store, on the device, against the same store on the CPU in float32.

Greedy tokens, logits of the same tokens through prefill and decode, bytes planned and delivered,
tokens per second at batch 1 and 8 without and with a full expert cache. Near data is off.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.clock import synchronize
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.store import whole_store
from expert_store.segment import Segment
from gpu_worker.build import build_engine, open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.model import ModelRunner
from gpu_worker.sequence import SamplingParams, Sequence
from gpu_worker.slot_cache import AttentionMasks, SlotCache

PROMPTS = (
    "Once upon a time there was",
    "The little dog ran to the",
    "In the morning the sun",
    "She said that she wanted to",
)
DTYPES = ("float32", "bfloat16")
DECODE_POSITIONS = 8
"""Of each sequence, computed token by token; the ones before go through prefill."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Median relative logit error over positions, and the share of positions whose best token
    may differ from the CPU's in float32.

    On this store a CPU's bfloat16 against its float32 gives an error of 0.0055 and 2 % of
    positions; leaving out the compensators gives 0.055 and 8 %.
    """

    error: float
    differing: float


LIMITS = {"float32": Limits(1e-3, 0.01), "bfloat16": Limits(0.02, 0.06)}


def run(setting: Setting, recorder: Recorder) -> None:
    setting = replace(setting, store=whole_store(setting.store))
    num_tokens = 6 if setting.tiny else 32
    cpu = WorkerConfig(device="cpu", dtype="float32", max_sequences=8)
    prompts = _prompts(setting)
    expected = generate(setting, cpu, prompts, num_tokens)
    ids_BT = torch.tensor([(*p, *t) for p, t in zip(prompts, expected.tokens, strict=True)])
    expected_BTV = logits_of(setting, cpu, ids_BT)
    for dtype in DTYPES[:1] if setting.tiny else DTYPES:
        config = WorkerConfig(device=setting.device, dtype=dtype, max_sequences=8)
        with recorder.section(f"system {dtype}"):
            got = generate(setting, config, prompts, num_tokens)
            _compare_tokens(recorder, dtype, got.tokens, expected.tokens)
            _compare_logits(recorder, dtype, logits_of(setting, config, ids_BT), expected_BTV)
            _speeds(setting, recorder, dtype, prompts)


@dataclass(frozen=True, slots=True)
class Generated:
    """What the engine gave: tokens by prompt; seconds and counters of the steps of decode alone."""

    tokens: list[tuple[int, ...]]
    seconds: list[float]
    counters: StepCounters
    num_decoded: int


def generate(
    setting: Setting, config: WorkerConfig, prompts: list[tuple[int, ...]], num_tokens: int
) -> Generated:
    """Greedy answers of exactly `num_tokens` to all prompts side by side."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    with closing(Segment(setting.store)) as source:
        with closing(build_engine(setting.store, source, None, config)) as engine:
            sequences = [Sequence(str(i), prompt, params) for i, prompt in enumerate(prompts)]
            for sequence in sequences:
                engine.add(sequence)
            seconds, counters, num_decoded = [], StepCounters(), 0
            while engine.has_work:
                is_decode = all(s.output_ids for s in sequences)
                synchronize(config.device)
                start_s = time.perf_counter()
                output = engine.step()
                synchronize(config.device)
                if is_decode:
                    seconds.append(time.perf_counter() - start_s)
                    counters += output.counters
                    num_decoded += output.num_tokens
            engine.check_integrity()
        tokens = [tuple(sequence.output_ids) for sequence in sequences]
    return Generated(tokens, seconds, counters, num_decoded)


def logits_of(setting: Setting, config: WorkerConfig, ids_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, V] float32 on the host: all but the last positions in one pass, those one by one."""
    with closing(Segment(setting.store)) as source:
        opened = open_model(setting.store, source, None, config)
        try:
            runner = opened.runner
            masks = AttentionMasks(runner.model.config)
            cache = SlotCache(*ids_BT.shape)
            split = ids_BT.shape[1] - DECODE_POSITIONS
            edges = [0, *range(max(split, 1), ids_BT.shape[1] + 1)]
            parts = [
                _forward(runner, masks, cache, ids_BT[:, start:end], start)
                for start, end in zip(edges, edges[1:], strict=False)
            ]
        finally:
            opened.close()
    return torch.cat(parts, dim=1)


def _forward(
    runner: ModelRunner, masks: AttentionMasks, cache: SlotCache, ids_BT: torch.Tensor, start: int
) -> torch.Tensor:
    device = runner.model.device
    num_sequences, num_tokens = ids_BT.shape
    positions_T = torch.arange(start, start + num_tokens, device=device)
    positions_BT = positions_T.expand(num_sequences, -1)
    cache.begin(list(range(num_sequences)), positions_BT)
    mask = masks.make(positions_BT, runner.model.dtype)
    return runner.forward(ids_BT.to(device), positions_BT, cache, mask).logits.float().cpu()


def _compare_tokens(
    recorder: Recorder, dtype: str, got: list[tuple[int, ...]], expected: list[tuple[int, ...]]
) -> None:
    """Where greedy answers part. Not a gate: a near tie parts them for good; the logits gate."""
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        pairs = list(zip(mine, theirs, strict=True))
        first = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        same = sum(a == b for a, b in pairs)
        where = "never" if first is None else f"at token {first}"
        recorder.note(
            f"{dtype}, prompt {number}: {same} of {len(pairs)} greedy tokens as on the CPU in "
            f"float32, parting {where}"
        )


def _compare_logits(
    recorder: Recorder, dtype: str, got_BTV: torch.Tensor, expected_BTV: torch.Tensor
) -> None:
    difference = (got_BTV - expected_BTV).norm(dim=-1)
    spread = (expected_BTV - expected_BTV.mean(dim=-1, keepdim=True)).norm(dim=-1)
    error_BT = difference / spread
    differing = (got_BTV.argmax(-1) != expected_BTV.argmax(-1)).float()
    group, limits = f"system {dtype}", LIMITS[dtype]
    for name, part in (("prefill", slice(0, -DECODE_POSITIONS)), ("decode", slice(-8, None))):
        median = float(error_BT[:, part].median())
        recorder.compare(group, f"median relative logit error, {name}", median, limits.error)
    recorder.note(f"{dtype}: largest relative logit error {float(error_BT.max()):.2e}")
    share = float(differing.mean())
    name = "share of positions with another best token"
    recorder.check(group, name, share <= limits.differing, error=share, limit=limits.differing)


def _speeds(
    setting: Setting, recorder: Recorder, dtype: str, prompts: list[tuple[int, ...]]
) -> None:
    gates, num_tokens = (f"system {dtype}",), 4 if setting.tiny else 40
    for batch in (1, 2) if setting.tiny else (1, 8):
        for cache_bytes, cache in ((0, "no cache"), (1 << 30, "full cache")):
            config = WorkerConfig(
                device=setting.device, dtype=dtype, max_sequences=batch, cache_bytes=cache_bytes
            )
            asked = [prompts[i % len(prompts)] for i in range(batch)]
            done = generate(setting, config, asked, num_tokens)
            counters, shape = done.counters, f"{setting.store.name}, {dtype}, {cache}"
            # Fetched by a guess of what the next layer needs, and not needed.
            in_vain = counters.ahead_bytes - counters.ahead_used_bytes
            planned = sum(counters.planned_bytes.values()) + in_vain
            recorder.check(
                gates[0],
                f"batch {batch}, {cache}: bytes planned and guessed == delivered, no pair degraded",
                planned == counters.total_moved_bytes and counters.degraded_pairs == 0,
                detail=f"planned and guessed {planned}, delivered {counters.total_moved_bytes}, "
                f"degraded {counters.degraded_pairs}",
            )
            warm = done.seconds[len(done.seconds) // 4 :]
            recorder.row(
                "engine step", warm, shape=shape, tokens=batch, gates=gates,
                rate_of_s=batch, rate_unit="tokens/s",
            )  # fmt: skip
            recorder.value(
                "expert bytes moved per token", counters.total_moved_bytes / done.num_decoded,
                "bytes", shape=shape, tokens=batch, gates=gates,
            )  # fmt: skip


def _prompts(setting: Setting) -> list[tuple[int, ...]]:
    """Token ids of the prompts, all of one length; seeded ids for a store without a tokenizer."""
    with closing(Segment(setting.store)) as source:
        vocab_size = source.manifest.model.vocab_size
        opened = open_model(setting.store, source, None, WorkerConfig(device="cpu"))
        opened.close()
    if opened.tokenizer is not None:
        encoded = [opened.tokenizer.encode(text) for text in PROMPTS]
        length = min(len(ids) for ids in encoded)
        return [tuple(ids[:length]) for ids in encoded]
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, vocab_size, (len(PROMPTS), 5), generator=generator)
    return [tuple(row) for row in ids_BT.tolist()]
