"""Step 3c: all experts of one layer's step at once, against one by one and against bf16.

Device time from the first launch to the last, gaps included, as the worker calls it; the host's
time of the same calls; and the share of a device copy that the packed bytes are read at. Tokens
choose their experts at random, seeded; weights of the other contestants go through the cache in
between.

Legend: T tokens, E experts, K top-k, H hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.clock import host, in_turns
from benchmarks.gpu.host_source import MIXTRAL, TINY, Layer
from benchmarks.gpu.matrices import random_expert, random_inputs, random_repair, relative_rms
from benchmarks.gpu.recorder import Recorder, quantiles
from benchmarks.gpu.setting import Setting
from kernels import ops, reference
from kernels.types import GatedMLP, MlpCall

DEEPSEEK = Layer("DeepSeek-MoE", 2048, 1408, 64, 6)
TOKENS = (1, 8, 32)
BITS, RANK = 2, 32
ROUNDS = 20
TOLERANCE = 3e-4


def run(setting: Setting, recorder: Recorder) -> None:
    with torch.inference_mode():
        for layer in (TINY,) if setting.tiny else (MIXTRAL, DEEPSEEK):
            with recorder.section(f"steps {layer.name}"):
                _measure(setting, recorder, layer)


def routing(layer: Layer, num_tokens: int) -> list[list[int]]:
    """The tokens of each expert: a token's experts are drawn at random, none twice."""
    generator = torch.Generator().manual_seed(7)
    tokens: list[list[int]] = [[] for _ in range(layer.experts)]
    for token in range(num_tokens):
        for expert in torch.randperm(layer.experts, generator=generator)[: layer.top_k].tolist():
            tokens[expert].append(token)
    return tokens


def _measure(setting: Setting, recorder: Recorder, layer: Layer) -> None:
    device = setting.device
    hidden, ffn = layer.hidden, layer.ffn
    mlps = [random_expert(hidden, ffn, BITS, device, seed=10 * e) for e in range(layer.experts)]
    repairs = [
        random_repair(hidden, ffn, 16 if setting.tiny else RANK, device, seed=10 * e)
        for e in range(layer.experts)
    ]
    dense = [
        tuple(
            (torch.randn(shape, device=device) / shape[1] ** 0.5).bfloat16()
            for shape in ((ffn, hidden), (ffn, hidden), (hidden, ffn))
        )
        for _ in range(layer.experts)
    ]
    for num_tokens in (1,) if setting.tiny else TOKENS:
        x_TH = random_inputs(num_tokens, hidden, device)
        places = routing(layer, num_tokens)
        chosen = [expert for expert, tokens in enumerate(places) if tokens]
        inputs = [x_TH[places[expert]] for expert in chosen]
        plain = [MlpCall(x, mlps[e]) for x, e in zip(inputs, chosen, strict=True)]
        restored = [
            MlpCall(x, mlps[e], repairs[e], torch.arange(len(x)) % layer.top_k == 0)
            for x, e in zip(inputs, chosen, strict=True)
        ]
        _gate(recorder, layer, restored, num_tokens)
        work = _contestants(plain, restored, [dense[e] for e in chosen], inputs)
        num_bytes = sum(_packed_bytes(mlps[expert]) for expert in chosen)
        _time(setting, recorder, layer, work, num_tokens, len(chosen), num_bytes)


def _gate(recorder: Recorder, layer: Layer, calls: list[MlpCall], num_tokens: int) -> None:
    group = f"steps {layer.name}"
    got = ops.gated_mlp_many(calls, backend="triton", num_threads=1)
    expected = [reference.gated_mlp(c.x_TH, c.mlp, c.repair, c.restored_T) for c in calls]
    error = relative_rms(torch.cat(got), torch.cat(expected))
    recorder.compare(group, f"{num_tokens} tokens, {len(calls)} experts", error, TOLERANCE)


def _contestants(
    plain: list[MlpCall],
    restored: list[MlpCall],
    dense: list[tuple[torch.Tensor, ...]],
    inputs: list[torch.Tensor],
) -> dict[str, Callable[[], object]]:
    halves = [x.bfloat16() for x in inputs]

    def grouped(calls: list[MlpCall]) -> Callable[[], object]:
        return lambda: ops.gated_mlp_many(calls, backend="triton", num_threads=1)

    def one_by_one(calls: list[MlpCall]) -> Callable[[], object]:
        return lambda: [
            ops.gated_mlp(c.x_TH, c.mlp, c.repair, c.restored_T, backend="triton") for c in calls
        ]

    def bf16() -> object:
        return [
            (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            for x, (gate, up, down) in zip(halves, dense, strict=True)
        ]

    return {
        f"{BITS} bits, grouped": grouped(plain),
        f"{BITS} bits, one by one": one_by_one(plain),
        f"{BITS} bits + rank, grouped": grouped(restored),
        f"{BITS} bits + rank, one by one": one_by_one(restored),
        "bf16, torch, one by one": bf16,
    }


def _time(
    setting: Setting,
    recorder: Recorder,
    layer: Layer,
    work: dict[str, Callable[[], object]],
    num_tokens: int,
    num_experts: int,
    num_bytes: int,
) -> None:
    device, gates = setting.device, (f"steps {layer.name}",)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    turns = {"device copy": lambda: target.copy_(source), **work}
    times = in_turns(turns, device=device, rounds=setting.rounds(ROUNDS))
    shape = f"{layer.name}, {num_experts} of {layer.experts} experts"
    copied = recorder.row(
        "device copy, read + written", times.pop("device copy"), shape=shape, tokens=num_tokens,
        gates=gates, rate_of_s=2 * num_bytes / 1e9, rate_unit="GB/s",
    )  # fmt: skip
    for what, seconds in times.items():
        is_plain = what.startswith(f"{BITS} bits,")
        recorder.row(
            f"step, {what}", seconds, shape=shape, tokens=num_tokens, gates=gates,
            rate_of_s=num_bytes / 1e9 if is_plain else 0.0, rate_unit="GB/s" if is_plain else "",
            share_of=("device copy", copied) if is_plain else None,
        )  # fmt: skip
    bf16 = quantiles(times["bf16, torch, one by one"])[1]
    for kind in (f"{BITS} bits", f"{BITS} bits + rank"):
        ours = quantiles(times[f"{kind}, grouped"])[1]
        others = (("one by one", quantiles(times[f"{kind}, one by one"])[1]), ("bf16", bf16))
        for name, seconds_of in others:
            recorder.value(
                f"step, {kind}, grouped: faster than {name}", seconds_of / ours, "times",
                shape=shape, tokens=num_tokens, gates=gates,
            )  # fmt: skip
    what = f"{BITS} bits, grouped"
    seconds = [host(work[what], device) for _ in range(setting.rounds(ROUNDS))]
    recorder.row(
        f"host's part of step, {what}", seconds, shape=shape, tokens=num_tokens, gates=gates
    )


def _packed_bytes(mlp: GatedMLP) -> int:
    return sum(matrix.data.numel() for matrix in (mlp.gate, mlp.up, mlp.down))
