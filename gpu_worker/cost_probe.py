"""Measures the costs that a worker starts with: real fetches, near-data calls and runs.

Small: a few experts of one layer, a few repeats. What goes wrong here is no reason not to start:
the value is then a guess that says so in the log, and real steps correct it.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from functools import partial

import torch

from expert_store.errors import StoreError
from expert_store.types import ExpertCodes, ExpertKey, ExpertTokens, RecordRequest
from gpu_worker.config import WorkerConfig
from gpu_worker.cost_model import LayerCosts, LinkCost, NearCost, RunCost
from gpu_worker.expert_math import ExpertCall, ExpertMath
from gpu_worker.protocols import CountsWorkers, ExpertSource, NearData

logger = logging.getLogger(__name__)

REPEATS = 3
MANY_EXPERTS = 8
MANY_TOKENS = 64
MAX_PROBE_BYTES = 32 << 20
NEAR_TIMEOUT_S = 10.0
LONG_S = 0.5
"""What takes longer is measured once."""
GUESSED_BYTES_PER_S = 1e9
"""Of a link that could not be measured; the first copies correct it."""

GUESSED_FIXED_S = 2e-4
"""Of a layer's routing, planning and adding up, until the first layers tell."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What is measured, and with which clock (seconds)."""

    source: ExpertSource
    near_data: NearData | None
    math: ExpertMath
    config: WorkerConfig  # resolved
    clock: Callable[[], float]

    @property
    def keys(self) -> list[ExpertKey]:
        """Some experts of the first layer."""
        keys = sorted(self.source.manifest.experts)
        return [key for key in keys if key.layer == keys[0].layer][:MANY_EXPERTS]

    def codes_bytes(self, key: ExpertKey) -> int:
        return self.source.manifest.experts[key].codes.num_bytes


def start_costs(probe: Probe) -> LayerCosts:
    """Costs to start with: those that the config gives, and the others measured now."""
    config = probe.config
    link = LinkCost(config.link_bytes_per_s) if config.link_bytes_per_s else _link(probe)
    link = replace(link, request_bytes=config.fetch_bytes)
    device = _device(probe)
    near = None
    if probe.near_data is not None:
        workers = probe.near_data.num_workers if isinstance(probe.near_data, CountsWorkers) else 1
        if config.near_data_token_s:
            near = NearCost(RunCost(config.near_data_token_s), num_workers=workers)
        else:
            near = _near(probe, probe.near_data, workers, link)
    costs = LayerCosts(link, device, near, fixed_s=GUESSED_FIXED_S)
    logger.info("costs to start with: %s", costs)
    return costs


def device_bytes_per_s(probe: Probe) -> float:
    """How fast the host passes bytes on to the device; no bound where they are the same memory."""
    if probe.config.device == "cpu":
        return math.inf
    data = torch.zeros(16 << 20, dtype=torch.uint8).pin_memory()

    def copy() -> None:
        data.to(probe.config.device, non_blocking=True)
        torch.cuda.synchronize()

    return data.numel() / max(_time(copy, probe.clock), 1e-9)


def _link(probe: Probe) -> LinkCost:
    few, many = probe.keys[:1], probe.keys
    while len(many) > 1 and sum(map(probe.codes_bytes, many)) > MAX_PROBE_BYTES:
        many = many[:-1]
    try:
        many_s = _time(partial(_fetch, probe, many), probe.clock)
        few_s = _time(partial(_fetch, probe, few), probe.clock) if len(many) > 1 else many_s
    except StoreError as error:
        logger.warning(
            "the link could not be measured (%s); %g bytes/s until copies tell",
            error,
            GUESSED_BYTES_PER_S,
        )
        return LinkCost(GUESSED_BYTES_PER_S)
    few_bytes, many_bytes = (sum(map(probe.codes_bytes, keys)) for keys in (few, many))
    if many_s <= few_s:  # what bytes cost is less than what a call varies by
        return LinkCost(many_bytes / max(many_s, 1e-9))
    bytes_per_s = (many_bytes - few_bytes) / (many_s - few_s)
    return LinkCost(bytes_per_s, call_s=max(0.0, few_s - few_bytes / bytes_per_s))


def _device(probe: Probe) -> RunCost:
    """One expert for one token, which reads its bytes, and for many, which computes."""
    key = probe.keys[0]
    try:
        request = RecordRequest(key, "codes")
        data = probe.math.decode_on_host(request, _fetch(probe, [key])[0])
        codes = probe.math.parse(request, data.to(probe.config.device))
    except StoreError as error:
        logger.warning("the device could not be measured (%s); layers will tell", error)
        return RunCost(pair_s=1e-5)
    assert isinstance(codes, ExpertCodes), f"asked for codes, got {type(codes)}"

    def run(num_tokens: int) -> None:
        hidden_PH = _hidden(probe, num_tokens).to(probe.config.device)
        probe.math.run([ExpertCall(hidden_PH, codes, None, None)])
        if probe.config.device == "cuda":
            torch.cuda.synchronize()

    one_s, many_s = (_time(partial(run, count), probe.clock) for count in (1, MANY_TOKENS))
    one_s = max(one_s, 1e-9)
    return RunCost(many_s / MANY_TOKENS, bytes_per_s=probe.codes_bytes(key) / one_s)


def _near(probe: Probe, near_data: NearData, num_workers: int, link: LinkCost) -> NearCost:
    """One expert, several, and one for many tokens: what a call, an expert and a token take."""
    keys = probe.keys
    num_bytes = probe.codes_bytes(keys[0])

    def call(keys: Sequence[ExpertKey], num_tokens: int) -> float:
        hidden_TH = _hidden(probe, num_tokens)
        work = [ExpertTokens(key, tuple(range(num_tokens))) for key in keys]

        def once() -> None:
            future = near_data.submit(hidden_TH, work)
            wait([future], timeout=NEAR_TIMEOUT_S)
            future.result(timeout=0)

        return _time(once, probe.clock)

    try:
        one_s, all_s = call(keys[:1], 1), call(keys, 1)
        tokens_s = call(keys[:1], MANY_TOKENS)
    except (StoreError, TimeoutError) as error:
        logger.warning("near data could not be measured (%s); as dear as copies for now", error)
        return NearCost(RunCost(link.seconds(num_bytes)), num_workers=num_workers)
    more = len(keys) - 1
    # Where experts take no more than calls vary by, most of the one call is the call.
    expert_s = max((all_s - one_s) * num_workers / more if more else 0.0, 0.1 * one_s)
    call_s = max(0.0, one_s - expert_s)
    pair_s = max(0.0, tokens_s - call_s) / MANY_TOKENS
    return NearCost(
        RunCost(pair_s, bytes_per_s=num_bytes / expert_s), call_s=call_s, num_workers=num_workers
    )


def _fetch(probe: Probe, keys: Sequence[ExpertKey]) -> list[torch.Tensor]:
    return probe.source.fetch([RecordRequest(key, "codes") for key in keys])


def _hidden(probe: Probe, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = probe.source.manifest.model.expert.hidden
    hidden_TH = torch.randn(num_tokens, hidden, generator=generator)
    return hidden_TH.to(probe.config.torch_dtype)


def _time(act: Callable[[], object], clock: Callable[[], float]) -> float:
    """Median seconds. The first, which opens connections and reads files, does not count, unless
    it took so long that repeats would delay the start."""
    start_s = clock()
    act()
    if (first_s := clock() - start_s) > LONG_S:
        return first_s
    times = []
    for _ in range(REPEATS):
        start_s = clock()
        act()
        times.append(clock() - start_s)
    return statistics.median(times)
