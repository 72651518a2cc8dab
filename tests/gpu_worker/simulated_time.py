"""A clock that only what is simulated moves, and tiers that take the time they are told to take."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch

from expert_store.errors import StoreError
from expert_store.types import ExpertOutputs, ExpertTokens, RecordRequest
from gpu_worker.cost_model import ExpertLoad, LinkCost, NearCost
from gpu_worker.protocols import ExpertSource
from tests.gpu_worker.sources import CountingSource, InProcessNearData


class SimulatedClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class SimulatedSource(CountingSource):
    """A source behind a link of a given cost, which may change. One fetch at a time."""

    def __init__(self, inner: ExpertSource, clock: SimulatedClock, link: LinkCost) -> None:
        super().__init__(inner)
        self._clock = clock
        self.link = link

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        datas = super().fetch(requests)
        self._clock.now_s += self.link.call_s
        self._clock.now_s += sum(data.numel() for data in datas) / self.link.bytes_per_s
        return datas


class SimulatedNearData(InProcessNearData):
    """A near-data worker of a given cost."""

    def __init__(self, source: ExpertSource, clock: SimulatedClock, cost: NearCost) -> None:
        super().__init__(source)
        self._clock = clock
        self._codes_bytes = {
            key: info.codes.num_bytes for key, info in source.manifest.experts.items()
        }
        self.cost = cost
        self.lost: StoreError | None = None

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        self.error = self.lost
        row_bytes = hidden_TH.shape[1] * hidden_TH.element_size()
        loads = [
            ExpertLoad(
                num_pairs=len(part.token_rows),
                run_bytes=self._codes_bytes[part.key],
                act_bytes=2 * len(part.token_rows) * row_bytes,
            )
            for part in work
        ]
        self._clock.now_s += self.cost.seconds(loads)
        return super().submit(hidden_TH, work)
