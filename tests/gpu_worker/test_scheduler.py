"""Goal: no slot is lost or given twice, nobody starves, first come first served, limited queue.

Method: a random play of arrivals, cancels and endings (hypothesis) with check_integrity after every
move, on bookkeeping alone; and small scripts for order, alternation and limits.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.scheduler import QueueFullError, Scheduler
from gpu_worker.sequence import Batch, SamplingParams, Sequence


def scheduler(num_slots: int = 2, max_waiting: int = 4, prefill_chunk: int = 4) -> Scheduler:
    return Scheduler(num_slots=num_slots, max_waiting=max_waiting, prefill_chunk=prefill_chunk)


def request(name: str, prompt: int = 3, answer: int = 2) -> Sequence:
    return Sequence(name, tuple(range(prompt)), SamplingParams(max_tokens=answer))


def advance(owner: Scheduler, batch: Batch) -> None:
    """What the engine does after a forward, with made-up tokens."""
    samples = batch.samples
    owner.computed(batch)
    for sequence in batch.sequences if samples else ():
        sequence.output_ids.append(1)
        if len(sequence.output_ids) == sequence.params.max_tokens:
            owner.finish(sequence, "length")


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 13), st.integers(1, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(moves=MOVES, num_slots=st.integers(1, 4), max_waiting=st.integers(0, 5))
def test_random_play_keeps_every_promise(
    moves: list[tuple[str, int, int]], num_slots: int, max_waiting: int
) -> None:
    owner = scheduler(num_slots, max_waiting, prefill_chunk=4)
    added: list[Sequence] = []
    admitted: list[Sequence] = []

    def step() -> None:
        batch = owner.schedule()
        owner.check_integrity()
        admitted.extend(
            s for s in added if s.slot is not None and s not in admitted and s.state != "waiting"
        )
        if batch is None:
            assert not owner.has_work
            return
        assert len(batch.sequences) <= num_slots
        assert batch.num_tokens <= 4
        advance(owner, batch)
        owner.check_integrity()

    for kind, first, second in moves:
        if kind == "add":
            sequence = request(str(len(added)), first, second)
            free = num_slots - owner.num_running
            try:
                owner.add(sequence)
                added.append(sequence)
            except QueueFullError:
                assert owner.num_waiting == max_waiting + free
        elif kind == "cancel" and first < len(added) and owner.find(added[first].request_id):
            owner.finish(added[first], "cancelled")
            assert owner.find(added[first].request_id) is None
        elif kind == "step":
            step()
        owner.check_integrity()
    bound = sum(len(s.prompt_ids) + 8 for s in added) * 2 + 2
    for _ in range(bound):
        step()
    assert not owner.has_work
    assert owner.num_running == owner.num_waiting == owner.num_waiting_tokens == 0
    assert all(s.state == "finished" and s.finish_reason and s.slot is None for s in added)
    order = [int(s.request_id) for s in admitted]
    assert order == sorted(order), "admitted out of order"


def test_prompts_are_cut_and_alternate_with_decode() -> None:
    owner = scheduler(num_slots=2, prefill_chunk=4)
    first, second = request("first", 3, 20), request("second", 10, 20)
    owner.add(first)
    owner.add(second)
    seen = []
    for _ in range(8):
        batch = owner.schedule()
        assert batch is not None
        seen.append(([s.request_id for s in batch.sequences], batch.num_tokens))
        advance(owner, batch)
    one, both = ["first"], ["first", "second"]
    assert seen == [
        (one, 3),
        (one, 1),
        (["second"], 4),
        (one, 1),
        (["second"], 4),
        (one, 1),
        (["second"], 2),
        (both, 1),
    ]


def test_full_queue_is_an_error_that_says_how_full() -> None:
    owner = scheduler(num_slots=1, max_waiting=2)
    for name in "abc":  # one for the free slot, two to wait
        owner.add(request(name))
    with pytest.raises(QueueFullError, match="3 requests wait.*queue holds 2"):
        owner.add(request("d"))
    owner.schedule()
    with pytest.raises(QueueFullError, match="2 requests wait, 1 of 1 slots"):
        owner.add(request("d"))
    owner.check_integrity()


def test_an_id_in_use_is_refused_and_free_again_later() -> None:
    owner = scheduler()
    first = request("same")
    owner.add(first)
    with pytest.raises(ValueError, match="request_id: 'same' is in use"):
        owner.add(request("same"))
    owner.finish(first, "cancelled")
    owner.add(request("same"))


def test_waiting_tokens_count_what_no_step_has_computed() -> None:
    owner = scheduler(num_slots=1, prefill_chunk=4)
    owner.add(request("a", 10))
    owner.add(request("b", 5))
    assert owner.num_waiting_tokens == 15
    batch = owner.schedule()
    assert batch is not None
    owner.computed(batch)
    assert owner.num_waiting_tokens == 11


def test_integrity_names_all_terms() -> None:
    owner = scheduler(num_slots=2)
    owner.add(request("a"))
    owner.schedule()
    owner._free.append(0)
    with pytest.raises(AssertionError, match=r"free \[0, 1\] \+ used \[0\] != 2 slots"):
        owner.check_integrity()


@pytest.mark.parametrize("field", ["num_slots", "prefill_chunk", "max_waiting"])
def test_sizes_must_make_sense(field: str) -> None:
    sizes = {"num_slots": 1, "prefill_chunk": 1, "max_waiting": 0}
    with pytest.raises(ValueError, match=field):
        Scheduler(**{**sizes, field: -1})
