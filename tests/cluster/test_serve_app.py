"""Goal: the composition holds every promise of the config, and lost replicas become events.

Method: the application is built as Serve would build it and its deployments are read, without Ray;
the ingress' adapters run over handles of this process that fail as Serve's do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hand_store import build_store
from ray import cloudpickle
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.build_app import build_app
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

import cluster.app
from cluster import autoscaling
from cluster.app import build, num_gpus
from cluster.attempts import Attempts, Count
from cluster.autoscaling_rules import Targets, Worker
from cluster.config import ClusterConfig, config_from_mapping
from cluster.ingress import QUEUE_FULL, RemoteTiers, RoutedWorker
from cluster.openai_errors import ApiError
from cluster.snapshot import IngressStats
from gpu_worker.actor import GpuWorker
from gpu_worker.load_rates import LoadRates
from gpu_worker.messages import (
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ModelDescription,
    Piece,
    WorkerStats,
)
from gpu_worker.sequence import SamplingParams

ARGS: dict[str, Any] = {
    "store": {"path": "/s"},
    "worker": {"max_sequences": 3, "device": "cpu"},
    "replicas": {"max_waiting": 5, "num_cpus": 2, "label": "a=b"},
    "http": {"replicas": 2, "max_queued": 7},
}


def deployments(args: dict[str, Any]) -> dict[str, Any]:
    return {each.name: each for each in build_app(build(args), name="test").deployments}


def test_deployments_follow_the_config() -> None:
    built = deployments(ARGS)
    assert set(built) == {"Ingress", "GpuWorker", "TierManager"}
    worker = built["GpuWorker"]
    assert worker.ray_actor_options["num_cpus"] == 2
    assert worker.ray_actor_options["label_selector"] == {"a": "b"}
    assert worker.num_replicas == 1
    assert worker.max_ongoing_requests == 3 + 5, "what the engine takes"
    assert worker.max_queued_requests == 7
    assert built["Ingress"].num_replicas == 2
    assert built["TierManager"].num_replicas == 1
    for name in ("Ingress", "TierManager"):
        assert built[name].ray_actor_options["num_cpus"] == 0


def test_a_worker_is_drained_while_the_others_still_stand_and_its_hold_lasts() -> None:
    timeouts = {
        name: each._deployment_config.graceful_shutdown_timeout_s
        for name, each in deployments(ARGS).items()
    }
    assert timeouts["GpuWorker"] < min(timeouts["Ingress"], timeouts["TierManager"])
    assert timeouts["GpuWorker"] == 15


def test_holds_overlap_and_are_let_go_when_the_worker_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def at_once(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    sleep, pauses = asyncio.sleep, list[float]()
    monkeypatch.setattr("gpu_worker.actor.asyncio.sleep", at_once)
    calls: list[Hold] = []

    def hold(seconds: float) -> Hold:
        calls.append(Hold(seconds))
        return calls[-1]

    async def work() -> None:
        settings = SimpleNamespace(drain_s=30)
        worker: Any = SimpleNamespace(_tiers=Handle(hold=hold), _settings=settings)
        holding = asyncio.create_task(GpuWorker._hold(worker))
        while len(calls) < 3:
            await sleep(0)
        assert not any(call.cancelled for call in calls)
        holding.cancel()
        await asyncio.wait({holding})

    asyncio.run(work())
    # The last one began at most `HOLD_AGAIN_S` before the drain: it is open all the while.
    assert all(call.cancelled and call.seconds == 30 + 5 for call in calls)
    assert set(pauses) == {5}


class Hold:
    """A call that is open until it is cancelled."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, None]:
        yield from asyncio.Event().wait().__await__()

    def cancel(self) -> None:
        self.cancelled = True


def test_autoscaling_is_our_policy_with_its_targets() -> None:
    scaled = {"max_replicas": 3, "targets": {"sequences_per_replica": 4}}
    args = {**ARGS, "replicas": {"autoscaling": scaled}}
    config = deployments(args)["GpuWorker"]._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (1, 3)
    policy = autoscaling.GpuWorkerPolicy(**config.policy.policy_kwargs)
    assert policy.settings.targets == Targets(sequences_per_replica=4)
    assert policy.settings.worker == Worker(slots=3, prefill_chunk=256)
    # The policy has delays of its own; Serve's would come on top.
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0, 0)


def test_a_worker_reports_under_the_names_that_the_policy_reads() -> None:
    snapshots = [WorkerStats("r", 1, 2, 3), WorkerStats("r", 1, 2, 3, steps=4, busy_s=1.0)]
    worker: Any = SimpleNamespace(
        _service=SimpleNamespace(load=lambda: snapshots.pop(0)), _rates=LoadRates(), _store="/s"
    )
    first = GpuWorker.record_autoscaling_stats(worker)
    assert first == {
        autoscaling.RUNNING_SEQUENCES: 1,
        autoscaling.WAITING_SEQUENCES: 2,
        autoscaling.WAITING_TOKENS: 3,
    }
    names = {
        getattr(autoscaling, name)
        for name in ("ARRIVALS", "PROMPT_TOKENS", "ANSWER_TOKENS", "STEPS", "BUSY_SHARE")
    }
    later = worker._rates.gauges(snapshots[0], time.monotonic() + 10)
    assert set(later) == {*first, *names, autoscaling.WAIT_SHARE}


def test_what_is_bound_can_be_sent_to_a_replica() -> None:
    for each in deployments(ARGS).values():
        cloudpickle.loads(cloudpickle.dumps(each.init_args[:1]))


@pytest.mark.parametrize(
    ("worker", "replicas", "expected"),
    [
        ({"device": "cpu"}, {}, 0),
        ({"device": "cuda"}, {}, 1),
        ({"device": "cuda"}, {"num_gpus": 0.5}, 0.5),
        ({}, {}, 0),
    ],
)
def test_gpus_that_are_set_aside(worker: Any, replicas: Any, expected: float) -> None:
    config = config_from_mapping({"worker": worker, "replicas": replicas}, source="test")
    assert num_gpus(config) == expected


def test_args_may_name_a_file_and_mistakes_name_the_field(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("store: {path: /s}\nhttp: {replicas: 3}\n")
    assert deployments({"config_path": str(file)})["Ingress"].num_replicas == 3
    with pytest.raises(ValueError, match="config_path alone"):
        build({"config_path": str(file), "http": {}})
    with pytest.raises(ValueError, match="args: store.pth: unknown field; did you mean 'path'"):
        build({"store": {"pth": "/s"}})


def test_a_store_that_can_be_read_is_held_against_the_worker(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    args = {"store": {"path": store}, "worker": {"top_n": 5, "device": "cuda"}}
    assert deployments(args), "not here: the workers will tell"
    build_store(Path(store))
    with pytest.raises(ValueError, match=r"worker\.top_n: got 5, .* use 0 to 2"):
        build(args)
    assert deployments({**args, "worker": {"top_n": 2, "device": "cuda"}})


def test_serve_build_finds_the_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("http: {replicas: 3}\n")
    monkeypatch.setenv("MOETIER_CONFIG", str(file))
    built = {d.name: d for d in build_app(cluster.app.app, name="test").deployments}
    assert built["Ingress"].num_replicas == 3
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cluster.app.nothing


REQUEST = GenerateRequest("r", SamplingParams(), prompt="a")
END = Finished("stop", 1, 1, False)
DIED = ActorDiedError()


class Answer:
    """A streaming response: these events, then maybe an error."""

    def __init__(self, events: list[Event], error: Exception | None = None) -> None:
        self._events = events
        self._error = error
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        for event in self._events:
            yield event
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment handle whose methods are given functions."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        for name, method in methods.items():
            setattr(self, name, type("Method", (), {"remote": staticmethod(method)}))

    def options(self, **_: Any) -> Handle:
        return self


def events_of(*answers: Answer) -> list[Event]:
    """What a client that streams is given, from a handle that gives these answers in turn."""
    left = list(answers)

    async def collect() -> list[Event]:
        worker = RoutedWorker(Handle(generate=lambda _: left.pop(0)), Handle())
        return [event async for event in Attempts(worker, Count()).run(REQUEST, whole=False)]

    found = asyncio.run(collect())
    assert not left, "every answer was used"
    return found


@pytest.mark.parametrize("error", [DIED, ActorUnavailableError("away", None)])
def test_a_worker_that_dies_before_its_first_event_is_replaced(error: Exception) -> None:
    assert events_of(Answer([], error), Answer([Piece("a"), END])) == [Piece("a"), END]


def test_a_worker_that_dies_later_ends_the_answer() -> None:
    piece, failed = events_of(Answer([Piece("a")], DIED))
    assert piece == Piece("a")
    assert isinstance(failed, Failed)
    assert failed.kind == "unavailable"


def test_serves_own_backpressure_is_a_full_queue() -> None:
    (failed,) = events_of(Answer([], BackPressureError(7, 7)))
    assert isinstance(failed, Failed)
    assert failed == Failed("queue_full", QUEUE_FULL), "not Serve's words"


def test_leaving_an_answer_cancels_it_at_the_worker() -> None:
    answer = Answer([Piece("a"), Piece("b"), END])

    async def leave() -> None:
        events = RoutedWorker(Handle(generate=lambda _: answer), Handle()).generate(REQUEST)
        assert await anext(events) == Piece("a")
        await events.aclose()

    asyncio.run(leave())
    assert answer.cancelled


def test_who_does_not_answer_is_503() -> None:
    async def unavailable(*_: Any) -> None:
        raise DeploymentUnavailableError("gone")

    async def ask() -> None:
        with pytest.raises(ApiError) as caught:
            await RoutedWorker(Handle(), Handle(model=unavailable)).describe()
        assert (caught.value.status, caught.value.retry_after_s) == (503, 1)
        with pytest.raises(ApiError) as caught:
            await RemoteTiers(Handle(snapshot=unavailable), 2).snapshot(IngressStats("i"))
        assert (caught.value.status, caught.value.retry_after_s) == (503, 2)

    asyncio.run(ask())


def test_the_model_is_known_once_a_worker_has_reported() -> None:
    reported: list[ModelDescription | None] = [None, ModelDescription("mini", "mixtral", 5, 6)]

    async def model() -> ModelDescription | None:
        return reported.pop(0)

    async def ask() -> None:
        worker = RoutedWorker(Handle(), Handle(model=model))
        with pytest.raises(ApiError, match="no GPU worker has reported"):
            await worker.describe()
        assert (await worker.describe()).name == "mini"

    asyncio.run(ask())


def test_the_default_config_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETIER_CONFIG", raising=False)
    assert cluster.app.compose(ClusterConfig())
