"""Runs requests on one model, step by step: schedule, forward, sample, update.

Owns the scheduler, the slots of keys and values, and each request's text. One thread calls it; it
knows no HTTP, no actor, and where expert bytes come from only through the model runner.

Legend: B sequences of a step, T tokens of each, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from gpu_worker.counters import StepCounters
from gpu_worker.experts import ExpertsFailed
from gpu_worker.governor import Governor
from gpu_worker.model import ForwardOutput, ModelRunner
from gpu_worker.sampler import Sampled, sample
from gpu_worker.scheduler import Scheduler
from gpu_worker.sequence import Batch, FinishReason, Sequence
from gpu_worker.slot_cache import AttentionMasks, SlotCache
from gpu_worker.text import TextStream


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What a step gave one request: a token, some text (maybe none yet), maybe the end.

    The last event of a request, and only that, has a `finish_reason`; with "error" comes the cause.
    """

    request_id: str
    token_id: int | None
    text: str
    num_output_tokens: int
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    degraded: bool = False  # some token so far was answered with less than the store promises
    quality: str | None = None  # the lowest setting of the governor so far, if not full quality


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Everything that leaves a step."""

    events: tuple[TokenEvent, ...]
    counters: StepCounters
    num_tokens: int = 0  # token positions computed
    governed_tokens: int = 0  # of them with less than full quality, to keep the latency target


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """A step's forward: the batch that came through, its output, and the sequences that did not."""

    batch: Batch | None
    output: ForwardOutput | None
    failed: dict[Sequence, Exception]
    wasted: StepCounters  # what the attempts that failed had moved


class Engine:
    """Continuous batching over one model runner. Not thread-safe.

    Raises ValueError for attention that the slots cannot serve and for sizes that are not positive.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_sequences: int,
        max_context: int,
        prefill_chunk: int,
        max_waiting: int,
        on_close: Callable[[], None] | None = None,
        governor: Governor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(
            num_slots=max_sequences, max_waiting=max_waiting, prefill_chunk=prefill_chunk
        )
        self._masks = AttentionMasks(runner.model.config)
        self._cache = SlotCache(max_sequences, max_context)
        self._texts: dict[str, TextStream] = {}
        self._end_ids = end_token_ids(runner)
        self._vocab_size = int(runner.model.config.vocab_size)
        self._on_close = on_close
        self._governor = governor
        self._clock = clock
        self.max_context = max_context

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def scheduler(self) -> Scheduler:
        """For reading its counts."""
        return self._scheduler

    @property
    def governor(self) -> Governor | None:
        """For reading where it is; None where no latency target is set."""
        return self._governor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self._tokenizer

    def add(self, sequence: Sequence) -> None:
        """Queue a request. ValueError when it can never run, QueueFullError when too many wait."""
        self._check(sequence)
        self._scheduler.add(sequence)
        self._texts[sequence.request_id] = TextStream(
            self._tokenizer, sequence.prompt_ids, sequence.params.stop
        )

    def cancel(self, request_id: str) -> TokenEvent | None:
        """End a request now and free its slot: its last event; None if no such one is live."""
        sequence = self._scheduler.find(request_id)
        return None if sequence is None else self._finish(sequence, "cancelled")

    def step(self) -> StepOutput:
        """Compute a chunk of one prompt, or one token of every running sequence."""
        started_s = self._clock()
        batch = self._scheduler.schedule()
        forwarded = self._forward(batch)
        sampled = self._sample(forwarded)
        output = self._update(forwarded, sampled)
        self._govern(forwarded, self._clock() - started_s)
        return output

    def check_integrity(self) -> None:
        """Assert that slots and requests add up."""
        self._scheduler.check_integrity()
        live = sum(self._scheduler.find(request_id) is not None for request_id in self._texts)
        total = self._scheduler.num_waiting + self._scheduler.num_running
        assert live == len(self._texts) == total, (
            f"texts {len(self._texts)}, of them live {live}, != waiting + running {total}"
        )

    def close(self) -> None:
        """Cancel what is live and release what was opened for this engine."""
        for request_id in list(self._texts):
            self.cancel(request_id)
        if self._on_close is not None:
            self._on_close()

    def _check(self, sequence: Sequence) -> None:
        num_prompt, params = len(sequence.prompt_ids), sequence.params
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if num_prompt + wanted > self.max_context:
            raise ValueError(
                f"prompt: {num_prompt} tokens and max_tokens {wanted} are together more than the "
                f"context of {self.max_context} tokens; shorten the prompt or ask for fewer tokens"
            )
        for field, ids in (
            ("prompt", sequence.prompt_ids),
            ("stop_token_ids", params.stop_token_ids),
        ):
            outside = [i for i in ids if not 0 <= i < self._vocab_size]
            if outside:
                raise ValueError(
                    f"{field}: token id {outside[0]} is outside the vocabulary of "
                    f"{self._vocab_size}"
                )
        if params.stop and self._tokenizer is None:
            raise ValueError("stop: this engine has no tokenizer; use stop_token_ids")

    def _forward(self, batch: Batch | None) -> _Forwarded:
        """Run the batch; again without those that lost an expert, until it comes through."""
        failed: dict[Sequence, Exception] = {}
        wasted = StepCounters()
        while batch is not None:
            try:
                return _Forwarded(batch, self._run(batch), failed, wasted)
            except ExpertsFailed as error:
                hit = _sequences_hit(batch, error)
                failed.update(dict.fromkeys(hit, error))
                wasted += error.counters
                batch = batch.without(hit)
        return _Forwarded(None, None, failed, wasted)

    def _run(self, batch: Batch) -> ForwardOutput:
        device, dtype = self._runner.model.device, self._runner.model.dtype
        spans = [(s.num_computed, s.num_computed + batch.num_tokens) for s in batch.sequences]
        ids = [s.tokens(*span) for s, span in zip(batch.sequences, spans, strict=True)]
        positions_BT = torch.tensor([list(range(*span)) for span in spans], device=device)
        slots = [s.slot for s in batch.sequences if s.slot is not None]
        self._cache.begin(slots, positions_BT)
        return self._runner.forward(
            torch.tensor(ids, device=device),
            positions_BT,
            self._cache,
            self._masks.make(positions_BT, dtype),
            logits_to_keep=1,
        )

    def _sample(self, forwarded: _Forwarded) -> list[Sampled]:
        batch, output = forwarded.batch, forwarded.output
        if batch is None or output is None or not batch.samples:
            return []
        return sample(output.logits[:, -1], batch.sequences)

    def _update(self, forwarded: _Forwarded, sampled: list[Sampled]) -> StepOutput:
        """Move every sequence of the step on, and end those that are done."""
        events = [self._finish(s, "error", error=e) for s, e in forwarded.failed.items()]
        batch, output = forwarded.batch, forwarded.output
        if batch is None or output is None:
            return StepOutput(tuple(events), forwarded.wasted)
        self._scheduler.computed(batch)
        rung = 0 if self._governor is None else self._governor.rung
        for sequence, pairs in zip(batch.sequences, output.degraded_pairs, strict=True):
            sequence.degraded = sequence.degraded or pairs > 0
            sequence.lowest_rung = max(sequence.lowest_rung, rung)
        if sampled:
            pairs_of = zip(batch.sequences, sampled, strict=True)
            events += [self._advance(sequence, got) for sequence, got in pairs_of]
        num_tokens = batch.num_tokens * len(batch.sequences)
        counters = forwarded.wasted + output.counters
        return StepOutput(tuple(events), counters, num_tokens, num_tokens if rung else 0)

    def _govern(self, forwarded: _Forwarded, step_s: float) -> None:
        """Tell the governor of a decode step; steps of prompts take what they take."""
        batch, output = forwarded.batch, forwarded.output
        if self._governor is None or batch is None or output is None or batch.num_tokens > 1:
            return
        self._governor.decoded(step_s, output.counters, len(batch.sequences))

    def _advance(self, sequence: Sequence, sampled: Sampled) -> TokenEvent:
        """Give one sequence its token."""
        token_id = sampled.token_id
        if token_id is None:
            return self._finish(sequence, "error", error=sampled.error)
        sequence.output_ids.append(token_id)
        params, text = sequence.params, self._texts[sequence.request_id]
        if not params.ignore_eos and token_id in (*self._end_ids, *params.stop_token_ids):
            return self._finish(sequence, "stop", token_id=token_id)
        piece = text.push(token_id)
        if text.stopped:
            return self._finish(sequence, "stop", token_id=token_id, text=piece)
        limit = params.max_tokens or self.max_context - len(sequence.prompt_ids)
        if len(sequence.output_ids) >= limit:
            return self._finish(sequence, "length", token_id=token_id, text=piece)
        return self._event(sequence, token_id, piece)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token_id: int | None = None,
        text: str = "",
        error: Exception | None = None,
    ) -> TokenEvent:
        """End a sequence: free its slot, let out the text that was withheld."""
        text += self._texts.pop(sequence.request_id).finish()
        slot = self._scheduler.finish(sequence, reason, error)
        if slot is not None:
            self._cache.release(slot)
        return self._event(sequence, token_id, text)

    def _event(self, sequence: Sequence, token_id: int | None, text: str) -> TokenEvent:
        rung = sequence.lowest_rung
        return TokenEvent(
            sequence.request_id,
            token_id,
            text,
            len(sequence.output_ids),
            sequence.finish_reason,
            sequence.error,
            sequence.degraded,
            None if self._governor is None else self._governor.describe(rung),
        )


def _sequences_hit(batch: Batch, error: ExpertsFailed) -> set[Sequence]:
    """Those of the batch that need an expert that failed; rows are sequence by sequence."""
    hit = {batch.sequences[row // batch.num_tokens] for row in error.token_rows}
    assert hit, f"experts failed for no token: {error}"
    return hit


def end_token_ids(runner: ModelRunner) -> tuple[int, ...]:
    """The token ids that end an answer, as the model's generation config (else its config) says."""
    generation = getattr(runner.model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = runner.model.config.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)
