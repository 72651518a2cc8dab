"""The Ray shell of a near-data worker: opens its node's segment and serves calls on it.

No call rides on Ray: it only starts, finds and watches the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import ray

from expert_store.holder import HolderStatus, OpenDirectory, Presence, SocketFolder
from expert_store.listing import Listing
from expert_store.segment import Segment
from expert_store.types import ExpertKey
from ndp_worker.config import NdpConfig
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpServer

logger = logging.getLogger(__name__)


@ray.remote
class NdpActor:
    """Runs the experts `keys` of the store in folder `store`, all of them when None.

    Creating it raises StoreFormatError or ValueError as `Segment` does.
    """

    def __init__(
        self,
        store: str,
        keys: Sequence[ExpertKey] | None = None,
        *,
        config: NdpConfig | None = None,
        directory: OpenDirectory | None = None,
    ) -> None:
        config = (config or NdpConfig()).resolve()
        assert config.num_threads != "auto", "resolve() leaves no auto"
        logger.info("near-data worker on %s: %s", store, config)
        self._segment = Segment(Path(store), keys)
        executor = Executor(self._segment, num_threads=config.num_threads, backend=config.backend)
        self._socket = SocketFolder()
        context = ray.get_runtime_context()
        tcp = config.tcp_address or f"{ray.util.get_node_ip_address()}:0"
        self._server = NdpServer(
            executor,
            (self._socket.address, tcp),
            max_connections=config.max_connections,
            max_message_bytes=config.max_message_bytes,
        )
        listing = Listing(
            name=str(context.get_actor_id()),
            role="near_data",
            version=self._segment.manifest.version,
            node_id=context.get_node_id(),
            addresses=self._server.addresses,
            keys=None if keys is None else self._segment.keys,
        )
        self._presence = Presence(
            listing,
            num_experts=len(self._segment.keys),
            num_bytes=self._segment.num_bytes,
            directory=directory,
        )

    def describe(self) -> HolderStatus:
        """Its listing (name, node, version, gRPC addresses, keys), sizes and process."""
        return self._presence.status

    def ping(self) -> bool:
        """True, when it is alive."""
        return True

    def stop(self) -> None:
        """Withdraw from the directory and stop serving; the actor can be killed afterwards."""
        try:
            self._presence.close()
        finally:
            self._server.close()
            self._socket.close()
            self._segment.close()
