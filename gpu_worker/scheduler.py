"""Decides who runs in a step: continuous batching over a fixed number of slots.

Requests wait in a bounded queue, are admitted first come first served when a slot is free, have
their prompts computed in chunks, one at a time, alternating with a decode step of all running
sequences, so that neither starves. Pure bookkeeping: knows no tensor, no model, no clock.
"""

from __future__ import annotations

import heapq
from collections import deque

from gpu_worker.sequence import Batch, FinishReason, Sequence


class QueueFullError(Exception):
    """The waiting queue is at its limit; the caller should come back later (HTTP 429)."""


class Scheduler:
    """Owns the slots and the three lists a sequence goes through: waiting, prefill, running.

    Raises ValueError on sizes that are not positive.
    """

    def __init__(self, *, num_slots: int, max_waiting: int, prefill_chunk: int) -> None:
        for name, value in (("num_slots", num_slots), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if max_waiting < 0:
            raise ValueError(f"max_waiting: got {max_waiting}, expected at least 0")
        self._num_slots = num_slots
        self._max_waiting = max_waiting
        self._prefill_chunk = prefill_chunk
        # A heap: low slots first keep the decode rows contiguous.
        self._free = list(range(num_slots))
        self._waiting: deque[Sequence] = deque()
        self._prefill: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._last_was_prefill = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._prefill) + len(self._running)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens that no step has computed yet."""
        ahead = (*self._waiting, *self._prefill)
        return sum(len(s.prompt_ids) - s.num_computed for s in ahead)

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def find(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises QueueFullError, or ValueError on an id that is in use."""
        if sequence.request_id in self._by_id:
            raise ValueError(f"request_id: {sequence.request_id!r} is in use by a live request")
        assert sequence.state == "waiting", f"a sequence is added once, got {sequence.state}"
        if len(self._waiting) >= self._max_waiting + len(self._free):
            raise QueueFullError(
                f"{len(self._waiting)} requests wait, {self.num_running} of {self._num_slots} "
                f"slots are in use; the queue holds {self._max_waiting}; try again later"
            )
        self._by_id[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """The next step's batch; None when there is nothing to do."""
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot, sequence.state = heapq.heappop(self._free), "prefill"
            self._prefill.append(sequence)
        prefill_now = bool(self._prefill) and not (self._last_was_prefill and self._running)
        self._last_was_prefill = prefill_now
        if prefill_now:
            head = self._prefill[0]
            left = len(head.prompt_ids) - head.num_computed
            return Batch((head,), min(left, self._prefill_chunk))
        return Batch(tuple(self._running), 1) if self._running else None

    def computed(self, batch: Batch) -> None:
        """Note that the batch's positions are in their slots; a finished prompt starts to run."""
        for sequence in batch.sequences:
            sequence.num_computed += batch.num_tokens
            if sequence.state == "prefill" and sequence.num_computed == len(sequence.prompt_ids):
                assert sequence is self._prefill[0], "prompts are computed in order of admission"
                self._prefill.popleft()
                sequence.state = "running"
                self._running.append(sequence)
                # by slot: neighbouring rows of the cache are read without a copy
                self._running.sort(key=lambda s: s.slot or 0)

    def finish(
        self, sequence: Sequence, reason: FinishReason, error: Exception | None = None
    ) -> int | None:
        """End a live sequence; the slot it gave back, or None if it held none."""
        assert self._by_id.get(sequence.request_id) is sequence, "finish of a sequence not held"
        del self._by_id[sequence.request_id]
        for held in (self._waiting, self._prefill, self._running):
            if sequence in held:
                held.remove(sequence)
        slot, sequence.slot = sequence.slot, None
        if slot is not None:
            heapq.heappush(self._free, slot)
        sequence.state, sequence.finish_reason, sequence.error = "finished", reason, error
        return slot

    def check_integrity(self) -> None:
        """Assert that each slot is free or held, once, and each live sequence is in one list."""
        used = [s.slot for s in (*self._prefill, *self._running)]
        assert sorted([*self._free, *(u for u in used if u is not None)]) == list(
            range(self._num_slots)
        ), f"slots: free {sorted(self._free)} + used {used} != {self._num_slots} slots, each once"
        lists = len(self._waiting) + len(self._prefill) + len(self._running)
        assert lists == len(self._by_id), (
            f"sequences: waiting {len(self._waiting)} + prefill {len(self._prefill)} + "
            f"running {len(self._running)} != live {len(self._by_id)}"
        )
        assert len(self._waiting) <= self._max_waiting + len(self._free), (
            f"queue: waiting {len(self._waiting)} > limit {self._max_waiting} + "
            f"free {len(self._free)}"
        )
        for sequence in self._running:
            assert sequence.num_computed == sequence.num_tokens - 1, (
                f"{sequence.request_id}: computed {sequence.num_computed} != "
                f"tokens {sequence.num_tokens} - 1"
            )
