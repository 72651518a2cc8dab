"""Step 5b: the headline over PCIe: experts in pinned host memory, routing replayed from a trace.

The MoE layers alone, cut to two, of a Mixtral's and a DeepSeek-MoE's expert sizes with random
weights: bf16 experts fetched on demand, the same with a quarter of them cached, static 4, 3 and 2
bits, 2 bits + compensators of the Top-n (the paper) without and with a quarter cached. Steps of
all contestants in turns. Quality beside it is `benchmarks/offload.py`'s: random weights have none.

Legend: S token rows, K top-k, H hidden, F ffn, E experts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.gpu.clock import synchronize, wall
from benchmarks.gpu.host_source import MIXTRAL, HostSource, Layer
from benchmarks.gpu.matrices import random_inputs, relative_rms
from benchmarks.gpu.recorder import Recorder, quantiles
from benchmarks.gpu.setting import Setting
from gpu_worker.config import WorkerConfig
from gpu_worker.experts import StoreExperts
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.trace import StepTrace, side_by_side
from gpu_worker.trace_file import load_trace

TRACES = Path(__file__).parent / "traces"
NUM_LAYERS = 2
WARM_STEPS = 4
"""Of each contestant, before those that count: caches fill, kernels compile."""
BF16_TOLERANCE = 2e-2
Name = tuple[int, int]
"""Layer and expert."""
TINY_MIXTRAL = Layer("tiny", 64, 128, 8, 2)
DEEPSEEK = Layer("DeepSeek-MoE, 32 experts", 2048, 1408, 32, 6)
"""32 experts, not 64: those of finegrained-mini, whose routing is replayed."""


@dataclass(frozen=True, slots=True)
class Case:
    """A layer, the trace that says where its tokens go, and how many pairs of a token are restored
    by the paper's recipe."""

    layer: Layer
    trace: str
    top_n: int


CASES = (Case(MIXTRAL, "mixtral-mini", 1), Case(DEEPSEEK, "finegrained-mini", 3))
TINY_CASES = (Case(TINY_MIXTRAL, "mixtral-mini", 1),)


@dataclass(frozen=True, slots=True)
class Step:
    """Where the tokens of one step go, layer by layer, on the device."""

    hidden_SH: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # ids [S, K], weights [S, K]


class Contestant(Protocol):
    """Runs the layers of a step; says what crossed the link since it was last asked."""

    def run(self, step: Step) -> list[torch.Tensor]: ...

    def moved_bytes(self) -> int: ...


class Ours:
    """The worker's own experts, out of host memory."""

    def __init__(self, experts: StoreExperts) -> None:
        self._experts = experts
        self._moved = 0

    def run(self, step: Step) -> list[torch.Tensor]:
        self._experts.begin(None)
        outputs = [
            self._experts.run_layer(layer, step.hidden_SH, ids_SK, weights_SK)
            for layer, (ids_SK, weights_SK) in enumerate(step.layers)
        ]
        self._moved += self._experts.end().counters.total_moved_bytes
        return outputs

    def moved_bytes(self) -> int:
        moved, self._moved = self._moved, 0
        return moved


class Bf16Offload:
    """What everybody does: bf16 experts in pinned memory, copied when a token needs them.

    All copies of a layer start at once on a stream of their own, and an expert is computed as soon
    as it is there; `num_cached` experts stay on the device, the least lately used goes first.
    """

    def __init__(
        self, layer: Layer, host: Mapping[Name, torch.Tensor], device: str, num_cached: int
    ) -> None:
        self._ffn, self._hidden, self._device = layer.ffn, layer.hidden, device
        self._host = host
        self._num_cached = num_cached
        self._cache: OrderedDict[Name, torch.Tensor] = OrderedDict()
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._moved = 0

    def moved_bytes(self) -> int:
        moved, self._moved = self._moved, 0
        return moved

    def run(self, step: Step) -> list[torch.Tensor]:
        x_SH = step.hidden_SH.bfloat16()
        return [
            self._run_layer(layer, x_SH, ids_SK, weights_SK)
            for layer, (ids_SK, weights_SK) in enumerate(step.layers)
        ]

    def weights(self, layer: int, expert: int) -> tuple[torch.Tensor, ...]:
        """Gate, up [F, H] and down [H, F] of an expert in float32, on the device."""
        return self._split(self._host[layer, expert].to(self._device).float())

    def _run_layer(
        self, layer: int, x_SH: torch.Tensor, ids_SK: torch.Tensor, weights_SK: torch.Tensor
    ) -> torch.Tensor:
        host_ids_SK = ids_SK.cpu()
        active = [(layer, expert) for expert in sorted(set(host_ids_SK.flatten().tolist()))]
        here = [(name, self._fetch(name)) for name in active]
        # In float32, as ours; the order is fixed, so that the sum is.
        sum_SH = torch.zeros(x_SH.shape, dtype=torch.float32, device=x_SH.device)
        for (_, expert), (data, ready) in here:
            if ready is not None:
                torch.cuda.current_stream().wait_event(ready)
                data.record_stream(torch.cuda.current_stream())
            rows_P, columns_P = (host_ids_SK == expert).nonzero(as_tuple=True)
            rows_P, columns_P = rows_P.to(x_SH.device), columns_P.to(x_SH.device)
            gate, up, down = self._split(data)
            x_PH = x_SH[rows_P]
            y_PH = (torch.nn.functional.silu(x_PH @ gate.T) * (x_PH @ up.T)) @ down.T
            sum_SH.index_add_(0, rows_P, y_PH.float() * weights_SK[rows_P, columns_P, None])
        return sum_SH

    def _fetch(self, name: Name) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name], None
        host, ready = self._host[name], None
        self._moved += host.numel() * host.itemsize
        if self._stream is None:
            data = host.clone()
        else:
            with torch.cuda.stream(self._stream):
                data = host.to(self._device, non_blocking=True)
                ready = torch.cuda.Event()
                ready.record(self._stream)
        if self._num_cached:
            while len(self._cache) >= self._num_cached:
                self._cache.popitem(last=False)
            self._cache[name] = data
        return data, ready

    def _split(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = self._ffn * self._hidden
        shapes = ((self._ffn, self._hidden),) * 2 + ((self._hidden, self._ffn),)
        return tuple(flat[i * size : (i + 1) * size].view(s) for i, s in enumerate(shapes))


def run(setting: Setting, recorder: Recorder) -> None:
    with torch.inference_mode():
        for case in TINY_CASES if setting.tiny else CASES:
            with recorder.section(f"offload {case.layer.name}"), ExitStack() as stack:
                _measure(setting, recorder, case, stack)


def _measure(setting: Setting, recorder: Recorder, case: Case, stack: ExitStack) -> None:
    contestants = dict(_contestants(case, setting.device, stack))
    trace = load_trace(TRACES / f"{case.trace}.trace")
    group = f"offload {case.layer.name}"
    for batch in (1, 8):
        steps = replayed(trace, case.layer, batch, setting.device)
        steps = steps[:3] if setting.tiny else steps
        for name, contestant in contestants.items():
            _gate(recorder, group, f"batch {batch}, {name}", contestant, contestants, steps[0])
        warm = min(WARM_STEPS, len(steps) - 1)
        for step in steps[:warm]:
            for contestant in contestants.values():
                contestant.run(step)
        for contestant in contestants.values():
            contestant.moved_bytes()
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for step in steps[warm:]:
            for name, contestant in contestants.items():
                times[name].append(wall(_running(contestant, step), setting.device))
        moved = {n: c.moved_bytes() / (len(steps) - warm) for n, c in contestants.items()}
        _rows(setting, recorder, group, batch, times, moved)


def _running(contestant: Contestant, step: Step) -> Callable[[], object]:
    return lambda: contestant.run(step)


def _contestants(case: Case, device: str, stack: ExitStack) -> Iterator[tuple[str, Contestant]]:
    layer, quarter = case.layer, NUM_LAYERS * case.layer.experts // 4
    host = {
        (at, expert): _bf16_expert(layer, device, seed=1000 * at + expert)
        for at in range(NUM_LAYERS)
        for expert in range(layer.experts)
    }
    yield "(a) bf16, on demand", Bf16Offload(layer, host, device, 0)
    yield "(b) bf16, a quarter cached", Bf16Offload(layer, host, device, quarter)
    for bits in (4, 3, 2):
        source = HostSource(
            layer, device, bits=bits, num_layers=NUM_LAYERS, pinned=device == "cuda"
        )
        yield f"(c) static {bits}-bit", Ours(_experts(stack, source, device, top_n=0))
    codes = sum(RecordSizes.of(source.manifest).codes.values())
    settings = {"top_n": case.top_n}
    yield f"(d) 2-bit + Top-{case.top_n}", Ours(_experts(stack, source, device, **settings))
    yield (
        f"(e) 2-bit + Top-{case.top_n}, a quarter cached",
        Ours(_experts(stack, source, device, cache_bytes=codes // 4, **settings)),
    )


def _experts(stack: ExitStack, source: HostSource, device: str, **settings: int) -> StoreExperts:
    config = replace(WorkerConfig(device=device, dtype="float32"), **settings)
    return stack.enter_context(closing(StoreExperts(source, config.resolve(source.manifest))))


def replayed(trace: StepTrace, layer: Layer, batch: int, device: str) -> list[Step]:
    """The trace's steps, `batch` sequences side by side, with random hidden states."""
    trace = side_by_side(trace, batch, 1)
    assert trace.model.top_k == layer.top_k, (trace.model, layer)
    assert all(count == layer.experts for count in trace.model.num_experts.values())
    steps = []
    for number in range(trace.num_steps):
        rows = slice(number * batch, (number + 1) * batch)
        hidden_SH = random_inputs(batch, layer.hidden, device, seed=number) / layer.hidden**0.5
        layers = tuple(
            (part.topk_ids_SK[rows].long().to(device), part.topk_weights_SK[rows].to(device))
            for part in trace.layers.values()
        )
        steps.append(Step(hidden_SH, layers))
    return steps


def _gate(
    recorder: Recorder,
    group: str,
    name: str,
    contestant: Contestant,
    contestants: dict[str, Contestant],
    step: Step,
) -> None:
    """Ours twice gives the same bits, cached or not; bf16 agrees with float32."""
    got = contestant.run(step)
    if isinstance(contestant, Bf16Offload):
        error = max(relative_rms(g.cpu(), _truth(contestant, at, step)) for at, g in enumerate(got))
        recorder.compare(group, f"{name}: against float32", error, BF16_TOLERANCE)
        return
    same = all(torch.equal(a, b) for a, b in zip(got, contestant.run(step), strict=True))
    recorder.check(group, f"{name}: a second run gives the same bits", same)
    if "cached" in name:
        plain = next(c for n, c in contestants.items() if n.startswith("(d)"))
        same = all(torch.equal(a, b) for a, b in zip(got, plain.run(step), strict=True))
        recorder.check(group, f"{name}: the bits of (d)", same)


def _truth(contestant: Bf16Offload, layer: int, step: Step) -> torch.Tensor:
    ids_SK, weights_SK = step.layers[layer]
    x_SH = step.hidden_SH.bfloat16().float()
    sum_SH = torch.zeros_like(x_SH)
    for expert in sorted(set(ids_SK.flatten().tolist())):
        gate, up, down = contestant.weights(layer, expert)
        y_SH = (torch.nn.functional.silu(x_SH @ gate.T) * (x_SH @ up.T)) @ down.T
        sum_SH += (weights_SK * (ids_SK == expert)).sum(dim=1, keepdim=True) * y_SH
    return sum_SH


def _rows(
    setting: Setting,
    recorder: Recorder,
    group: str,
    batch: int,
    times: dict[str, list[float]],
    moved: dict[str, float],
) -> None:
    shape = f"{group.removeprefix('offload ')}, {NUM_LAYERS} MoE layers"
    link = recorder.row(
        "plain copy from pinned memory", _plain_copy(setting, round(max(moved.values()))),
        shape=shape, tokens=batch, gates=(group,),
        rate_of_s=max(moved.values()) / 1e9, rate_unit="GB/s",
    )  # fmt: skip
    medians = {name: quantiles(seconds)[1] for name, seconds in times.items()}
    slowest, fairest = (medians[name] for name in list(medians)[:2])
    for name, seconds in times.items():
        recorder.row(
            f"MoE layers of a step, {name}", seconds, shape=shape, tokens=batch, gates=(group,),
            rate_of_s=moved[name] / 1e9, rate_unit="GB/s", share_of=("plain copy", link),
        )  # fmt: skip
        values = (
            ("expert bytes per token", moved[name] / batch, "bytes"),
            ("times (a)", slowest / medians[name], "times"),
            ("times (b)", fairest / medians[name], "times"),
        )
        for what, value, unit in values:
            recorder.value(
                f"{what}, {name}", value, unit, shape=shape, tokens=batch, gates=(group,)
            )


def _plain_copy(setting: Setting, num_bytes: int) -> Sequence[float]:
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=not setting.tiny)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=setting.device)
    synchronize(setting.device)
    copy = lambda: target.copy_(source, non_blocking=True)  # noqa: E731
    return [wall(copy, setting.device) for _ in range(setting.rounds(8))]


def _bf16_expert(layer: Layer, device: str, *, seed: int) -> torch.Tensor:
    """Gate, up and down one after another, [3 F H] bf16, in pinned host memory."""
    generator = torch.Generator(device).manual_seed(seed)
    size = layer.ffn * layer.hidden
    flat = torch.randn(3 * size, device=device, generator=generator)
    flat[: 2 * size] /= layer.hidden**0.5
    flat[2 * size :] /= layer.ffn**0.5
    host = flat.bfloat16().cpu()
    return host.pin_memory() if device == "cuda" else host
