"""What the faults of a plan do to the simulated cluster, and how each is undone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from expert_store.errors import DirectoryError
from expert_store.listing import Listing
from tests.memory_directory import MemoryDirectory
from tests.sim.clockwork import VirtualLoop, current_process
from tests.sim.fault_plan import Fault
from tests.sim.network import Network

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

REDIS_TIMEOUT_S = 1.0


class SimRedis:
    """The one Redis, on the head. It comes back empty."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.loop: VirtualLoop = network.loop
        self.is_away = False
        self.kept = MemoryDirectory(clock=network.loop.time)

    def client(self, url: str, **_: object) -> RedisClient:
        return RedisClient(self)

    def leave(self) -> None:
        self.is_away = True

    def come_back(self) -> None:
        self.is_away = False
        self.kept = MemoryDirectory(clock=self.loop.time)


class RedisClient:
    """`RedisDirectory` of one process. Its calls block for a while when Redis is not there."""

    def __init__(self, redis: SimRedis) -> None:
        self._redis = redis

    def announce(self, listing: Listing) -> None:
        self._reach()
        self._redis.kept.announce(listing)

    def withdraw(self, name: str) -> None:
        self._reach()
        self._redis.kept.withdraw(name)

    def listings(self) -> tuple[Listing, ...]:
        self._reach()
        return self._redis.kept.listings()

    def close(self) -> None:
        """Nothing is held."""

    def _reach(self) -> None:
        redis, process = self._redis, current_process(self._redis.loop)
        assert process is not None
        if redis.is_away or not redis.network.is_open(process.host, "head"):
            if redis.loop.current is not None:
                redis.loop.sleep(REDIS_TIMEOUT_S)
            raise DirectoryError("Redis at head did not answer: connection refused (simulated)")


def schedule(simulation: Simulation, fault: Fault, start_s: float) -> None:
    """Let a fault happen at its time, and end at its own."""
    loop = simulation.loop

    def begin() -> None:
        simulation.log(f"fault: {fault}")
        undo = _begin(simulation, fault)
        if undo is not None:
            loop.call_later(fault.for_s, end, undo)

    def end(undo: Callable[[], None]) -> None:
        simulation.log(f"over: {fault}")
        undo()

    loop.call_at(start_s + fault.at_s, begin)


def _begin(simulation: Simulation, fault: Fault) -> Callable[[], None] | None:
    network, ray = simulation.network, simulation.ray
    match fault.kind:
        case "crash_store" | "crash_near_data":
            _crash(simulation, fault.host, "store" if fault.kind == "crash_store" else "ndp")
        case "crash_worker":
            for replica in simulation.serve.replicas:
                if replica.sim_process and replica.sim_process.host == fault.host:
                    ray.crash(replica)
        case "crash_manager":
            # The tier actors live on: they are detached.
            ray.crash(simulation.manager)
        case "power_off":
            if not network.host(fault.host).has_power:
                return None
            ray.power_off(fault.host)
            return lambda: ray.power_on(fault.host)
        case "slow":
            # Two such faults may overlap, and end in any order.
            delays = network.host(fault.host).delays_s
            delays.append(fault.amount)
            return lambda: delays.remove(fault.amount)
        case "cut" | "no_heartbeat":
            link = frozenset((fault.host, fault.peer or "head"))
            if link in network.cut:
                return None
            network.cut.add(link)
            return lambda: network.cut.discard(link)
        case "corrupt":
            damage(simulation, fault)
            _crash(simulation, fault.host, "store")
            _crash(simulation, fault.host, "ndp")
        case "redis_away":
            simulation.redis.leave()
            return simulation.redis.come_back
    return None


def _crash(simulation: Simulation, host: str, role: str) -> None:
    for actor in simulation.ray.actors:
        is_there = actor.sim_process is not None and actor.sim_process.host == host
        if is_there and actor.sim_name.startswith(role):
            simulation.ray.crash(actor)


def damage(simulation: Simulation, fault: Fault) -> None:
    """Spoil a record in this host's copy of the store.

    Who has the file mapped keeps the pages it has; who opens it again reads the damage.
    """
    kind, layer, expert = fault.record
    held = [
        record
        for _, info in sorted(simulation.assets.manifest.experts.items())
        if (record := info.codes if kind == "codes" else info.factors)
    ]
    record = held[(4 * layer + expert) % len(held)]
    folder = simulation.own_store(fault.host)
    path = folder / record.file
    data = bytearray(path.read_bytes())
    for index in range(record.offset, record.offset + record.num_bytes):
        data[index] ^= 0x2D
    path.unlink()
    path.write_bytes(data)


def link_store(source: Path, target: Path) -> None:
    """A folder of links to the files of a store."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            there = target / path.relative_to(source)
            there.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, there)
