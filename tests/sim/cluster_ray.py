"""Ray and Serve as far as the cluster uses them: nodes, actors that are restarted, replicas.

The bodies of the actors are the product's: segments, holders, servers, executors, GPU workers.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray.serve.exceptions import BackPressureError

from cluster.placement import Node
from expert_store.holder import Holder, HolderStatus
from expert_store.listing import Listing
from expert_store.rpc import RecordServer
from expert_store.segment import Segment
from ndp_worker.executor import Executor
from ndp_worker.rpc import NdpServer
from tests.sim.clockwork import Process, VirtualLoop
from tests.sim.handles import SimActor, SimResponse
from tests.sim.network import Network

START_S = 0.2
RESTART_S = 1.0
MAX_ONGOING = 4
"""Calls that Serve sends to one GPU worker at a time."""
POLL_S = 0.02
HEALTH_S = 2.0


class SimRay:
    """The nodes and the actors on them; who dies is started again where its node still lives."""

    def __init__(self, network: Network, stores: Callable[[str, str], Path]) -> None:
        self.network = network
        self.loop: VirtualLoop = network.loop
        self.store_on = stores  # (host, path) -> the folder that the path means there
        self.node_ids: dict[str, str] = {}
        self.actors: list[SimActor] = []
        self.named: dict[tuple[str, str], SimActor] = {}  # by namespace and name
        self.records: list[RecordServer] = []
        self._makers: dict[str, Callable[[], Any]] = {}
        self._num_actors = self._num_nodes = 0
        self.log: Callable[[str], None] = lambda text: None

    def live_nodes(self) -> tuple[Node, ...]:
        labels = {"moetier.io/store": "true", "moetier.io/ndp": "true"}
        return tuple(
            Node(node_id, host, labels)
            for host, node_id in sorted(self.node_ids.items())
            if self.network.host(host).has_power
        )

    def actor_class(self, role: str) -> Any:
        """What ray.remote made of StoreActor or NdpActor."""

        def options(**said: Any) -> Any:
            node_id = said["scheduling_strategy"].node_id
            assert said["lifetime"] == "detached"
            named = said["namespace"], said["name"]
            return types.SimpleNamespace(remote=partial(self._create, role, node_id, named))

        return types.SimpleNamespace(options=options)

    def kill(self, handle: SimActor, **_: Any) -> None:
        handle.sim_is_final = True
        self.end(handle)

    def start(self, actor: SimActor, host: str, make: Callable[[], Any], after_s: float) -> None:
        """Bring an actor's process up; `make` builds its body there, blocking or not."""

        async def come_up() -> None:
            await asyncio.sleep(after_s)
            body = await self._body(make)
            actor.sim_body, actor.sim_was_up = body, True
            self.log(f"{actor.sim_name} is up")

        process = Process(actor.sim_name, host)
        actor.sim_process, actor.sim_body = process, None
        self._makers[actor.sim_name] = make
        task = self.loop.spawn(process, come_up(), f"start {actor.sim_name}")
        task.add_done_callback(partial(self._came_up, actor, process))

    def end(self, actor: SimActor) -> None:
        """Kill an actor's process, as SIGKILL does."""
        process = actor.sim_process
        if process is None or process.is_dead:
            return
        self.loop.kill(process)
        self.network.reset(process)
        actor.sim_body = None
        actor.sim_lost()

    def crash(self, actor: SimActor) -> None:
        """Kill it; Ray starts it again behind the same handle."""
        if actor.sim_process is None or actor.sim_process.is_dead:
            return
        host = actor.sim_process.host
        self.end(actor)
        self._restart(actor, host)

    def power_off(self, host: str) -> None:
        """The node is gone, its actors for good: who is asked for them hears so."""
        self.network.host(host).has_power = False
        for actor in [a for a in self.actors if a.sim_process and a.sim_process.host == host]:
            actor.sim_is_final = True
            self.end(actor)

    def power_on(self, host: str) -> None:
        self.network.host(host).has_power = True
        self.add_node(host)

    def add_node(self, host: str) -> None:
        """A node has started on a host; it never had that id before."""
        self._num_nodes += 1
        self.node_ids[host] = f"{self._num_nodes:056x}"

    def _restart(self, actor: SimActor, host: str) -> None:
        if not actor.sim_is_final:
            self.start(actor, host, self._makers[actor.sim_name], RESTART_S)

    def _came_up(self, actor: SimActor, process: Process, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        self.log(f"{actor.sim_name} does not start: {task.exception()}")
        if not process.is_dead:
            self.end(actor)
            self._restart(actor, process.host)

    async def _body(self, make: Callable[[], Any]) -> Any:
        if inspect.iscoroutinefunction(make):
            return await make()
        return await asyncio.to_thread(make)

    def named_actors(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        """As ray.util.list_named_actors: those that are not gone for good."""
        assert all_namespaces
        return [
            {"namespace": namespace, "name": name}
            for (namespace, name), actor in self.named.items()
            if not actor.sim_is_final
        ]

    def get_actor(self, name: str, namespace: str) -> SimActor:
        """As ray.get_actor."""
        actor = self.named.get((namespace, name))
        if actor is None or actor.sim_is_final:
            raise ValueError(f"no actor is named {name}")
        return actor

    def _create(
        self, role: str, node_id: str, named: tuple[str, str], store: str, *args: Any, **said: Any
    ) -> SimActor:
        self._num_actors += 1
        actor = SimActor(self.network, f"{role}-actor-{self._num_actors}")
        self.actors.append(actor)
        self.named[named] = actor
        host = next((h for h, n in self.node_ids.items() if n == node_id), None)
        if host is None or not self.network.host(host).has_power:
            actor.sim_is_final = True
            return actor
        kind = StoreBody if role == "store" else NdpBody
        keys = args[0] if args else said.get("keys")
        make = partial(kind, self, actor.sim_name, host, node_id, store, keys, said["directory"])
        self.start(actor, host, make, START_S)
        return actor


class StoreBody:
    """`StoreActor` without Ray's objects: a segment that is served and announced."""

    def __init__(
        self,
        ray: SimRay,
        name: str,
        host: str,
        node_id: str,
        store: str,
        keys: Sequence[Any] | None,
        directory: Any,
    ) -> None:
        segment = self.segment = Segment(ray.store_on(host, store), keys)
        self._holder = Holder(
            segment,
            "records",
            partial(RecordServer, segment),
            tcp_address=f"{host}:0",
            name=name,
            node_id=node_id,
            directory=directory,
        )

    def describe(self) -> HolderStatus:
        return self._holder.status

    def know(self, listings: Sequence[Listing]) -> None:
        self._holder.know(listings)

    async def stop(self) -> None:
        await asyncio.to_thread(self._holder.close)


class NdpBody(StoreBody):
    """`NdpActor` likewise."""

    def __init__(
        self,
        ray: SimRay,
        name: str,
        host: str,
        node_id: str,
        store: str,
        keys: Sequence[Any] | None,
        directory: Any,
    ) -> None:
        segment = self.segment = Segment(ray.store_on(host, store), keys)
        executor = Executor(segment)
        segment.watch(executor.forget)
        self._holder = Holder(
            segment,
            "near_data",
            partial(NdpServer, executor),
            tcp_address=f"{host}:0",
            name=name,
            node_id=node_id,
            directory=directory,
        )


class SimServe:
    """Serve's router over the replicas of one deployment."""

    def __init__(self, ray: SimRay, max_queued: int) -> None:
        self.ray = ray
        self.replicas: list[SimActor] = []
        self.ill: list[str] = []
        self.num_queued = 0
        self.most_queued = 0
        self.max_queued = max_queued

    def options(self, **_: Any) -> SimServe:
        return self

    @property
    def generate(self) -> Any:
        return types.SimpleNamespace(remote=lambda request: _Routed(self, request))

    def pick(self) -> SimActor | None:
        """The replica with the fewest calls, if one has room."""
        ready = [r for r in self.replicas if r.sim_body is not None]
        calls = [sum(call.is_stream for call in replica.sim_calls) for replica in ready]
        if not ready or min(calls) >= MAX_ONGOING:
            return None
        return ready[calls.index(min(calls))]

    async def look_after(self) -> None:
        """Serve's controller: who says it is ill is replaced."""
        while True:
            await asyncio.sleep(HEALTH_S)
            for replica in self.replicas:
                if replica.sim_body is not None:
                    try:
                        replica.sim_body.check_health()
                    except RuntimeError as error:
                        self.ray.log(f"{replica.sim_name} is ill: {error}")
                        self.ill.append(f"{replica.sim_name}: {error}")
                        self.ray.crash(replica)

    def start(self, name: str, host: str, make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        replica = SimActor(self.ray.network, name)
        self.replicas.append(replica)
        self.ray.start(replica, host, make, START_S)


class _Routed:
    """One streaming call through the router."""

    def __init__(self, serve: SimServe, request: Any) -> None:
        self._serve, self._request = serve, request
        self._inner: SimResponse | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        replica = self._serve.pick()
        if replica is None:
            if self._serve.num_queued >= self._serve.max_queued:
                raise BackPressureError(self._serve.num_queued, self._serve.max_queued)
            replica = await self._queue()
        self._inner = replica.generate.remote(self._request)
        self._inner.is_stream = True
        async for item in self._inner:
            yield item

    def cancel(self) -> None:
        if self._inner is not None:
            self._inner.cancel()

    async def _queue(self) -> SimActor:
        self._serve.num_queued += 1
        self._serve.most_queued = max(self._serve.most_queued, self._serve.num_queued)
        try:
            while (replica := self._serve.pick()) is None:
                await asyncio.sleep(POLL_S)
            return replica
        finally:
            self._serve.num_queued -= 1
