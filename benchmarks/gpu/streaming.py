"""Step 5: records from host memory to the device, and how much of it hides behind computing.

One MoE layer with every expert active: the step with all experts resident (compute alone), the
copies alone, and the step that streams them. Gate: a streamed step gives the very bits of the
resident one, in every round, and the bytes delivered are those planned.

Legend: S token rows, K top-k, H hidden, E experts.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import torch

from benchmarks.gpu.clock import in_turns, wall
from benchmarks.gpu.host_source import MIXTRAL, REPAIR, SMALL, TINY, HostSource, Layer
from benchmarks.gpu.matrices import random_inputs, relative_rms
from benchmarks.gpu.recorder import Recorder, quantiles
from benchmarks.gpu.setting import Setting
from expert_store.format import parse_codes, parse_factors
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.experts import StoreExperts
from gpu_worker.record_sizes import PlannedCopy, RecordSizes
from kernels import reference

LAYER = 0
ROUNDS = 12
TOLERANCE = 1e-3
"""A whole layer against the reference on the device, relative RMS."""


def run(setting: Setting, recorder: Recorder) -> None:
    for layer in (TINY,) if setting.tiny else (MIXTRAL, SMALL):
        source = HostSource(layer, setting.device, bits=2)
        total = sum(RecordSizes.of(source.manifest).codes.values())
        total += sum(RecordSizes.of(source.manifest).factors.values())
        for num_tokens in (2,) if setting.tiny else (8, 64):
            with recorder.section(f"streaming {layer.name}"):
                _measure(setting, recorder, layer, source, total, num_tokens)


def _measure(
    setting: Setting,
    recorder: Recorder,
    layer: Layer,
    source: HostSource,
    total: int,
    num_tokens: int,
) -> None:
    device, rounds = setting.device, setting.rounds(ROUNDS)
    hidden_SH = random_inputs(num_tokens, layer.hidden, device) / layer.hidden**0.5
    ids_SK, weights_SK = _routing(layer, num_tokens, device)
    group, shape = f"streaming {layer.name}", f"{layer.name}, {total / 1e6:.0f} MB"
    config = WorkerConfig(device=device, dtype="float32", top_n=layer.top_k)
    num_active = len(set(ids_SK.flatten().tolist()))
    with (
        closing(_experts(source, config, cache_bytes=0)) as streamed,
        closing(_experts(source, config, cache_bytes=2 * total)) as resident,
        torch.inference_mode(),
    ):

        def step(experts: StoreExperts) -> tuple[torch.Tensor, StepCounters]:
            experts.begin(None)
            output_SH = experts.run_layer(LAYER, hidden_SH, ids_SK, weights_SK)
            return output_SH, experts.end().counters

        expected_SH, _ = step(resident)
        truth_SH = _truth(source, hidden_SH, ids_SK, weights_SK)
        error = relative_rms(expected_SH, truth_SH)
        recorder.compare(group, f"{num_tokens} tokens, resident, reference", error, TOLERANCE)
        wrong, planned, moved = 0, 0, 0
        for _ in range(rounds):
            got_SH, counters = step(streamed)
            wrong += not torch.equal(got_SH, expected_SH)
            planned += sum(counters.planned_bytes.values())
            moved += counters.total_moved_bytes
        name = f"{num_tokens} tokens, {num_active} experts streamed"
        recorder.check(
            group, f"{name}: every round the resident step's bits", wrong == 0,
            detail=f"{wrong} of {rounds} rounds differ",
        )  # fmt: skip
        recorder.check(
            group, f"{name}: bytes planned == delivered", planned == moved > 0,
            detail=f"planned {planned}, delivered {moved}",
        )  # fmt: skip
        copies = _copies(source, ids_SK)
        taken = _device_allocations(device)
        times: dict[str, list[float]] = {"compute": [], "copies": [], "streamed": []}
        for _ in range(rounds):
            times["compute"].append(wall(lambda: step(resident), device))
            times["copies"].append(wall(lambda: _drain(streamed, copies), device))
            times["streamed"].append(wall(lambda: step(streamed), device))
        taken = _device_allocations(device) - taken
        recorder.check(
            group, f"{name}: no device memory was taken from the driver while measured", taken == 0,
            detail=f"{taken} allocations",
        )  # fmt: skip
    num_bytes = sum(copy.num_bytes for copy in copies)
    _rows(setting, recorder, times, (group,), shape, num_tokens, num_bytes)


def _rows(
    setting: Setting,
    recorder: Recorder,
    times: dict[str, list[float]],
    gates: tuple[str, ...],
    shape: str,
    num_tokens: int,
    num_bytes: int,
) -> None:
    giga = num_bytes / 1e9
    link = recorder.row(
        "plain copy from pinned memory", _pinned_copy(setting, num_bytes), shape=shape,
        tokens=num_tokens, gates=gates, rate_of_s=giga, rate_unit="GB/s",
    )  # fmt: skip
    for what, key in (("copies alone, streamer", "copies"), ("step, streamed", "streamed")):
        recorder.row(
            what, times[key], shape=shape, tokens=num_tokens, gates=gates,
            rate_of_s=giga, rate_unit="GB/s", share_of=("plain copy", link),
        )  # fmt: skip
    recorder.row(
        "step, all resident", times["compute"], shape=shape, tokens=num_tokens, gates=gates
    )
    compute, copied, both = (quantiles(times[key])[1] for key in ("compute", "copies", "streamed"))
    recorder.value(
        "of the shorter of compute and copies, hidden",
        (compute + copied - both) / min(compute, copied),
        "share", shape=shape, tokens=num_tokens, gates=gates,
    )  # fmt: skip


def _pinned_copy(setting: Setting, num_bytes: int) -> list[float]:
    """Seconds of one copy of as many bytes from memory that is pinned already."""
    device = setting.device
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=not setting.tiny)
    source.random_()
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    work = {"copy": lambda: target.copy_(source, non_blocking=True)}
    return in_turns(work, device=device, rounds=setting.rounds(ROUNDS))["copy"]


def _device_allocations(device: str) -> int:
    """Times so far that torch asked the driver for memory; 0 on a CPU."""
    return torch.cuda.memory_stats().get("num_device_alloc", 0) if device == "cuda" else 0


def _drain(experts: StoreExperts, copies: list[PlannedCopy]) -> None:
    """Bring the records to the device and use none."""
    with experts.streamer.start(copies) as stream:
        for landed in stream:
            assert landed.data is not None, landed.error
            stream.release(landed.copy.request)


def _experts(source: HostSource, config: WorkerConfig, *, cache_bytes: int) -> StoreExperts:
    return StoreExperts(source, replace(config, cache_bytes=cache_bytes).resolve(source.manifest))


def _routing(layer: Layer, num_tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts go round, so that as many as possible are active; weights fall along the columns."""
    places = torch.arange(num_tokens * layer.top_k) % layer.experts
    weights_K = torch.arange(layer.top_k, 0, -1, dtype=torch.float32)
    weights_SK = (weights_K / weights_K.sum()).repeat(num_tokens, 1)
    return places.view(num_tokens, layer.top_k).to(device), weights_SK.to(device)


def _copies(source: HostSource, ids_SK: torch.Tensor) -> list[PlannedCopy]:
    sizes = RecordSizes.of(source.manifest)
    requests = [
        RecordRequest(ExpertKey(LAYER, expert), kind)
        for expert in sorted(set(ids_SK.flatten().tolist()))
        for kind in ("codes", "factors")
    ]
    return [PlannedCopy(request, sizes.bytes_of(request)) for request in requests]


def _truth(
    source: HostSource,
    hidden_SH: torch.Tensor,
    ids_SK: torch.Tensor,
    weights_SK: torch.Tensor,
) -> torch.Tensor:
    """The layer by the reference, from the records in host memory and nothing of the worker's."""
    sum_SH = torch.zeros_like(hidden_SH, dtype=torch.float64)
    for key in source.manifest.experts:
        rows_P, columns_P = (ids_SK == key.expert).nonzero(as_tuple=True)
        if not rows_P.numel():
            continue
        codes, factors = (
            source.fetch([RecordRequest(key, kind)])[0].to(hidden_SH.device)
            for kind in ("codes", "factors")
        )
        mlp = parse_codes(key, codes, source.shape, source.form).mlp
        added = parse_factors(key, factors, source.shape, REPAIR).factors
        output_PH = reference.gated_mlp(hidden_SH[rows_P], mlp, added)
        sum_SH[rows_P] += output_PH.double() * weights_SK[rows_P, columns_P, None]
    return sum_SH
