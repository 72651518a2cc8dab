"""One repetition of one engine: prompts in, the text's own tokens decoded after them, clocks read.

Every contestant walks the same text: the token an engine chose is replaced by the one that the
text has there, so that no contestant routes more kindly because it repeats itself.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass

from gpu_worker.counters import StepCounters
from gpu_worker.engine import Engine, StepOutput
from gpu_worker.sequence import SamplingParams, Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """What a repetition does.

    - prefill: one long prompt, for tokens/s of prefill.
    - texts: one text per sequence of the large batch; the first prompt_tokens of each are its
      prompt, what follows is decoded. The first text is also decoded alone, before.
    - warm_up, steps: decoding steps of the lone sequence that are not, and are, counted; warm_up
      and batch_steps of the large batch.
    """

    prefill: list[int]
    texts: list[list[int]]
    prompt_tokens: int
    warm_up: int
    steps: int
    batch_steps: int


@dataclass(frozen=True, slots=True)
class Phase:
    """What some steps took and moved, all told; bytes are the transport's own counts."""

    seconds: float
    tokens: int
    wait_s: float
    codes_bytes: int
    factors_bytes: int
    activation_bytes: int
    wire_bytes: int  # messages that came to the GPU node: records and near-data answers
    planned_bytes: int
    vain_bytes: int  # fetched ahead by a guess, and not needed
    near_data_pairs: int
    restored_pairs: int
    degraded_pairs: int


class Turn:
    """Runs work on an engine that has none."""

    def __init__(self, engine: Engine) -> None:
        assert not engine.has_work, "a turn starts with an idle engine"
        self._engine = engine
        self._ids = (f"request {number}" for number in itertools.count())

    def run(self, work: Work) -> dict[str, object]:
        """The phases by name, as plain values."""
        prefill = self._prefill(work.prefill)
        first, *_ = work.texts
        started = time.perf_counter()
        lone = self._start([first], work)
        first_token_s = time.perf_counter() - started
        one = self._decode(lone, work.warm_up, work.steps)
        self._cancel(lone)
        many = self._start(work.texts, work)
        eight = self._decode(many, work.warm_up, work.batch_steps)
        self._cancel(many)
        return {
            "prefill": asdict(prefill),
            "one": asdict(one),
            "many": asdict(eight),
            "first_token_s": first_token_s,
        }

    def greedy(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """The likeliest continuation of each prompt."""
        sequences = [self._sequence(prompt, num_tokens) for prompt in prompts]
        for sequence in sequences:
            self._engine.add(sequence)
        while self._engine.has_work:
            _check(self._engine.step())
        return [list(sequence.output_ids) for sequence in sequences]

    def _sequence(self, prompt: list[int], max_tokens: int) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return Sequence(next(self._ids), tuple(prompt), params)

    def _prefill(self, prompt: list[int]) -> Phase:
        sequence = self._sequence(prompt, 1)
        started = time.perf_counter()
        self._engine.add(sequence)
        counters = StepCounters()
        while self._engine.has_work:
            counters += _check(self._engine.step()).counters
        return _phase(time.perf_counter() - started, len(prompt), counters)

    def _start(self, texts: list[list[int]], work: Work) -> dict[Sequence, list[int]]:
        """Sequences that have their first token, and what each is to decode.

        A prompt comes when those before it are running, as one more user's would.
        """
        running: dict[Sequence, list[int]] = {}
        for text in texts:
            sequence = self._sequence(text[: work.prompt_tokens], len(text))
            self._engine.add(sequence)
            while not sequence.output_ids:
                _check(self._engine.step())
                self._follow(running)
            running[sequence] = text[work.prompt_tokens :]
            self._follow(running)
        return running

    def _decode(self, running: dict[Sequence, list[int]], warm_up: int, steps: int) -> Phase:
        for _ in range(warm_up):
            _check(self._engine.step())
            self._follow(running)
        counters = StepCounters()
        num_tokens = 0
        started = time.perf_counter()
        for _ in range(steps):
            output = _check(self._engine.step())
            self._follow(running)
            counters += output.counters
            num_tokens += output.num_tokens
        seconds = time.perf_counter() - started
        assert num_tokens == steps * len(running), f"{num_tokens} tokens in {steps} steps"
        return _phase(seconds, num_tokens, counters)

    def _follow(self, running: dict[Sequence, list[int]]) -> None:
        """Put the text's tokens in place of those that were chosen."""
        for sequence, text in running.items():
            last = len(sequence.output_ids) - 1
            sequence.output_ids[last] = text[last]

    def _cancel(self, running: dict[Sequence, list[int]]) -> None:
        for sequence in running:
            self._engine.cancel(sequence.request_id)


def _check(output: StepOutput) -> StepOutput:
    """The output, of a step in which nothing failed and all planned bytes came."""
    errors = [event.error for event in output.events if event.error is not None]
    assert not errors, errors[0]
    counters = output.counters
    planned = sum(counters.planned_bytes.values())
    in_vain = counters.ahead_bytes - counters.ahead_used_bytes
    assert counters.total_moved_bytes == planned + in_vain, (
        f"planned {planned} bytes, fetched {in_vain} in vain, moved {counters.total_moved_bytes}; "
        "no row on a red gate"
    )
    assert not counters.degraded_pairs, f"{counters.degraded_pairs} pairs degraded"
    return output


def _phase(seconds: float, tokens: int, counters: StepCounters) -> Phase:
    return Phase(
        seconds=seconds,
        tokens=tokens,
        wait_s=counters.wait_s,
        codes_bytes=counters.moved_by_kind("codes"),
        factors_bytes=counters.moved_by_kind("factors"),
        activation_bytes=counters.sent_bytes + counters.received_bytes,
        wire_bytes=counters.wire_bytes + counters.received_bytes,
        planned_bytes=sum(counters.planned_bytes.values()),
        vain_bytes=counters.ahead_bytes - counters.ahead_used_bytes,
        near_data_pairs=counters.near_data_pairs,
        restored_pairs=counters.restored_pairs,
        degraded_pairs=counters.degraded_pairs,
    )
