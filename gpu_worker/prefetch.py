"""Fetches what the next layer will probably need, once this layer's own copies are here.

Owns the records on their way by guess, apart from those that a plan asked for. Knows no weight and
no result: a wrong guess costs bytes, which are counted.

Legend: S token rows, K top-k.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.counters import Tally
from gpu_worker.record_sizes import PlannedCopy, by_expert
from gpu_worker.router_guess import Guess
from gpu_worker.stream import Landed, Stream
from gpu_worker.streamer import Streamer


class AheadRecords:
    """What was fetched ahead for the layer at hand: here, or still on its way.

    Of what no thread has begun to fetch only that of the experts `wanted` is still fetched.
    `take` gives what is here, `next` waits for one more; each record is given back with `release`.
    `close` gives back the rest, and counts what nobody used.
    """

    def __init__(
        self,
        stream: Stream | None,
        tally: Tally,
        wanted: frozenset[ExpertKey] = frozenset(),
    ) -> None:
        self._stream, self._tally = stream, tally
        self._here: dict[RecordRequest, Landed] = {}
        if stream is not None:
            stream.withdraw(keep=wanted)
            self._arrive(stream.landed())
        due = frozenset() if stream is None else stream.due
        self.requests = frozenset(self._here) | due  # records that a plan need not ask for
        self._by_record = {(found.key, found.kind): found for found in self.requests}

    def covering(self, request: RecordRequest) -> RecordRequest | None:
        """The record here, or on its way, that holds what is asked for."""
        found = self._by_record.get((request.key, request.kind))
        return found if found is not None and found.covers(request) else None

    def take(self, request: RecordRequest) -> Landed | None:
        """The record if it is here; None while it is on its way."""
        landed = self._here.pop(request, None)
        if landed is not None:
            self._use(landed.copy)
        return landed

    def next(
        self, wanted: Iterable[RecordRequest], patience_s: float | None = None
    ) -> Landed | None:
        """The next of those wanted to land; waits for it, whatever lands before. None when nothing
        at all lands in `patience_s`."""
        assert self._stream is not None, "nothing was fetched ahead"
        wanted = frozenset(wanted)
        while True:
            try:
                landed = self._stream.next(patience_s)
            except queue.Empty:
                return None
            if landed.copy.request in wanted:
                if landed.data is not None:
                    self._use(landed.copy)
                return landed
            self._arrive([landed])

    def copies_due(self, wanted: Iterable[RecordRequest]) -> list[PlannedCopy]:
        """Those wanted that are still on their way."""
        assert self._stream is not None, "nothing was fetched ahead"
        wanted = frozenset(wanted)
        return [copy for copy in self._stream.copies_due if copy.request in wanted]

    def release(self, request: RecordRequest) -> None:
        """The record's bytes are no longer under way."""
        assert self._stream is not None, "nothing was fetched ahead"
        self._stream.release(request)

    def close(self) -> Stream | None:
        """Give back what nobody took; the stream, if something of it is still on its way."""
        if self._stream is None:
            return None
        for request in list(self._here):
            self._stream.release(request)
        self._here.clear()
        self._tally.wait_s += self._stream.wait_s
        if self._stream.is_whole:
            count_moved(self._stream, self._tally)
            return None
        return self._stream

    def _arrive(self, landed: Sequence[Landed]) -> None:
        assert self._stream is not None, "nothing was fetched ahead"
        for record in landed:
            if record.data is None:  # a plan asks for it again, and then its error counts
                self._stream.release(record.copy.request)
            else:
                self._here[record.copy.request] = record

    def _use(self, copy: PlannedCopy) -> None:
        self._tally.ahead_used_bytes += copy.num_bytes


def count_moved(stream: Stream, tally: Tally) -> None:
    """Count what a stream fetched ahead."""
    tally.moved_bytes.update(stream.moved_bytes)
    tally.device_bytes.update(stream.device_bytes)
    tally.ahead_bytes += sum(stream.moved_bytes.values())


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """What is fetched for a layer, and the guess that it was for."""

    guess: Guess
    stream: Stream


class Prefetcher:
    """One layer's guess at a time; what is left of earlier ones is drained as it lands.

    `streamer` is for nothing else; at most `max_bytes` are asked for at once.
    """

    def __init__(self, streamer: Streamer, max_bytes: int) -> None:
        self._streamer = streamer
        self._max_bytes = max_bytes
        self._under_way: _UnderWay | None = None
        self._left_over: list[Stream] = []

    def start(self, guess: Guess, copies: Sequence[PlannedCopy]) -> None:
        """Begin to fetch for the guessed layer, its likeliest experts first."""
        assert self._under_way is None, "the last guess was not settled"
        weight_of = _weights(guess)
        chosen: list[PlannedCopy] = []
        room = self._max_bytes
        experts = list(by_expert(copies))
        for records in sorted(experts, key=lambda r: -weight_of.get(r[0].request.key, 0.0)):
            num_bytes = sum(copy.held_bytes for copy in records)
            if num_bytes <= room:
                chosen.extend(records)
                room -= num_bytes
        self._under_way = _UnderWay(guess, self._streamer.start(chosen))

    def settle(self, layer: int, topk_ids_SK: torch.Tensor, tally: Tally) -> AheadRecords:
        """What was fetched ahead for this layer, now that its router has spoken."""
        self._drain(tally)
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return AheadRecords(None, tally)
        if under_way.guess.layer != layer:
            self.finish(AheadRecords(under_way.stream, tally))
            return AheadRecords(None, tally)
        guessed_SK = under_way.guess.topk_ids_SK.to("cpu", torch.int64)
        ids_SK = topk_ids_SK.to("cpu", torch.int64)
        if guessed_SK.shape == ids_SK.shape:  # else another step has begun since
            right_SK = (ids_SK[:, :, None] == guessed_SK[:, None, :]).any(dim=2)
            tally.guessed_pairs += ids_SK.numel()
            tally.right_pairs += int(right_SK.sum())
        wanted = frozenset(ExpertKey(layer, expert) for expert in ids_SK.unique().tolist())
        return AheadRecords(under_way.stream, tally, wanted)

    def finish(self, ahead: AheadRecords) -> None:
        """The layer is done with its records."""
        left = ahead.close()
        if left is not None:
            self._left_over.append(left)

    def abandon(self, tally: Tally) -> None:
        """No layer will ask for what is under way: a step ended early, or ends now."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self.finish(AheadRecords(under_way.stream, tally))
        self._drain(tally)

    def check_integrity(self) -> None:
        """AssertionError when the bytes under way do not add up."""
        is_idle = self._under_way is None and not self._left_over
        self._streamer.check_integrity(idle=is_idle)

    def close(self) -> None:
        """Wait for what is being fetched, and end the threads."""
        self.abandon(Tally())
        for stream in self._left_over:
            stream.close()
        self._streamer.close()

    def _drain(self, tally: Tally) -> None:
        still: list[Stream] = []
        for stream in self._left_over:
            for landed in stream.landed():
                stream.release(landed.copy.request)
            if stream.is_whole:
                count_moved(stream, tally)
            else:
                still.append(stream)
        self._left_over = still


def _weights(guess: Guess) -> dict[ExpertKey, float]:
    """The router weight that each expert is expected to get from all rows together."""
    weights: dict[ExpertKey, float] = {}
    ids, values = guess.topk_ids_SK.flatten().tolist(), guess.topk_weights_SK.flatten().tolist()
    for expert, weight in zip(ids, values, strict=True):
        key = ExpertKey(guess.layer, expert)
        weights[key] = weights.get(key, 0.0) + weight
    return weights
