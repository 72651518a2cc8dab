"""Measures the steps of a real engine of this process: prompts of several lengths, several batches.

What a worker of the same config costs on this machine; no Ray, no tier on another host.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from cluster.tune.fit import Step
from gpu_worker.engine import Engine
from gpu_worker.sequence import SamplingParams, Sequence

ROUNDS = 3
ANSWER_TOKENS = 12
WARM_UP_STEPS = 8


def measure(
    engine: Engine,
    *,
    slots: int,
    prefill_chunk: int,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> list[Step]:
    """Steps of prompts and of decoding, batches of 1, 2, 4 ... sequences up to the slots.

    Prompts are drawn tokens. The first steps, which fill caches, do not count.
    """
    draw = random.Random(seed)
    chunk = min(prefill_chunk, max(engine.max_context - ANSWER_TOKENS - 1, 1))
    steps: list[Step] = []
    for part in range(ROUNDS):
        for batch in _batches(slots):
            for number in range(batch):
                share = (1.0, 0.5, 0.25, 0.125)[(number + part) % 4]
                length = max(1, int(share * chunk))
                name = f"{part}-{batch}-{number}"
                engine.add(Sequence(name, _prompt(engine, length, draw), _PARAMS))
            steps += _run(engine, clock)
    return steps[WARM_UP_STEPS:]


_PARAMS = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)


def _batches(slots: int) -> Iterator[int]:
    batch = 1
    while batch < slots:
        yield batch
        batch *= 2
    yield slots


def _prompt(engine: Engine, length: int, draw: random.Random) -> tuple[int, ...]:
    # Low ids exist in every vocabulary; what they mean does not change what a step costs.
    most = 128 if engine.tokenizer is None else min(len(engine.tokenizer), 4096)
    return tuple(draw.randrange(most) for _ in range(length))


def _run(engine: Engine, clock: Callable[[], float]) -> list[Step]:
    """Step until all is done. What a step computed shows in the prompt tokens that are left."""
    steps = []
    while engine.has_work:
        before = engine.scheduler.num_waiting_tokens
        start_s = clock()
        output = engine.step()
        seconds = clock() - start_s
        prompt = before - engine.scheduler.num_waiting_tokens
        steps.append(Step(prompt, 0 if prompt else output.num_tokens, seconds))
    return steps
