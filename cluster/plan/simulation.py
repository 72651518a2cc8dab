"""A simulated cluster: GPU workers that decode or take in a prompt, memory nodes, links between.

Seeded: the same system and routing give the same figures. Time is simulated, decisions are real
(`cluster/plan/worker.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.plan.events import Events, Machine, Server
from cluster.plan.routing import RoutingSource
from cluster.plan.system import System
from cluster.plan.worker import SimulatedWorker


@dataclass(frozen=True, slots=True)
class Busy:
    """Shares of the measured time, 0 to 1, in which each kind of server was busy; the busiest one
    of its kind, and all of them on average."""

    gpu: float
    gpu_link: float
    node_link: float
    node_worker: float
    mean_node_link: float
    mean_node_worker: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a simulated cluster did while it was measured.

    Bytes are per token of a whole step: into a GPU worker (copies and answers) and out of it.
    """

    tokens_per_s: float  # of all workers together
    step_s: float  # of one worker, a whole step
    gpu_in_bytes: float
    gpu_out_bytes: float
    hit_rate: float  # of the records that a plan needed on the device
    near_share: float  # of the (token, expert) pairs
    busy: Busy


class _Cluster:
    """The machines and their workers; one measurement."""

    def __init__(self, system: System, routings: Sequence[RoutingSource]) -> None:
        assert len(routings) == system.num_gpus, "each worker has its own routing"
        self.system = system
        self.events = Events()
        self.gpus = [Machine() for _ in range(system.num_gpus)]
        self.nodes = [Machine() for _ in range(system.num_nodes)]
        self.workers = [
            SimulatedWorker(
                system,
                self.events,
                gpu,
                self.nodes,
                routing,
                self._on_step,
                first_layer=index % len(system.layers),
            )
            for index, (gpu, routing) in enumerate(zip(self.gpus, routings, strict=True))
        ]
        self._routings = routings
        self.begun_s: float | None = None
        self._warm_up = self._steps = 0

    def run(self, *, warm_up: int, steps: int) -> None:
        """Until the first worker has done `steps` after the last has done `warm_up`."""
        self._warm_up, self._steps = warm_up, steps
        if warm_up == 0:
            self._begin(0.0)
        for worker in self.workers:
            worker.start()
        self.events.run()

    def _on_step(self, worker: SimulatedWorker, now_s: float) -> None:
        if self.begun_s is None:
            if min(each.steps_done for each in self.workers) >= self._warm_up:
                self._begin(now_s)
        elif worker.steps_done - self._steps_at_begin[id(worker)] >= self._steps:
            self.events.stop()

    def _begin(self, now_s: float) -> None:
        self.begun_s = now_s
        self._steps_at_begin = {id(worker): worker.steps_done for worker in self.workers}
        for worker in self.workers:
            worker.reset_counts()
        for machine in (*self.gpus, *self.nodes):
            for server in machine.servers():
                server.reset()

    def result(self, tokens_per_step: int) -> Simulated:
        assert self.begun_s is not None, "the simulation ended before it was warm"
        system = self.system
        seconds = self.events.now_s - self.begun_s
        layers = sum(worker.layers_done for worker in self.workers)
        steps = layers / len(system.layers) / system.layer_scale
        tokens = steps * tokens_per_step
        needed = sum(w.num_hits + w.num_copies for w in self.workers)
        pairs = sum(worker.num_pairs for worker in self.workers)
        return Simulated(
            tokens_per_s=tokens / seconds,
            step_s=seconds * system.num_gpus / steps,
            gpu_in_bytes=sum(gpu.into.num_bytes for gpu in self.gpus) / tokens,
            gpu_out_bytes=sum(gpu.out.num_bytes for gpu in self.gpus) / tokens,
            hit_rate=sum(w.num_hits for w in self.workers) / needed if needed else 0.0,
            near_share=sum(w.num_near_pairs for w in self.workers) / pairs,
            busy=self._busy(seconds),
        )

    def _busy(self, seconds: float) -> Busy:
        def shares(servers: Sequence[Server]) -> tuple[float, float]:
            # What was taken on just before the end is not done yet.
            each = [min(1.0, server.busy_s / seconds) for server in servers]
            return max(each), sum(each) / len(each)

        gpu, _ = shares([machine.compute for machine in self.gpus])
        gpu_link, _ = shares([s for m in self.gpus for s in (m.out, m.into)])
        node_link, mean_link = shares([machine.out for machine in self.nodes])
        node_worker, mean_worker = shares([machine.compute for machine in self.nodes])
        return Busy(gpu, gpu_link, node_link, node_worker, mean_link, mean_worker)


def simulate_decode(
    system: System, routings: Sequence[RoutingSource], *, batch: int, warm_up: int, steps: int
) -> Simulated:
    """All workers decode `batch` tokens a step; measured for `steps` steps after `warm_up`."""
    cluster = _Cluster(system, routings)
    cluster.run(warm_up=warm_up, steps=steps)
    return cluster.result(batch)


def simulate_steps(system: System, routing: RoutingSource, num_steps: int) -> list[float]:
    """Seconds of each of the first steps of a lone worker, of the layers that are simulated."""
    cluster = _Cluster(system, [routing])
    ends = [0.0]

    def on_step(worker: SimulatedWorker, now_s: float) -> None:
        ends.append(now_s)
        if worker.steps_done >= num_steps:
            cluster.events.stop()

    cluster.workers[0].on_step = on_step
    cluster.workers[0].start()
    cluster.events.run()
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
