"""A GPU worker's way to the tiers: a source and a near-data worker that outlive replacements.

Follows what the tier manager says of who runs where. Knows no Ray calls: handles are passed on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cluster.settings import DirectorySettings, Transport
from expert_store.actor import ObjectStoreSource, StoreHandle
from expert_store.directory import LastKnownDirectory, RedisDirectory
from expert_store.errors import ExpertUnavailableError
from expert_store.format import load_manifest
from expert_store.holder import OpenDirectory
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource
from expert_store.types import ExpertTokens, Manifest, RecordRequest
from gpu_worker.protocols import ExpertSource
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
    password_file = Path(settings.password_file) if settings.password_file else None
    return partial(RedisDirectory, settings.redis_url, password_file=password_file)


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
        directory: OpenDirectory | None,
        node_id: str,
    ) -> None:
        self._manifest = manifest
        self._node_id = node_id
        self._transport = transport
        self._endpoints = endpoints
        self._directory = LastKnownDirectory(directory()) if directory else None
        self.source = FollowingSource(self._open_source(endpoints))
        near_data = self._near_data_addresses(endpoints)
        self.near_data = (
            FollowingNearData(near_data, manifest.version) if endpoints.near_data else None
        )

    @property
    def generation(self) -> int:
        """Of the endpoints that are followed now."""
        return self._endpoints.generation

    def follow(self, endpoints: Endpoints) -> None:
        """Go on with these endpoints; calls under way end as they can."""
        before, self._endpoints = self._endpoints, endpoints
        logger.info("following generation %d of the tiers", endpoints.generation)
        # A gRPC source asks `_listings` itself. Handles outlive restarts: only new ones matter.
        if self._transport == "object_store" and _names(before) != _names(endpoints):
            self.source.switch(self._open_source(endpoints))
        addresses = self._near_data_addresses(endpoints)
        if self.near_data is not None and addresses:
            self.near_data.switch(addresses)

    def close(self) -> None:
        self.source.close()
        if self.near_data is not None:
            self.near_data.close()
        if self._directory is not None:
            self._directory.close()

    def _open_source(self, endpoints: Endpoints) -> ExpertSource:
        if self._transport == "grpc":
            return GrpcSource(self._manifest, self._listings)
        return ObjectStoreSource(self._manifest, endpoints.stores)

    def _listings(self) -> Sequence[Listing]:
        if self._directory is not None:
            return self._directory.listings()
        return [store.listing for store in self._endpoints.stores]

    def _near_data_addresses(self, endpoints: Endpoints) -> tuple[str, ...]:
        """Of one near-data worker: on this node if there is one, else spread by node."""
        local = [each for each in endpoints.near_data if each.node_id == self._node_id]
        candidates = local or list(endpoints.near_data)
        if not candidates:
            return ()
        chosen = candidates[sum(self._node_id.encode()) % len(candidates)]
        return chosen.addresses


class FollowingSource:
    """An ExpertSource whose inner one can be exchanged while fetches are under way."""

    def __init__(self, source: ExpertSource) -> None:
        self._source = source

    @property
    def manifest(self) -> Manifest:
        return self._source.manifest

    @property
    def tier(self) -> str:
        return self._source.tier

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        """As the inner source; what fails on one that was exchanged meanwhile is asked again."""
        source = self._source
        try:
            return source.fetch(requests)
        except ExpertUnavailableError:
            if self._source is source:
                raise
            return self.fetch(requests)

    def switch(self, source: ExpertSource) -> None:
        before, self._source = self._source, source
        before.close()

    def close(self) -> None:
        self._source.close()


class FollowingNearData:
    """A NearData whose worker can be exchanged; bytes are counted over all of them."""

    def __init__(self, addresses: tuple[str, ...], version: str) -> None:
        self._version = version
        self._addresses = addresses
        self._lock = threading.Lock()
        self._client = NdpClient(addresses, version=version)
        self._before = (0, 0)

    def submit(self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]) -> Future[torch.Tensor]:
        with self._lock:
            return self._client.submit(hidden_TH, work)

    @property
    def bytes_moved(self) -> tuple[int, int]:
        with self._lock:
            sent, received = self._client.bytes_moved
            return self._before[0] + sent, self._before[1] + received

    def switch(self, addresses: tuple[str, ...]) -> None:
        """Go on with the worker at these addresses; calls to the former one fail."""
        if addresses == self._addresses:
            return
        client = NdpClient(addresses, version=self._version)
        with self._lock:
            before, self._client, self._addresses = self._client, client, addresses
        before.close()
        with self._lock:
            sent, received = before.bytes_moved
            self._before = (self._before[0] + sent, self._before[1] + received)

    def close(self) -> None:
        self._client.close()


def connect(
    endpoints: Endpoints,
    node_id: str,
    *,
    store: str,
    transport: Transport,
    directory: OpenDirectory | None,
) -> TierLink:
    """The link of a worker on node `node_id` that has the folder `store` for the dense part."""
    return TierLink(
        load_manifest(Path(store)),
        endpoints,
        transport=transport,
        directory=directory,
        node_id=node_id,
    )


def _names(endpoints: Endpoints) -> set[str]:
    return {store.listing.name for store in endpoints.stores}
