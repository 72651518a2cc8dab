"""A source and a near-data worker that stay when what is behind them is exchanged.

Their counts go on over an exchange and never go back. Knows no tier manager: who is to be asked
now is passed in.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from cluster.expert_heat import UseCounter
from expert_store.errors import ExpertUnavailableError
from expert_store.health import ReadingStatistics
from expert_store.listing import Listing
from expert_store.types import ExpertOutputs, ExpertTokens, Manifest, RecordRequest
from gpu_worker.protocols import CopiesCounted, ExpertSource, WireCounted
from ndp_worker.group import Member, NearDataGroup
from ndp_worker.health import NearDataStatistics
from ndp_worker.rpc import NdpClient


class FollowingSource:
    """An ExpertSource whose inner one can be exchanged while fetches are under way.

    `uses` counts every expert whose codes are asked for.
    """

    def __init__(self, source: ExpertSource, uses: UseCounter) -> None:
        self._source, self._uses = source, uses
        self._lock = threading.Lock()
        # The one before still counts: its calls under way end after the exchange.
        self._before: ExpertSource | None = None
        self._gone_bytes, self._gone_calls = (0, 0), ReadingStatistics()

    @property
    def manifest(self) -> Manifest:
        return self._source.manifest

    @property
    def tier(self) -> str:
        return self._source.tier

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes (sent, received) on a wire that is counted (gRPC), of the sources gone too."""
        with self._lock:
            return _sum(self._gone_bytes, _wire_bytes(self._before), _wire_bytes(self._source))

    @property
    def statistics(self) -> ReadingStatistics:
        """Of the calls to copies since the start, of the sources gone too."""
        with self._lock:
            return self._gone_calls + _calls(self._before) + _calls(self._source)

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        """As the inner source; what fails on one that was exchanged meanwhile is asked again."""
        self._uses.add(request.key for request in requests if request.kind == "codes")
        while True:
            source = self._source
            try:
                return source.fetch(requests)
            except ExpertUnavailableError:
                if self._source is source:
                    raise

    def switch(self, source: ExpertSource) -> None:
        with self._lock:
            self._gone_bytes = _sum(self._gone_bytes, _wire_bytes(self._before))
            self._gone_calls += _calls(self._before)
            before = self._before = self._source
            self._source = source
        before.close()

    def close(self) -> None:
        self._source.close()


class FollowingNearData:
    """A NearData over the near-data workers there are; its counts are of those gone too.

    `uses` counts every expert that is to be run; `client` is as `NearDataGroup`'s.
    """

    def __init__(
        self, listings: Sequence[Listing], version: str, uses: UseCounter, client: int
    ) -> None:
        self._version, self._uses, self._client = version, uses, client
        self._lock = threading.Lock()
        self._clients: dict[Listing, NdpClient] = {}
        self._group = self._regroup(listings)
        # The group before still counts, as do its workers that are gone: calls under way end.
        self._before: NearDataGroup | None = None
        self._leaving: list[NdpClient] = []
        self._gone_bytes, self._gone_calls = (0, 0), NearDataStatistics()

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        self._uses.add(item.key for item in work)
        with self._lock:
            return self._group.submit(hidden_TH, work)

    @property
    def bytes_moved(self) -> tuple[int, int]:
        with self._lock:
            leaving = [client.bytes_moved for client in self._leaving]
            return _sum(self._gone_bytes, *leaving, self._group.bytes_moved)

    @property
    def statistics(self) -> NearDataStatistics:
        """Of the calls to workers since the start, of the groups gone too."""
        with self._lock:
            before = NearDataStatistics() if self._before is None else self._before.statistics
            return self._gone_calls + before + self._group.statistics

    @property
    def num_workers(self) -> int:
        """Workers that are followed now."""
        with self._lock:
            return self._group.num_workers

    def follow(self, listings: Sequence[Listing]) -> None:
        """Go on with these workers, at least one; calls to those that are not among them fail."""
        with self._lock:
            self._gone_bytes = _sum(self._gone_bytes, *(c.bytes_moved for c in self._leaving))
            if self._before is not None:
                self._gone_calls += self._before.statistics
            self._before, clients = self._group, dict(self._clients)
            self._group = self._regroup(listings)
            gone = [client for each, client in clients.items() if each not in self._clients]
            self._leaving = gone
        for client in gone:
            client.close()

    def close(self) -> None:
        self._group.close()

    def _regroup(self, listings: Sequence[Listing]) -> NearDataGroup:
        """Connections to workers that stay are kept."""
        self._clients = {
            each: self._clients.get(each) or NdpClient(each.addresses, version=self._version)
            for each in listings
        }
        members = [Member(client, e.keys) for e, client in self._clients.items()]
        return NearDataGroup(members, client=self._client)


def _wire_bytes(source: ExpertSource | None) -> tuple[int, int]:
    return source.bytes_moved if isinstance(source, WireCounted) else (0, 0)


def _calls(source: ExpertSource | None) -> ReadingStatistics:
    return source.statistics if isinstance(source, CopiesCounted) else ReadingStatistics()


def _sum(*moved: tuple[int, int]) -> tuple[int, int]:
    return sum(sent for sent, _ in moved), sum(received for _, received in moved)
