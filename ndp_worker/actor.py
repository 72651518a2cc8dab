"""The Ray shell of a near-data worker: opens its node's segment and serves calls on it.

No call rides on Ray: it only starts, finds and watches the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import ray

from expert_store.actor import end
from expert_store.holder import Holder, HolderStatus, OpenDirectory
from expert_store.lease import Lease
from expert_store.listing import HolderLoad, Listing
from expert_store.segment import Segment
from expert_store.types import ExpertKey
from kernels.ops import pin_threads
from ndp_worker.config import NdpConfig
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpServer

logger = logging.getLogger(__name__)


@ray.remote
class NdpActor:
    """Runs the experts `keys` of the store in folder `store`, all of them when None.

    Creating it raises StoreFormatError or ValueError as `Segment` does. With `lease_s` it ends when
    nobody has called `describe` for so many seconds. Scrubs and repairs as `StoreActor`.
    """

    def __init__(
        self,
        store: str,
        keys: Sequence[ExpertKey] | None = None,
        *,
        config: NdpConfig | None = None,
        directory: OpenDirectory | None = None,
        lease_s: float | None = None,
        scrub_bytes_per_s: float = 0.0,
    ) -> None:
        config = (config or NdpConfig()).resolve()
        assert config.num_threads != "auto", "resolve() leaves no auto"
        logger.info("near-data worker on %s: %s", store, config)
        if config.pin_threads and not pin_threads():
            logger.warning(
                "pin_threads: not to be had here, threads stay where the system puts them"
            )
        segment = Segment(Path(store), keys)
        self._executor = Executor(segment, num_threads=config.num_threads, backend=config.backend)
        segment.watch(self._executor.forget)
        context = ray.get_runtime_context()
        self._holder = Holder(
            segment,
            "near_data",
            partial(
                NdpServer,
                self._executor,
                max_connections=config.max_connections,
                max_message_bytes=config.max_message_bytes,
            ),
            tcp_address=config.tcp_address
            or f"{ray.util.get_node_ip_address()}:{config.ports or 0}",
            name=str(context.get_actor_id()),
            node_id=context.get_node_id(),
            directory=directory,
            scrub_bytes_per_s=scrub_bytes_per_s,
        )
        self._lease = None if lease_s is None else Lease(lease_s, partial(end, self._holder))

    def describe(self) -> HolderStatus:
        """Its listing (name, node, version, gRPC addresses, keys), sizes and process. Renews the
        lease.
        """
        if self._lease is not None:
            self._lease.renew()
        return self._holder.status

    def know(self, listings: Sequence[Listing]) -> None:
        """Which holders of records there are now: damaged ones are repaired from their copies."""
        self._holder.know(listings)

    def load(self) -> HolderLoad:
        """How long it computed since it began."""
        return HolderLoad(busy_s=self._executor.busy_s)

    def stop(self) -> None:
        """Withdraw from the directory and stop serving; the actor can be killed afterwards."""
        if self._lease is not None:
            self._lease.close()
        self._holder.close()
