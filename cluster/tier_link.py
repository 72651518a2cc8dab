"""A GPU worker's way to the tiers: a source and a near-data worker that outlive replacements.

Follows what the tier manager says of who runs where. Knows no Ray calls: handles are passed on.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cluster.expert_heat import UseCounter
from cluster.settings import Compression, DirectorySettings, Transport
from expert_store.actor import ObjectStoreSource, StoreHandle
from expert_store.directory import LastKnownDirectory, RedisDirectory
from expert_store.errors import ExpertUnavailableError
from expert_store.format import load_manifest
from expert_store.holder import OpenDirectory
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource
from expert_store.types import ExpertOutputs, ExpertTokens, Manifest, RecordRequest
from gpu_worker.messages import ExpertUses
from gpu_worker.protocols import ExpertSource, WireCounted
from ndp_worker.group import Member, NearDataGroup
from ndp_worker.rpc import NdpClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Who answers now. `generation` differs whenever anything else does."""

    generation: int
    stores: tuple[StoreHandle, ...]
    near_data: tuple[Listing, ...]


def open_directory(settings: DirectorySettings) -> OpenDirectory | None:
    """What opens the directory on any node; None for the one in the tier manager's memory."""
    if settings.kind == "memory":
        return None
    assert settings.redis_url is not None, "checked at the door"
    return partial(
        RedisDirectory,
        settings.redis_url,
        password_file=_path(settings.password_file),
        sentinel_password_file=_path(settings.sentinel_password_file),
        ca_file=_path(settings.ca_file),
    )


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


class TierLink:
    """The source and the near-data worker of one GPU worker, following the endpoints.

    `source` and `near_data` stay the same objects; what is behind them changes with `follow`.
    """

    def __init__(
        self,
        manifest: Manifest,
        endpoints: Endpoints,
        *,
        transport: Transport,
        compression: Compression = "none",
        directory: OpenDirectory | None,
    ) -> None:
        self._manifest = manifest
        self._transport, self._compression = transport, compression
        self._endpoints = endpoints
        self._directory = LastKnownDirectory(directory()) if directory else None
        self._uses = UseCounter(time.monotonic)
        self.source = FollowingSource(self._open_source(endpoints), self._uses)
        listings = endpoints.near_data
        self.near_data = (
            FollowingNearData(listings, manifest.version, self._uses) if listings else None
        )

    @property
    def generation(self) -> int:
        """Of the endpoints that are followed now."""
        return self._endpoints.generation

    def take_uses(self) -> tuple[ExpertUses, ...]:
        """What was asked of the tiers since this was last told, every 10 s: heat."""
        return self._uses.take()

    def follow(self, endpoints: Endpoints) -> None:
        """Go on with these endpoints; calls under way end as they can."""
        before, self._endpoints = self._endpoints, endpoints
        logger.info("following generation %d of the tiers", endpoints.generation)
        # A gRPC source asks `_listings` itself. Handles outlive restarts: only new ones matter.
        if self._transport == "object_store" and _names(before) != _names(endpoints):
            self.source.switch(self._open_source(endpoints))
        # With none left the old ones are kept: calls fail, and their experts are streamed instead.
        if self.near_data is not None and endpoints.near_data:
            self.near_data.follow(endpoints.near_data)

    def close(self) -> None:
        self.source.close()
        if self.near_data is not None:
            self.near_data.close()
        if self._directory is not None:
            self._directory.close()

    def _open_source(self, endpoints: Endpoints) -> ExpertSource:
        if self._transport == "grpc":
            return GrpcSource(
                self._manifest,
                self._listings,
                compression=self._compression,
                client=client_number(),
            )
        return ObjectStoreSource(self._manifest, endpoints.stores, client=client_number())

    def _listings(self) -> Sequence[Listing]:
        if self._directory is not None:
            return self._directory.listings()
        return [store.listing for store in self._endpoints.stores]


class FollowingSource:
    """An ExpertSource whose inner one can be exchanged while fetches are under way.

    `uses` counts every expert whose codes are asked for.
    """

    def __init__(self, source: ExpertSource, uses: UseCounter) -> None:
        self._source, self._uses = source, uses
        self._gone_bytes = (0, 0)

    @property
    def manifest(self) -> Manifest:
        return self._source.manifest

    @property
    def tier(self) -> str:
        return self._source.tier

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes (sent, received) on a wire that is counted (gRPC), of the sources gone too."""
        return _sum(self._gone_bytes, _wire_bytes(self._source))

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
        before, self._source = self._source, source
        before.close()
        self._gone_bytes = _sum(self._gone_bytes, _wire_bytes(before))

    def close(self) -> None:
        self._source.close()


class FollowingNearData:
    """A NearData over the near-data workers there are; its bytes count those gone too.

    `uses` counts every expert that is to be run.
    """

    def __init__(self, listings: Sequence[Listing], version: str, uses: UseCounter) -> None:
        self._version, self._uses = version, uses
        self._lock = threading.Lock()
        self._gone_bytes = (0, 0)
        self._clients: dict[Listing, NdpClient] = {}
        self._group = self._regroup(listings)

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        self._uses.add(item.key for item in work)
        with self._lock:
            return self._group.submit(hidden_TH, work)

    @property
    def bytes_moved(self) -> tuple[int, int]:
        with self._lock:
            return _sum(self._gone_bytes, self._group.bytes_moved)

    @property
    def num_workers(self) -> int:
        """Workers that are followed now."""
        with self._lock:
            return self._group.num_workers

    def follow(self, listings: Sequence[Listing]) -> None:
        """Go on with these workers, at least one; calls to those that are not among them fail."""
        with self._lock:
            before = dict(self._clients)
            self._group = self._regroup(listings)
            gone = [client for listing, client in before.items() if listing not in self._clients]
        for client in gone:
            client.close()
            with self._lock:
                self._gone_bytes = _sum(self._gone_bytes, client.bytes_moved)

    def close(self) -> None:
        self._group.close()

    def _regroup(self, listings: Sequence[Listing]) -> NearDataGroup:
        """Connections to workers that stay are kept."""
        self._clients = {
            each: self._clients.get(each) or NdpClient(each.addresses, version=self._version)
            for each in listings
        }
        members = [Member(client, e.keys) for e, client in self._clients.items()]
        return NearDataGroup(members, client=client_number())


def client_number() -> int:
    """The number by which this process picks among copies: the same for as long as it runs."""
    return zlib.crc32(f"{socket.gethostname()}:{os.getpid()}".encode())


def connect(
    endpoints: Endpoints,
    store: str,
    *,
    transport: Transport,
    compression: Compression = "none",
    directory: OpenDirectory | None,
) -> TierLink:
    """The link of a worker that has the folder `store` too, for the dense part and the manifest."""
    return TierLink(
        load_manifest(Path(store)),
        endpoints,
        transport=transport,
        compression=compression,
        directory=directory,
    )


def _names(endpoints: Endpoints) -> set[str]:
    return {store.listing.name for store in endpoints.stores}


def _wire_bytes(source: ExpertSource) -> tuple[int, int]:
    return source.bytes_moved if isinstance(source, WireCounted) else (0, 0)


def _sum(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    return left[0] + right[0], left[1] + right[1]
