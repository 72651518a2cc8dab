"""Goal: ranges of the ring never overlap while one is in use, and every wait ends.

Method: random claims with copies that end later (hypothesis), a filled pattern read back at the end
of each; threads that fill and leave ranges while another waits for them.
"""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.staging import ALIGNMENT, StagingRing


class Copy:
    """A copy that ends when told, or when somebody waits for it."""

    def __init__(self, source: torch.Tensor) -> None:
        self.source = source
        self.expected = source.clone()
        self.is_over = False
        self.num_waits = 0

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.num_waits += 1
        self.end()

    def end(self) -> None:
        """The copy engine reads until here: the bytes must still be those that were sent."""
        assert torch.equal(self.source, self.expected)
        self.is_over = True


@given(
    claims=st.lists(
        st.tuples(st.integers(1, 2048), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    )
)
def test_a_range_is_untouched_until_its_copy_is_over(claims: list[tuple[int, int]]) -> None:
    ring = StagingRing(2048, pin=False)
    under_way: deque[Copy] = deque()
    for number, (num_bytes, num_ended) in enumerate(claims):
        with ring.range(num_bytes) as taken:
            assert taken.bytes_.numel() == num_bytes
            taken.bytes_.fill_(number % 251)
            copy = Copy(taken.bytes_)
            taken.done = copy
        under_way.append(copy)
        assert ring.taken_bytes <= ring.num_bytes
        for _ in range(min(num_ended, len(under_way))):
            ended = under_way.popleft()
            if not ended.is_over:
                ended.end()
    for copy in under_way:
        if not copy.is_over:
            copy.end()


def test_a_full_ring_waits_for_its_oldest_copy_alone() -> None:
    ring = StagingRing(4 * ALIGNMENT, pin=False)
    copies = []
    for _ in range(4):
        with ring.range(ALIGNMENT) as taken:
            taken.done = Copy(taken.bytes_)
            copies.append(taken.done)
    with ring.range(ALIGNMENT):
        pass
    assert [copy.num_waits for copy in copies] == [1, 0, 0, 0]


def test_the_whole_ring_can_be_taken_from_any_place() -> None:
    ring = StagingRing(4 * ALIGNMENT, pin=False)
    for first in range(1, 4):
        with ring.range(first * ALIGNMENT):
            pass
        with ring.range(ring.num_bytes) as taken:
            assert taken.bytes_.numel() == ring.num_bytes


def test_a_range_left_by_an_error_is_free_again() -> None:
    ring = StagingRing(ALIGNMENT, pin=False)
    with pytest.raises(RuntimeError), ring.range(ALIGNMENT):
        raise RuntimeError
    with ring.range(ALIGNMENT):
        pass


def test_threads_that_fill_at_the_same_time_get_ranges_of_their_own() -> None:
    ring = StagingRing(8 * ALIGNMENT, pin=False)
    wrong: list[int] = []

    def fill(number: int) -> None:
        for size in range(1, 5 * ALIGNMENT, 97):
            with ring.range(size) as taken:
                taken.bytes_.fill_(number)
                if not bool((taken.bytes_ == number).all()):
                    wrong.append(number)

    threads = [threading.Thread(target=fill, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a wait did not end"
    assert not wrong


def test_a_ring_without_place_is_refused() -> None:
    with pytest.raises(ValueError, match="num_bytes: got 0"):
        StagingRing(0, pin=False)
