"""The calls of a client that wait for their answers, oldest first.

Knows no transport and takes no lock: its owner does. Futures are resolved by who takes them out.

Legend: P (expert, token) pairs, H hidden.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from expert_store.types import ExpertOutputs
from ndp_worker.wire import Answer

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True, eq=False)
class PendingCall(Generic[Owner]):
    """One call: on which connection it was sent, until when it may take, what must come back."""

    owner: Owner
    deadline: float
    shape: tuple[int, int]  # [P, H]
    dtype: torch.dtype
    restorable: frozenset[int] = frozenset()  # places in the call of experts with restored rows
    future: Future[ExpertOutputs] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # what was sent cannot be taken back


class PendingCalls(Generic[Owner]):
    """At most `max_in_flight` calls by request id, all with the same time to live."""

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._calls: dict[int, PendingCall[Owner]] = {}  # in order of submission, so of deadline

    @property
    def is_full(self) -> bool:
        return len(self._calls) >= self._max_in_flight

    @property
    def oldest(self) -> PendingCall[Owner] | None:
        return next(iter(self._calls.values()), None)

    def add(self, request_id: int, call: PendingCall[Owner]) -> None:
        assert request_id not in self._calls, f"request id {request_id} is used twice"
        assert not self.is_full, f"{len(self._calls)} of {self._max_in_flight} calls in flight"
        self._calls[request_id] = call

    def take(self, answer: Answer) -> PendingCall[Owner]:
        """The call that an answer is for. Raises ValueError when it answers none, or wrongly."""
        call = self._calls.get(answer.request_id)
        if call is None:
            raise ValueError(f"no call has id {answer.request_id}: {answer.result}")
        if isinstance(answer.result, ExpertOutputs):
            _check_outputs(call, answer.result)
        return self._calls.pop(answer.request_id)

    def take_all(self, owner: Owner) -> list[PendingCall[Owner]]:
        """Every call that was sent on one connection."""
        ids = [request_id for request_id, call in self._calls.items() if call.owner is owner]
        return [self._calls.pop(request_id) for request_id in ids]


def _check_outputs(call: PendingCall[Owner], outputs: ExpertOutputs) -> None:
    output_PH = outputs.output_PH
    if tuple(output_PH.shape) != call.shape or output_PH.dtype != call.dtype:
        raise ValueError(
            f"outputs: expected {call.dtype} {call.shape}, got {output_PH.dtype} "
            f"{tuple(output_PH.shape)}"
        )
    strange = sorted(set(outputs.degraded) - call.restorable)
    if strange:
        raise ValueError(f"degraded: place {strange[0]} of the call has no restored row")
