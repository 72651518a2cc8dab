"""The Ray shell of a store: an actor that holds a segment, and the source that reads its objects.

The actor serves the same records two ways: as objects that it owns in Ray's object store (zero
copy on one node) and over gRPC. What it does lies in plain classes: segment, rpc, holder, failover.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from expert_store.errors import CorruptRecordError, ExpertUnavailableError, StoreFormatError
from expert_store.failover import Attempts, Copy, check_deadline
from expert_store.fetching import Call, Fetch, lost
from expert_store.health import CopyHealth, ReadingStatistics
from expert_store.holder import Holder, HolderStatus, OpenDirectory
from expert_store.lease import Lease
from expert_store.listing import HolderLoad, Listing
from expert_store.mapped_file import readonly_tensor
from expert_store.owned_objects import OwnedObjects
from expert_store.rpc import RecordServer
from expert_store.segment import Segment, locate
from expert_store.types import ExpertKey, Manifest, RecordRequest

MAX_PUT_BYTES = 4 * 2**30
MAX_CACHED_REFS = 16384
MAX_BATCH = 1024
MAX_CALLS_AT_ONCE = 64  # of one source
POLL_S = 0.25
"""Ray's waiting cannot be ended from outside: a call that nobody needs any more looks so often."""


@ray.remote
class StoreActor:
    """Holds the segment of one node: `keys` of the store in folder `store`, all when None.

    `tcp_address` None is the node's own address, there the first free port of `ports`
    ("20000-20031"), or any when that is None too. At most `max_put_bytes` of records
    are kept in the object store on the actor's account; the least recently asked for go first.
    With `lease_s` it ends when nobody has called `describe` for so many seconds. Records are hashed
    again and again, `scrub_bytes_per_s` of them, and repaired from the copies it is told of.
    Creating it raises StoreFormatError or ValueError as `Segment` does.
    """

    def __init__(
        self,
        store: str,
        keys: Sequence[ExpertKey] | None = None,
        *,
        tcp_address: str | None = None,
        ports: str | None = None,
        directory: OpenDirectory | None = None,
        max_put_bytes: int = MAX_PUT_BYTES,
        lease_s: float | None = None,
        scrub_bytes_per_s: float = 0.0,
    ) -> None:
        self._segment = Segment(Path(store), keys)
        self._objects = OwnedObjects(self._segment, ray.put, max_put_bytes=max_put_bytes)
        context = ray.get_runtime_context()
        self._holder = Holder(
            self._segment,
            "records",
            partial(RecordServer, self._segment),
            tcp_address=tcp_address or f"{ray.util.get_node_ip_address()}:{ports or 0}",
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
        """What it gave away since it began."""
        return HolderLoad(served_bytes=self._segment.served_bytes)

    def refs(self, version: str, requests: Sequence[RecordRequest]) -> list[ray.ObjectRef]:
        """Objects of records, numpy uint8, in request order; put once, owned by this actor.

        A prefix of a record is an object of its own, so that another node pulls no byte more.

        Raises StoreFormatError when the asker's store version is another one, and as
        `Segment.fetch` does.
        """
        if version != self._segment.manifest.version:
            raise StoreFormatError(
                f"this copy holds store version {self._segment.manifest.version}, the request is "
                f"for {version}; restart whichever is older"
            )
        return self._objects.refs(requests)

    def stop(self) -> None:
        """Withdraw from the directory and stop serving; the actor can be killed afterwards."""
        if self._lease is not None:
            self._lease.close()
        self._holder.close()


def end(holder: Holder) -> None:
    """End the actor that this process is, for good. The directory may be lost: so be it."""
    try:
        holder.close()
    finally:
        ray.kill(ray.get_runtime_context().current_actor)


@dataclass(frozen=True, slots=True)
class StoreHandle:
    """A store actor and what it said of itself."""

    actor: Any  # handle of a StoreActor
    listing: Listing


class ObjectStoreSource:
    """Reads records as Ray objects; tier "object_store". Thread-safe.

    On the actor's node the tensors are the object store's own read-only pages; elsewhere Ray first
    copies the object to this node. References are kept, so that a record is asked for once. An
    actor that dies, restarts or loses an object is asked again, or another copy is, within
    `deadline_s` for a whole fetch.
    """

    tier = "object_store"

    def __init__(
        self,
        manifest: Manifest,
        stores: Sequence[StoreHandle],
        *,
        deadline_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        client: int = 0,
    ) -> None:
        check_deadline(deadline_s)
        self._manifest = manifest
        self._deadline_s = deadline_s
        self._clock = clock
        node_id = ray.get_runtime_context().get_node_id()
        self._actors = {store.listing.name: store.actor for store in stores}
        self._copies = tuple(
            Copy(
                s.listing.name,
                s.listing.keys,
                is_local=s.listing.node_id == node_id,
                holder=s.listing.name,
            )
            for s in stores
        )
        self._health = CopyHealth(clock, client)
        self._pool = ThreadPoolExecutor(MAX_CALLS_AT_ONCE, "moetier-ask")
        self._refs: OrderedDict[tuple[str, RecordRequest], ray.ObjectRef] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def fetch(self, requests: Sequence[RecordRequest]) -> list[torch.Tensor]:
        """The records' bytes in request order, each a flat read-only uint8 view of an object.

        Raises ValueError for a request no store could answer, ExpertUnavailableError when no copy
        gave a record before the deadline, CorruptRecordError when every copy of it is damaged.
        """
        # What no store could answer is not asked.
        sizes = [locate(self._manifest, request).num_bytes for request in requests]
        if self._closed.is_set():
            raise ExpertUnavailableError("the source is closed")
        fetch = Fetch(
            Attempts(requests, sizes=sizes, health=self._health, max_batch=MAX_BATCH),
            lambda refresh: self._copies,
            lambda call, left_s: self._ask(
                call, [requests[index] for index in call.batch.indices], left_s
            ),
            health=self._health,
            pool=self._pool,
            clock=self._clock,
            is_closed=self._closed.is_set,
        )
        return fetch.run(self._deadline_s)

    @property
    def statistics(self) -> ReadingStatistics:
        """Of the calls to copies since the start."""
        return self._health.statistics

    def close(self) -> None:
        """Let go of all references; tensors that are still held stay valid."""
        self._closed.set()
        with self._lock:
            self._refs.clear()
        self._pool.shutdown(wait=False)

    def _ask(
        self, call: Call, wanted: Sequence[RecordRequest], left_s: float
    ) -> list[torch.Tensor]:
        """As `fetching.Ask`; ValueError when the copy finds the request wrong."""
        name = call.batch.address
        try:
            return self._read(call, name, wanted, self._clock() + left_s)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError | CorruptRecordError | ExpertUnavailableError):
                raise error.cause from error
            raise lost(f"{error.cause!r}") from error
        except (RayActorError, ObjectLostError, GetTimeoutError) as error:
            self._forget(name, wanted)
            reason = str(error).strip().splitlines() or [""]
            raise lost(f"{type(error).__name__}: {reason[0]}") from error

    def _read(
        self, call: Call, name: str, wanted: Sequence[RecordRequest], until: float
    ) -> list[torch.Tensor]:
        names = [(name, request) for request in wanted]
        with self._lock:
            known = {n: self._refs[n] for n in names if n in self._refs}
        missing = [r for n, r in zip(names, wanted, strict=True) if n not in known]
        if missing:
            asked = self._actors[name].refs.remote(self._manifest.version, missing)
            found = self._get(call, asked, until)
            added = {(name, r): ref for r, ref in zip(missing, found, strict=True)}
            known |= added
            with self._lock:
                self._refs |= added
                while len(self._refs) > MAX_CACHED_REFS:
                    self._refs.popitem(last=False)
        arrays = self._get(call, [known[n] for n in names], until)
        return [readonly_tensor(array) for array in arrays]

    def _get(self, call: Call, refs: Any, until: float) -> Any:
        """As `ray.get`, until the deadline or until the call is cancelled."""
        while True:
            left_s = until - self._clock()
            try:
                return ray.get(refs, timeout=max(0.001, min(POLL_S, left_s)))
            except GetTimeoutError:
                if call.is_cancelled or left_s <= POLL_S:
                    raise

    def _forget(self, name: str, wanted: Sequence[RecordRequest]) -> None:
        with self._lock:
            for request in wanted:
                self._refs.pop((name, request), None)
