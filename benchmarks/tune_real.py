"""A trace on a real local cluster with the autoscaling policy, and the same trace simulated.

The cluster is what `moetier serve` starts: Ray, Serve, HTTP, tier manager, store, mixtral-mini. The
simulation is told what the run itself measured of this busy machine (what its steps cost, how long
a worker took to start), and nothing of when the policy decided what.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx2
import numpy as np
from ray import serve

from cluster.app import APP_NAME, start_local_cluster
from cluster.autoscaling_rules import ServiceTimes, Targets, Worker
from cluster.autoscaling_settings import AutoscalingSettings
from cluster.config import ClusterConfig
from cluster.settings import HttpSettings, ReplicaSettings
from cluster.stores import bundled_store
from cluster.tune.fit import Fit
from cluster.tune.replica import Served
from cluster.tune.serve_decision import ServeDecider
from cluster.tune.simulate import Site, simulate
from cluster.tune.trace import Request, Trace
from gpu_worker.config import WorkerConfig

Lines = dict[str, list[tuple[float, float]]]
WORKER = Worker(slots=4, prefill_chunk=64)
MAX_REPLICAS = 2
"""As many as the machine has cores: more would only make each other slower."""
PROMPT, ANSWER = 48, 24
QUIET_S, BUSY_S = 40.0, 50.0
QUIET_SHARE, BUSY_SHARE = 0.25, 1.3
"""Requests a second, in parts of what one worker can serve."""
SEED = 5


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was run, the errors row by row, and curves of both."""

    told: str
    rows: list[Mapping[str, str | None]]
    panels: dict[str, Lines]


@dataclass(slots=True)
class Run:
    """What a client and the metrics saw; times in seconds of the trace."""

    served: list[Served]
    ready: list[tuple[float, float]] = field(default_factory=list)
    target: list[tuple[float, float]] = field(default_factory=list)
    counts: list[tuple[float, dict[str, Counter[str]]]] = field(default_factory=list)


def compare(fitted: Fit) -> Comparison:
    """Run the trace, simulate it, put both side by side."""
    service = fitted.service(PROMPT, ANSWER)
    settings = _settings(service)
    trace = _trace(_capacity(service))
    run = asyncio.run(_real(trace, settings))
    seen = _seen(run)
    options = settings.serve_config(slots=WORKER.slots, prefill_chunk=WORKER.prefill_chunk)
    site = Site(seen, WORKER, start_s=_start_s(run), max_replicas=MAX_REPLICAS, drain_s=15.0)
    simulated = simulate(trace, site, ServeDecider(options), seed=SEED, tick_s=0.1)
    panels: dict[str, Lines] = {
        "workers": {
            "real": run.ready,
            "simulated": [(m.now_s, float(m.ready)) for m in simulated.moments],
        },
        "first token, s": {
            "real": _latencies(run.served),
            "simulated": _latencies(list(simulated.served)),
        },
    }
    told = (
        f"{len(trace.requests)} requests of {PROMPT} prompt and {ANSWER} answer tokens, Poisson, "
        f"{QUIET_S:g} s quiet, {BUSY_S:g} s at {BUSY_SHARE:g} times what one worker can serve, "
        f"{QUIET_S:g} s quiet, against `moetier serve`'s own cluster with 1 to {MAX_REPLICAS} "
        f"workers of {WORKER.slots} slots. The simulation knew what the run measured of itself: "
        f"{seen.step_s * 1e3:.1f} ms a step, {seen.sequence_s * 1e3:.2f} ms a sequence, "
        f"{seen.prompt_token_s * 1e3:.3f} ms a prompt token (steps alone in a process beforehand: "
        f"{service.step_s * 1e3:.1f}, {service.sequence_s * 1e3:.2f}, "
        f"{service.prompt_token_s * 1e3:.3f}), and {site.start_s:.1f} s to start a worker."
    )
    return Comparison(told, _rows(run, simulated.served, panels["workers"], trace.end_s), panels)


def _settings(service: ServiceTimes) -> AutoscalingSettings:
    return AutoscalingSettings(
        min_replicas=1,
        max_replicas=MAX_REPLICAS,
        upscale_delay_s=1.0,
        downscale_delay_s=15.0,
        look_back_s=5.0,
        metrics_interval_s=1.0,
        targets=Targets(ttft_s=10 * service.prefill_s(PROMPT), headroom=1.2, smooth_s=5.0),
        service=service,
    )


def _capacity(service: ServiceTimes) -> float:
    """Requests a second that keep one worker busy all the time."""
    decode_s = ANSWER * service.decode_s(WORKER.slots) / WORKER.slots
    return 1 / (service.prefill_s(PROMPT) + decode_s)


def _trace(capacity: float) -> Trace:
    draw = np.random.default_rng(SEED)
    now, requests = 0.0, []
    for seconds, share in ((QUIET_S, QUIET_SHARE), (BUSY_S, BUSY_SHARE), (QUIET_S, QUIET_SHARE)):
        end_s = now + seconds
        while True:
            gap = draw.exponential(1 / (share * capacity))
            if now + gap > end_s:
                break
            now += gap
            requests.append(Request(now, PROMPT, ANSWER))
        now = end_s
    return Trace("real", tuple(requests))


async def _real(trace: Trace, settings: AutoscalingSettings) -> Run:
    config = ClusterConfig(
        worker=WorkerConfig(
            max_sequences=WORKER.slots, prefill_chunk=WORKER.prefill_chunk, max_context=256
        ),
        replicas=ReplicaSettings(autoscaling=settings, num_cpus=1.0),
        http=HttpSettings(port=0),
    )
    bundled_store()
    run = Run([Served(request) for request in trace.requests])
    ended = threading.Event()
    with start_local_cluster(config) as cluster:
        async with httpx2.AsyncClient(base_url=cluster.address, timeout=300) as client:
            for _ in range(3):
                await _ask(client, cluster.model, Served(Request(0, PROMPT, ANSWER)), 0.0)
            start = time.monotonic()
            watching = asyncio.create_task(asyncio.to_thread(_watch, run, start, ended))
            scraping = asyncio.create_task(_scrape(client, run, start))
            async with asyncio.TaskGroup() as asking:
                for served in run.served:
                    await asyncio.sleep(start + served.request.arrival_s - time.monotonic())
                    asking.create_task(_ask(client, cluster.model, served, start))
            await asyncio.sleep(25)  # the calm time and a little, so that the last one goes
            ended.set()
            scraping.cancel()
            await watching
    return run


async def _ask(client: httpx2.AsyncClient, model: str, served: Served, start: float) -> None:
    draw = np.random.default_rng(int(served.request.arrival_s * 1e6))
    body = {
        "model": model,
        "prompt": [int(each) for each in draw.integers(0, 400, served.request.prompt_tokens)],
        "max_tokens": served.request.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            served.lost = served.lost or "error" in json.loads(line[6:])
            if served.first_s is None:
                served.first_s = time.monotonic() - start
        served.lost = served.lost or answer.status_code != 200
    served.end_s = time.monotonic() - start


def _watch(run: Run, start: float, ended: threading.Event) -> None:
    """Running and wanted workers, twice a second."""
    while not ended.wait(0.5):
        told = serve.status().applications[APP_NAME].deployments["GpuWorker"].replica_states
        now_s = time.monotonic() - start
        wanted = sum(num for state, num in told.items() if state != "STOPPING")
        run.ready.append((now_s, float(told.get("RUNNING", 0))))
        run.target.append((now_s, float(wanted)))


async def _scrape(client: httpx2.AsyncClient, run: Run, start: float) -> None:
    """Each worker's own totals, every other second."""
    pattern = re.compile(r'moetier_(\w+)_total\{replica="([^"]+)"\} (\S+)')
    while True:
        text = (await client.get("/metrics")).text
        found: dict[str, Counter[str]] = {}
        for name, replica, value in pattern.findall(text):
            found.setdefault(replica, Counter())[name] = float(value)
        run.counts.append((time.monotonic() - start, found))
        await asyncio.sleep(2)


def _seen(run: Run) -> ServiceTimes:
    """Step times from the run's own totals: each interval of each worker is a row."""
    rows, busy = [], []
    for (_, before), (_, after) in zip(run.counts, run.counts[1:], strict=False):
        for replica in before.keys() & after.keys():
            change = {name: after[replica][name] - before[replica][name] for name in after[replica]}
            if change["busy_seconds"] <= 0.05:
                continue
            prompt = change["computed_tokens"] - change["output_tokens"]
            rows.append([change["steps"], change["output_tokens"], max(prompt, 0)])
            busy.append(change["busy_seconds"])
    # A worker's mix of steps hardly changes, so single terms may be off where their sum is right.
    return _times(np.array(rows), np.array(busy))


def _times(rows: np.ndarray, busy: np.ndarray) -> ServiceTimes:
    """Least squares with no negative term, by clipping and solving again."""
    used = [0, 1, 2]
    while True:
        found, *_ = np.linalg.lstsq(rows[:, used], busy, rcond=None)
        if (found >= 0).all():
            break
        used = [term for term, value in zip(used, found, strict=True) if value >= 0]
    times = np.zeros(3)
    times[used] = found
    return ServiceTimes(max(times[0], 1e-6), times[1], times[2], PROMPT, ANSWER)


def _start_s(run: Run) -> float:
    """From the first wish for a second worker until it ran; 10 s if there was none."""
    wanted = next((at for at, num in run.target if num > 1), None)
    ready = next((at for at, num in run.ready if num > 1), None)
    return ready - wanted if wanted is not None and ready is not None else 10.0


def _latencies(served: list[Served]) -> list[tuple[float, float]]:
    return [(s.request.arrival_s, s.ttft_s) for s in served if s.first_s is not None]


def _rows(
    run: Run, simulated: tuple[Served, ...], workers: Lines, end_s: float
) -> list[Mapping[str, str | None]]:
    def figures(served: list[Served], ready: list[tuple[float, float]]) -> dict[str, float]:
        first = sorted(each.ttft_s for each in served if not each.lost)
        up = [at for at, num in ready if num > 1]
        return {
            "requests lost": float(sum(each.lost for each in served)),
            "first token, median s": statistics.median(first),
            "first token, p95 s": first[int(0.95 * len(first))],
            "per token, mean s": statistics.fmean(s.per_token_s for s in served if not s.lost),
            "second worker from, s": up[0] if up else 0.0,
            "second worker until, s": up[-1] if up else 0.0,
            "worker-seconds that served": _area(ready, end_s),
        }

    real = figures(run.served, workers["real"])
    guess = figures(list(simulated), workers["simulated"])
    return [
        {
            "figure": name,
            "real": f"{value:.3g}",
            "simulated": f"{guess[name]:.3g}",
            "error": f"{guess[name] / value - 1:+.0%}" if value else None,
        }
        for name, value in real.items()
    ]


def _area(ready: list[tuple[float, float]], end_s: float) -> float:
    return sum(
        num * (min(after, end_s) - at)
        for (at, num), (after, _) in zip(ready, ready[1:], strict=False)
        if at < end_s
    )
