"""A GPU worker's way to the tiers: a source and a near-data worker that outlive replacements.

Follows what the tier manager says of who runs where. Knows no Ray calls: handles are passed on.
What goes on over an exchange is in `cluster/following.py`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cluster.expert_heat import UseCounter
from cluster.following import FollowingNearData, FollowingSource
from cluster.settings import Compression, DirectorySettings, Transport
from expert_store.actor import ObjectStoreSource, StoreHandle
from expert_store.directory import LastKnownDirectory, RedisDirectory
from expert_store.format import load_manifest
from expert_store.holder import OpenDirectory
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource
from expert_store.types import Manifest
from gpu_worker.messages import ExpertUses, TierCalls
from gpu_worker.protocols import ExpertSource

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
            FollowingNearData(listings, manifest.version, self._uses, client_number())
            if listings
            else None
        )

    @property
    def generation(self) -> int:
        """Of the endpoints that are followed now."""
        return self._endpoints.generation

    def take_uses(self) -> tuple[ExpertUses, ...]:
        """What was asked of the tiers since this was last told, every 10 s: heat."""
        return self._uses.take()

    @property
    def calls(self) -> TierCalls:
        """How calls to the tiers went since the start, over all exchanges."""
        near = {} if self.near_data is None else asdict(self.near_data.statistics)
        return TierCalls(asdict(self.source.statistics), near)

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
