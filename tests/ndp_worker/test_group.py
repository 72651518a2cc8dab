"""Goal: several workers answer as one would, and a lost one's experts go to the next.

Method: workers that compute a known function of expert and row at once, later, or never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
import torch

from expert_store.errors import CorruptRecordError, ExpertUnavailableError
from expert_store.types import ExpertKey, ExpertOutputs, ExpertTokens
from ndp_worker.group import Member, NearDataGroup

KEYS = [ExpertKey(2, expert) for expert in range(4)]
WORK = [
    ExpertTokens(KEYS[3], (0, 2)),
    ExpertTokens(KEYS[0], (1,)),
    ExpertTokens(KEYS[1], ()),
    ExpertTokens(KEYS[2], (2, 2, 0)),
]
HIDDEN_TH = torch.randn(3, 4)


def outputs(work: Sequence[ExpertTokens]) -> torch.Tensor:
    parts = [HIDDEN_TH[list(item.token_rows)] * (item.key.expert + 1) for item in work]
    return torch.cat(parts)


class FakeWorker:
    """Answers when told to; or fails every call with `error`; has lost the factors of `lost`."""

    def __init__(
        self,
        error: Exception | None = None,
        *,
        at_once: bool = True,
        lost: Sequence[ExpertKey] = (),
    ) -> None:
        self.error = error
        self.lost = lost
        self.at_once = at_once
        self.calls: list[tuple[list[ExpertTokens], Future[ExpertOutputs]]] = []
        self.closed = False

    def submit(self, hidden_TH: torch.Tensor, work: list[ExpertTokens]) -> Future[ExpertOutputs]:
        assert hidden_TH is HIDDEN_TH
        self.calls.append((work, Future()))
        if self.at_once:
            self.answer()
        return self.calls[-1][1]

    def answer(self) -> None:
        work, future = self.calls[-1]
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(ExpertOutputs(outputs(work), self._degraded(work)))

    def _degraded(self, work: list[ExpertTokens]) -> tuple[int, ...]:
        return tuple(i for i, item in enumerate(work) if item.restored and item.key in self.lost)

    @property
    def bytes_moved(self) -> tuple[int, int]:
        return 10 * len(self.calls), len(self.calls)

    def close(self) -> None:
        self.closed = True


def group(*members: tuple[FakeWorker, list[ExpertKey] | None]) -> NearDataGroup:
    return NearDataGroup(
        [Member(worker, None if keys is None else frozenset(keys)) for worker, keys in members]
    )


def test_each_expert_goes_to_its_holder_and_comes_back_in_order() -> None:
    low, high = FakeWorker(), FakeWorker()
    near = group((low, KEYS[:2]), (high, KEYS[2:]))
    found = near.submit(HIDDEN_TH, WORK).result(0)
    assert torch.equal(found.output_PH, outputs(WORK))
    assert [item.key.expert for item in low.calls[0][0]] == [0, 1]
    assert [item.key.expert for item in high.calls[0][0]] == [3, 2]
    assert near.bytes_moved == (20, 2)
    near.close()
    assert low.closed
    assert high.closed


def test_copies_share_the_load() -> None:
    workers = [FakeWorker(), FakeWorker()]
    near = group(*((worker, None) for worker in workers))
    assert torch.equal(near.submit(HIDDEN_TH, WORK).result(0).output_PH, outputs(WORK))
    assert [len(worker.calls[0][0]) for worker in workers] == [2, 2]


def test_clients_ask_different_workers_for_a_hot_expert() -> None:
    workers = [FakeWorker(), FakeWorker()]
    members = [Member(worker, None) for worker in workers]
    groups = [NearDataGroup(members, client=client) for client in range(2)]
    for near in groups * 3:
        near.submit(HIDDEN_TH, [ExpertTokens(KEYS[0], (1,))]).result(0)
    assert [len(worker.calls) for worker in workers] == [3, 3]


def test_the_order_of_arrival_does_not_matter() -> None:
    first, second = FakeWorker(at_once=False), FakeWorker(at_once=False)
    future = group((first, KEYS[:2]), (second, KEYS[2:])).submit(HIDDEN_TH, WORK)
    second.answer()
    assert not future.done()
    first.answer()
    assert torch.equal(future.result(0).output_PH, outputs(WORK))


@pytest.mark.parametrize("error", [ExpertUnavailableError("gone"), CorruptRecordError("bits")])
def test_a_lost_workers_experts_go_to_the_next(error: Exception) -> None:
    bad, good = FakeWorker(error), FakeWorker()
    near = group((bad, None), (good, None))
    assert torch.equal(near.submit(HIDDEN_TH, WORK).result(0).output_PH, outputs(WORK))
    assert len(bad.calls) == 1


def test_nobody_left_is_a_typed_error() -> None:
    near = group((FakeWorker(ExpertUnavailableError("gone")), None))
    with pytest.raises(ExpertUnavailableError, match="no near-data worker is left") as caught:
        near.submit(HIDDEN_TH, WORK).result(0)
    assert str(caught.value.__cause__) == "gone"
    partial = group((FakeWorker(), KEYS[:1]))
    with pytest.raises(ExpertUnavailableError, match="0 of 1 hold it"):
        partial.submit(HIDDEN_TH, WORK).result(0)


def test_the_callers_mistakes_are_not_retried() -> None:
    bad, good = FakeWorker(ValueError("row 9")), FakeWorker()
    with pytest.raises(ValueError, match="row 9"):
        group((bad, None), (good, None)).submit(HIDDEN_TH, WORK).result(0)
    with pytest.raises(ValueError, match="members"):
        NearDataGroup([])


def test_nothing_to_do_asks_nobody() -> None:
    worker = FakeWorker()
    assert group((worker, None)).submit(HIDDEN_TH, []).result(0).output_PH.shape == (0, 4)
    assert not worker.calls


RESTORED = [
    ExpertTokens(KEYS[3], (0, 2), (True, False)),
    ExpertTokens(KEYS[0], (1,)),
    ExpertTokens(KEYS[1], (2,), (True,), 3),
    ExpertTokens(KEYS[2], (2, 0), (True, True)),
]


def test_degraded_experts_keep_their_places_in_the_whole() -> None:
    low = FakeWorker(lost=[KEYS[0], KEYS[1]], at_once=False)
    high = FakeWorker(lost=[KEYS[2]], at_once=False)
    future = group((low, KEYS[:2]), (high, KEYS[2:])).submit(HIDDEN_TH, RESTORED)
    high.answer()
    low.answer()
    assert future.result(0).degraded == (2, 3)
    assert torch.equal(future.result(0).output_PH, outputs(RESTORED))


def test_who_has_lost_factors_is_not_asked_to_restore_again_while_another_can() -> None:
    workers = [FakeWorker(lost=KEYS), FakeWorker(lost=[KEYS[1]])]
    near = group(*((worker, None) for worker in workers))
    assert near.submit(HIDDEN_TH, RESTORED).result(0).degraded == (2, 3)
    assert near.submit(HIDDEN_TH, RESTORED).result(0).degraded == (2,)  # the other has key 2's
    assert near.submit(HIDDEN_TH, RESTORED).result(0).degraded == (2,)  # nobody has key 1's
    assert [item.key.expert for item in workers[0].calls[-1][0]] == [0]  # low-bit work goes on


def test_an_answer_of_the_wrong_length_fails_the_call_and_leaves_nobody_waiting() -> None:
    class Short(FakeWorker):
        def answer(self) -> None:
            self.calls[-1][1].set_result(ExpertOutputs(HIDDEN_TH[:1]))

    future = group((Short(), None)).submit(HIDDEN_TH, WORK)
    with pytest.raises(RuntimeError, match="split"):
        future.result(0)


class Time:
    """A clock and the time-outs on it, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def later(self, delay_s: float, function: Callable[[], None]) -> None:
        self.due.append((self.now + delay_s, function))

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while ready := sorted((d for d in self.due if d[0] <= end), key=lambda d: d[0]):
            self.due.remove(ready[0])
            self.now = ready[0][0]
            ready[0][1]()
        self.now = end


def timed(time: Time, *workers: FakeWorker) -> NearDataGroup:
    members = [Member(worker) for worker in workers]
    return NearDataGroup(members, clock=lambda: time.now, later=time.later)


def test_a_hung_workers_experts_go_to_the_next_within_a_second() -> None:
    time = Time()
    hung, good = FakeWorker(at_once=False), FakeWorker()
    near = timed(time, hung, good)
    future = near.submit(HIDDEN_TH, WORK)
    time.advance(0.9)
    assert torch.equal(future.result(0).output_PH, outputs(WORK))
    near.submit(HIDDEN_TH, WORK).result(0)  # it is left alone now
    assert len(hung.calls) == 1
    assert near.statistics.hung == near.statistics.failed_over == 1
    hung.answer()  # late: of no use, and no harm
    time.advance(20)
    hung.at_once = True
    near.submit(HIDDEN_TH, WORK).result(0)
    assert len(hung.calls) == 2  # and tried again


def test_a_hung_only_worker_fails_the_call_so_that_experts_are_streamed() -> None:
    time = Time()
    hung = FakeWorker(at_once=False)
    near = timed(time, hung)
    future = near.submit(HIDDEN_TH, WORK)
    time.advance(0.9)
    with pytest.raises(ExpertUnavailableError, match="no near-data worker is left"):
        future.result(0)
    with pytest.raises(ExpertUnavailableError):
        near.submit(HIDDEN_TH, WORK).result(0)  # at once
    assert len(hung.calls) == 1


def test_a_late_worker_is_hedged_and_only_a_bounded_share_of_calls_is() -> None:
    time = Time()
    late, good = FakeWorker(), FakeWorker()
    near = timed(time, late, good)
    for _ in range(10):
        near.submit(HIDDEN_TH, WORK).result(0)
    late.at_once = False
    future = near.submit(HIDDEN_TH, WORK)
    assert not future.done()
    time.advance(0.05)
    assert torch.equal(future.result(0).output_PH, outputs(WORK))
    assert near.statistics.hedged == 1
    assert near.statistics.hung == 0
    late.answer()
    for _ in range(100):
        near.submit(HIDDEN_TH, WORK)
        time.advance(0.05)
        late.answer()
    assert near.statistics.hedged <= 8 + 0.05 * near.statistics.calls


def test_a_lost_compensator_is_told_once_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    time = Time()
    worker = FakeWorker(lost=KEYS)
    near = timed(time, worker, other := FakeWorker())
    for _ in range(5):
        near.submit(HIDDEN_TH, RESTORED).result(0)
    assert len(caplog.records) == 1
    worker.lost = ()
    other.calls.clear()
    time.advance(60)
    assert near.submit(HIDDEN_TH, RESTORED).result(0).degraded == ()
    assert {item.key.expert for item in worker.calls[-1][0]} == {0, 2}


def test_a_damaged_expert_does_not_rest_its_worker() -> None:
    time = Time()
    worker = FakeWorker(CorruptRecordError("bits"))
    near = timed(time, worker)
    with pytest.raises(ExpertUnavailableError):
        near.submit(HIDDEN_TH, WORK).result(0)
    worker.error = None
    assert torch.equal(near.submit(HIDDEN_TH, WORK).result(0).output_PH, outputs(WORK))
