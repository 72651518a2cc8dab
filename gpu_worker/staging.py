"""Pinned host memory made once: a ring that records pass through on their way to a GPU.

Ranges are given out in order and taken back in order, as the copies of one stream end. Knows no
record and no stream: who copies says when a range's last copy is over.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

ALIGNMENT = 256
"""Bytes; what a GPU's copy engine likes best."""


class Done(Protocol):
    """Says when a copy is over: a `torch.cuda.Event` that was recorded behind it."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Range:
    """A part of the ring, `bytes_` [num_bytes] uint8, the holder's own until `done` says so.

    Without `done` it is free again as soon as the holder leaves it.
    """

    __slots__ = ("bytes_", "done", "end", "is_left", "start")

    def __init__(self, bytes_: torch.Tensor, start: int, end: int) -> None:
        self.bytes_ = bytes_
        self.start, self.end = start, end  # that are taken, padding and skipped bytes included
        self.done: Done | None = None
        self.is_left = False


class StagingRing:
    """`num_bytes` of host memory, pinned or not, rounded up to `ALIGNMENT`. Thread-safe."""

    def __init__(self, num_bytes: int, *, pin: bool) -> None:
        if num_bytes < 1:
            raise ValueError(f"num_bytes: got {num_bytes}, expected at least 1")
        self._size = _aligned(num_bytes)
        self._memory = torch.empty(self._size, dtype=torch.uint8, pin_memory=pin)
        self._taken: deque[Range] = deque()
        self._next = 0  # counts on until the ring is empty; its place is this modulo the size
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        return self._size

    @property
    def taken_bytes(self) -> int:
        """Bytes that are not free, as far as that was looked up."""
        with self._changed:
            return self._next - self._taken[0].start if self._taken else 0

    @contextmanager
    def range(self, num_bytes: int) -> Iterator[Range]:
        """So many bytes in one piece; waits until they are free. At most the ring's own size.

        A thread that holds one must not wait for another.
        """
        assert 0 < num_bytes <= self._size, (num_bytes, self._size)
        taken = self._take(num_bytes)
        try:
            yield taken
        finally:
            with self._changed:
                taken.is_left = True
                self._changed.notify_all()

    def _take(self, num_bytes: int) -> Range:
        length = _aligned(num_bytes)
        while True:
            with self._changed:
                self._reclaim()
                if not self._taken:
                    self._next = 0
                place = self._next % self._size
                # A range is one piece: what is left before the end is skipped with it.
                skipped = self._size - place if place + length > self._size else 0
                end = self._next + skipped + length
                oldest = self._taken[0] if self._taken else None
                if oldest is None or end - oldest.start <= self._size:
                    at = (place + skipped) % self._size
                    taken = Range(self._memory[at : at + num_bytes], self._next, end)
                    self._taken.append(taken)
                    self._next = end
                    return taken
                if not oldest.is_left:
                    self._changed.wait()
                    continue
                done = oldest.done
            if done is not None:
                done.synchronize()

    def _reclaim(self) -> None:
        """Take back what is free, oldest first. The lock is held."""
        while self._taken and self._taken[0].is_left:
            done = self._taken[0].done
            if done is not None and not done.query():
                return
            self._taken.popleft()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
