"""One run: the whole cluster in this process, on virtual time, under one plan.

Real: everything in the rooms but Ray, Redis' client, sockets, threads and clocks. After every step
of an engine its books are checked; at the end the answers are.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import types
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray as real_ray
from ray import serve as real_serve

import cluster.ray_launcher as ray_launcher
import cluster.tier_link as tier_link
import expert_store.holder as holder
import expert_store.rpc as records_rpc
import gpu_worker.actor as worker_actor
import gpu_worker.build as build
from cluster.ingress import RemoteTiers, RoutedWorker
from cluster.openai_errors import ApiError
from cluster.orchestrator import TierManager
from cluster.ray_launcher import TierSettings
from cluster.routes import create_app
from cluster.settings import DirectorySettings, HttpSettings, NdpSettings, StoreSettings
from cluster.snapshot import IngressStats
from expert_store.segment import Segment
from expert_store.types import RecordRequest
from gpu_worker.actor import GpuWorker, WorkerSettings
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine, StepOutput
from gpu_worker.experts import StoreExperts
from gpu_worker.model import ModelRunner, bind_experts
from gpu_worker.router_guess import RouterGuess
from tests.sim.assets import MAX_CONTEXT, PROMPTS, Assets
from tests.sim.breaking import SimRedis, link_store, schedule
from tests.sim.client import Answer, send
from tests.sim.clockwork import (
    PROCESS,
    START_S,
    Process,
    Stuck,
    VirtualLoop,
    current_process,
)
from tests.sim.cluster_ray import SimRay, SimServe
from tests.sim.fault_plan import GPU_HOSTS, HEALED_S, MEMORY_HOSTS, Ask, Plan
from tests.sim.handles import SimActor
from tests.sim.network import Network
from tests.sim.stand_ins import StandIns

# What a worker would load while it starts: in a run that is too late for the stand-ins.
for _name in ("build", "service", *(["warm_up"] if find_spec("gpu_worker.warm_up") else [])):
    import_module(f"gpu_worker.{_name}")

STEP_S = 0.02
"""Virtual seconds that a step computes."""
REQUEST_TIMEOUT_S = 20.0
MAX_WAITING = 2
UP_S = 30.0
REPAIRED_S = 30.0
"""A record found damaged by the last request of all is repaired by then."""
SETTLED_S = 22.0
"""After the last fault's end everything has been started again, announced and followed."""
PROBE_S = 15.0
NUM_TIERS = 4
SHUTDOWN_S = 30.0


class SimEngine(Engine):
    """The engine; a step takes time, and its books are checked after it."""

    def __init__(self, simulation: Simulation, experts: StoreExperts, *args: Any, **said: Any):
        super().__init__(*args, **said)
        self.simulation, self.experts = simulation, experts

    def step(self) -> StepOutput:
        self.simulation.loop.sleep(STEP_S)
        output = super().step()
        self.check_integrity()
        self.experts.check_integrity()
        self.simulation.num_steps += 1
        return output


class SimGpuWorker(GpuWorker):
    """Serve awaits its `__del__`; nobody does that for one that is killed."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class SimTierManager(TierManager):
    def __del__(self) -> None:  # type: ignore[override]
        pass


class Simulation:
    """The cluster of one plan. `run` gives the answers; `events` is the log."""

    def __init__(self, plan: Plan, assets: Assets) -> None:
        self.plan, self.assets = plan, assets
        self.loop = VirtualLoop()
        self.network = Network(self.loop)
        self.ray = SimRay(self.network, self.store_on)
        self.ray.log = self.log
        self.redis = SimRedis(self.network)
        self.serve = SimServe(self.ray, max_queued=8)
        self.manager = SimActor(self.network, "manager", is_served=True)
        self.events: list[str] = []
        self.answers: list[Answer] = []
        self.probes: list[Answer] = []
        self.problems: list[str] = []
        self.engines: list[SimEngine] = []
        self.num_steps = 0
        self._own: dict[str, Path] = {}
        self._folder: Path | None = None
        self._apps: list[Any] = []

    def log(self, text: str) -> None:
        self.events.append(f"{self.loop.time() - START_S:9.4f}  {text}")

    def store_on(self, host: str, path: str) -> Path:
        return self._own.get(host, Path(path))

    def own_store(self, host: str) -> Path:
        """This host's own copy of the store, to be damaged."""
        if host not in self._own:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="moetier-sim-"))
            link_store(self.assets.store, self._folder / host)
            self._own[host] = self._folder / host
        return self._own[host]

    def run(self) -> None:
        """Play the plan to its end. Raises Stuck; what else was wrong is in `problems`."""
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with StandIns(self.loop).installed(self._stand_ins()):
                self.loop.run_until_complete(self._play())
                self._end_all()
            for error in self.loop.failures:
                self.problems.append(f"a thread or a task died: {error!r}")
        finally:
            logging.disable(level)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _stand_ins(self) -> dict[int, Any]:
        sim_serve = types.SimpleNamespace(
            get_replica_context=self._context, exceptions=real_serve.exceptions
        )
        sim_ray = types.SimpleNamespace(
            kill=self.ray.kill,
            exceptions=real_ray.exceptions,
            nodes=self.ray.live_nodes,
            get_actor=self.ray.get_actor,
            util=types.SimpleNamespace(list_named_actors=self.ray.named_actors),
        )
        return {
            id(real_ray): sim_ray,
            id(real_serve): sim_serve,
            id(ray_launcher.StoreActor): self.ray.actor_class("store"),
            id(ray_launcher.NdpActor): self.ray.actor_class("ndp"),
            id(ray_launcher.live_nodes): self.ray.live_nodes,
            id(tier_link.RedisDirectory): self.redis.client,
            id(tier_link.client_number): self._client_number,
            id(holder.SocketFolder): self.network.socket_folder,
            id(records_rpc.start_server): self.network.start_server,
            id(records_rpc.open_channel): self.network.open_channel,
            id(build.build_engine): self._build_engine,
            id(worker_actor._load_libraries): lambda: None,
        }

    async def _play(self) -> None:
        for host in MEMORY_HOSTS:
            self.ray.add_node(host)
        for host in ("head", *GPU_HOSTS, *MEMORY_HOSTS):
            self.network.host(host)
        self.ray.start(self.manager, "head", self._make_manager, 0.0)
        for host in GPU_HOSTS:
            self.serve.start(f"worker-{host}", host, partial(self._make_worker))
        self._make_ingresses()
        await self._until_up()
        looking = self.loop.create_task(self.serve.look_after())
        start_s = self.loop.time()
        self.log("the cluster is up")
        for fault in self.plan.faults:
            schedule(self, fault, start_s)
        asking = [
            self.loop.create_task(self._ask(ask, start_s, self.answers)) for ask in self.plan.asks
        ]
        await asyncio.sleep(HEALED_S)
        await self._wait(asking, REQUEST_TIMEOUT_S + 5)
        await asyncio.sleep(max(0.0, start_s + HEALED_S + SETTLED_S - self.loop.time()))
        await self._probe()
        await self._check_tiers()
        looking.cancel()
        self._check_idle()
        await self._check_repairs()
        await self._shut_down()

    async def _until_up(self) -> None:
        """Both workers answer."""
        end_s = self.loop.time() + UP_S
        while any(replica.sim_body is None for replica in self.serve.replicas):
            if self.loop.time() > end_s:
                raise Stuck(f"the cluster does not come up: {self.events}")
            await asyncio.sleep(0.1)

    async def _ask(self, ask: Ask, start_s: float, answers: list[Answer]) -> None:
        await asyncio.sleep(max(0.0, start_s + ask.at_s - self.loop.time()))
        answer = Answer(ask, self.loop.time())
        answers.append(answer)
        prompt = PROMPTS[ask.prompt]
        self.log(f"request: prompt {ask.prompt} to ingress {ask.ingress}, stream {ask.stream}")
        app, process = self._apps[ask.ingress]
        body = prompt.body(self.assets.manifest.model.name, stream=ask.stream)
        await self.loop.spawn(process, send(app, body, answer), "request")
        took_s = self.loop.time() - answer.began_s
        self.log(
            f"answer: prompt {ask.prompt}, {answer.status}, {answer.body[-160:]!r}, {took_s:.3f} s"
        )

    async def _wait(self, tasks: list[asyncio.Task[None]], timeout_s: float) -> None:
        _, pending = await asyncio.wait(tasks, timeout=timeout_s)
        for task in pending:
            self.problems.append("a request did not end by its deadline")
            task.cancel()

    async def _probe(self) -> None:
        """All is healed: one request to each ingress."""
        start_s = self.loop.time()
        asks = [
            Ask(0.1 * i, (self.plan.seed + i) % len(PROMPTS), i % 2, i % 2 == 1) for i in range(2)
        ]
        self.log("all is healed")
        asking = [self.loop.create_task(self._ask(ask, start_s, self.probes)) for ask in asks]
        await self._wait(asking, PROBE_S)

    async def _check_tiers(self) -> None:
        """The tier manager has everything running again."""
        asking = RemoteTiers(self.manager, 1).snapshot(IngressStats("simulated client"))
        try:
            snapshot = await self.loop.spawn(self._apps[0][1], asking, "snapshot")
        except ApiError as error:
            self.problems.append(f"no snapshot when all is healed: {error}")
            return
        self.problems += [f"when healed: {problem}" for problem in snapshot.problems]
        for what, number, expected in (
            ("tiers", len(snapshot.tiers), NUM_TIERS),
            ("workers", len(snapshot.workers), len(GPU_HOSTS)),
        ):
            if number < expected:
                self.problems.append(f"when healed: {number} {what} report, expected {expected}")

    def _check_idle(self) -> None:
        """Nobody holds anything any more, and nobody's engine has ever died of itself."""
        self.problems += self.serve.ill
        for engine in self.engines:
            host = engine.process  # type: ignore[attr-defined]
            if host.is_dead:
                continue
            try:
                engine.check_integrity()
                engine.experts.check_integrity()
            except AssertionError as error:
                self.problems.append(f"books of {host}: {error}")
            if engine.has_work:
                self.problems.append(f"{host} holds sequences that nobody waits for")
            if held := engine.experts.streamer.in_flight_bytes:
                self.problems.append(f"{host} holds {held} bytes in flight")
        for listener in self.network.listeners.values():
            if listener.most_calls > listener.max_calls:
                self.problems.append(f"{listener.process}: {listener.most_calls} calls at once")

    async def _check_repairs(self) -> None:
        """Whatever is damaged on one host is repaired from the other, where that is sound."""
        end_s = self.loop.time() + REPAIRED_S
        while (problems := list(self._unrepaired())) and self.loop.time() < end_s:
            await asyncio.sleep(1.0)
        self.problems += problems

    def _unrepaired(self) -> Iterator[str]:
        for actor in self.ray.actors:
            if actor.sim_process is None or actor.sim_body is None:
                continue
            host = actor.sim_process.host
            others = {self.store_on(h, str(self.assets.store)) for h in MEMORY_HOSTS if h != host}
            for key, kind in actor.sim_body.segment.quarantined:
                if any(Segment(store).recheck(RecordRequest(key, kind)) for store in others):
                    yield f"{host} has not repaired the {kind} of {key}"

    async def _shut_down(self) -> None:
        """As Serve does: workers first, then the tiers. It comes to an end."""

        async def end(body: Any, kind: type) -> None:
            await kind.__del__(body)

        try:
            async with asyncio.timeout(SHUTDOWN_S):
                for replica in self.serve.replicas:
                    if replica.sim_body is not None:
                        await self.loop.spawn(
                            replica.sim_process, end(replica.sim_body, GpuWorker), "shut down"
                        )
                if self.manager.sim_body is not None:
                    await self.loop.spawn(
                        self.manager.sim_process, end(self.manager.sim_body, TierManager), "shut"
                    )
        except TimeoutError:
            self.problems.append(f"the cluster was not shut down within {SHUTDOWN_S:g} s")

    def _end_all(self) -> None:
        """Kill what is left, so that no thread outlives the run."""
        processes = {
            p
            for actor in (*self.ray.actors, *self.serve.replicas, self.manager)
            if (p := actor.sim_process) is not None
        }
        processes |= {process for _, process in self._apps}
        for process in sorted(processes, key=lambda p: p.name):
            self.loop.kill(process)
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        with suppress(Stuck):
            self.loop.run_until_complete(
                asyncio.wait(tasks, timeout=60) if tasks else asyncio.sleep(1)
            )
        self.loop.close()

    async def _make_manager(self) -> SimTierManager:
        settings = TierSettings(
            store=StoreSettings(
                path=str(self.assets.store), replicas=2, transport="grpc", start_timeout_s=6.0
            ),
            ndp=NdpSettings(enabled=True, replicas=2, num_threads=1),
            directory=DirectorySettings("redis", "redis://head:6379/0"),
        )
        manager = SimTierManager.__new__(SimTierManager)
        begun: Any = manager.__init__(settings)  # type: ignore[misc]
        if begun is not None:
            await begun
        if hasattr(manager, "reconfigure"):
            await manager.reconfigure({"store": str(self.assets.store)})
        return manager

    async def _make_worker(self) -> SimGpuWorker:
        plan = self.plan
        store = str(self.assets.store)
        settings = partial(
            WorkerSettings,
            config=WorkerConfig(
                near_data=plan.near_data,  # type: ignore[arg-type]
                cache_bytes=plan.cache_bytes,
                prefetch=plan.prefetch,  # type: ignore[arg-type]
                max_in_flight_bytes=60_000,
                max_sequences=2,
                max_context=MAX_CONTEXT,
                prefill_chunk=8,
                device="cpu",
                dtype="float32",
            ),
            max_waiting=MAX_WAITING,
        )
        connect = partial(
            tier_link.connect,
            transport="grpc",
            compression=plan.compression,  # type: ignore[arg-type]
            directory=tier_link.open_directory(DirectorySettings("redis", "redis://head:6379/0")),
        )
        worker = SimGpuWorker.__new__(SimGpuWorker)
        if hasattr(worker, "reconfigure"):  # Serve's user_config names the store
            worker.__init__(settings(), self.manager, connect)  # type: ignore[misc]
            await worker.reconfigure({"store": store})
        else:
            told = settings(store=store)
            await worker.__init__(told, self.manager, partial(connect, store=store))  # type: ignore[misc]
        return worker

    def _context(self) -> Any:
        process = current_process(self.loop)
        assert process is not None
        return types.SimpleNamespace(
            replica_id=types.SimpleNamespace(unique_id=process.name), app_name="simulated"
        )

    def _client_number(self) -> int:
        """Of the simulated process, not of the one that simulates: a seed replays anywhere."""
        process = current_process(self.loop)
        assert process is not None
        return zlib.crc32(process.name.encode())

    def _make_ingresses(self) -> None:
        settings = HttpSettings(request_timeout_s=REQUEST_TIMEOUT_S)
        for index in range(2):
            process = Process(f"ingress-{index}", "head")
            token = PROCESS.set(process)
            app = create_app(
                RoutedWorker(self.serve, self.manager),
                RemoteTiers(self.manager, settings.retry_after_s),
                settings,
                replica=process.name,
            )
            PROCESS.reset(token)
            self._apps.append((app, process))

    def _build_engine(
        self,
        store: Path,
        source: Any,
        near_data: Any,
        config: WorkerConfig,
        *,
        max_waiting: int,
        **_: Any,
    ) -> SimEngine:
        """`build_engine`, with the model that was loaded once instead of from the disk."""
        process = current_process(self.loop)
        assert process is not None
        config = config.resolve(source.manifest)
        experts = StoreExperts(source, config, near_data, clock=self.loop.time)
        model = self.assets.models[process.host]
        bind_experts(model, experts)
        experts.predict_with(RouterGuess.of(model, source.manifest.model.top_k))
        engine = SimEngine(
            self,
            experts,
            ModelRunner(model, experts),
            self.assets.tokenizer,
            max_sequences=config.max_sequences,
            max_context=MAX_CONTEXT,
            prefill_chunk=config.prefill_chunk,
            max_waiting=max_waiting,
            on_close=experts.close,
            clock=self.loop.time,
        )
        engine.process = process  # type: ignore[attr-defined]
        self.engines.append(engine)
        return engine
