"""One expert's time on the CPU: low-bit kernels against dequantise-and-multiply and dense torch.

Weights come from pools several times the last-level cache, contestants take turns in every round,
and the machine's read bandwidth is measured in the same rounds. The gate, every contestant against
the reference, runs first. `python -m benchmarks.kernels` prints rows and writes a CSV.
Symmetric codes stand against affine codes of the same width, round by round.

Legend: T tokens, H hidden, F ffn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.record import RESULTS, commit, processor, today, write_rows
from kernels import ops, reference
from kernels.packing import pack, pack_symmetric
from kernels.types import (
    GRID_BITS,
    GatedMLP,
    GatedRepair,
    Grid,
    LowRank,
    MlpCall,
    QuantizedMatrix,
)

OUT = RESULTS / "kernels-cpu.csv"
TOKENS = (1, 4, 16)
POOL_BYTES = 192 << 20
"""Weights each contestant cycles through: six times a 32 MiB last-level cache."""
READ_BYTES = 4 << 20
"""One read of the bandwidth measurement: near a low-bit expert's size, so that a busy machine's
interruptions fall on both alike."""
# Relative RMS error allowed by the gate, as in tests/kernels.
TOLERANCE = {"cpu_int8": 3e-2, "cpu_fp32": 1e-5, "torch fp32": 1e-5, "torch bf16": 2e-2}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the CSV. Bytes are those of the weights read per call."""

    what: str
    shape: str
    tokens: int
    num_bytes: int
    p20: float
    p50: float
    p80: float
    unit: str
    gb_per_s: float
    share_of_read_bandwidth: float
    times_affine: float | None  # its time over the affine codes' of the same width, same rounds
    rounds: int
    threads: int
    hardware: str
    load: str  # 1-minute load average at the end, over cores: others shared the machine
    commit: str
    date: str


@dataclass(frozen=True, slots=True)
class Contestant:
    """`calls[i](x)` runs the expert on the i-th copy of its weights; the reference has `mlp`."""

    what: str
    num_bytes: int
    calls: list[Callable[[torch.Tensor], torch.Tensor]]
    mlp: GatedMLP
    repair: GatedRepair | None = None
    rival: str | None = None  # whose time `times_affine` divides by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(
            arguments.hidden, arguments.ffn, arguments.rounds, num_threads=arguments.threads
        )
    write_rows(arguments.out, rows)
    print(f"wrote {arguments.out}")


def measure(hidden: int, ffn: int, rounds: int, *, num_threads: int) -> list[Row]:
    """Gate, then time every contestant at every token count; prints each row."""
    contestants = [
        int8_contestant(hidden, ffn, bits, grid, num_threads)
        for grid, widths in GRID_BITS.items()
        for bits in widths
    ]
    contestants.append(repaired_contestant(hidden, ffn))
    mlp = random_mlp(hidden, ffn, 2, "affine")
    contestants.append(fp32_contestant(mlp))
    contestants += [dense_contestant(mlp, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for contestant in contestants:
        gate(contestant)

    ballast = torch.ones(POOL_BYTES // READ_BYTES, READ_BYTES // 4)
    rows = []
    for num_tokens in TOKENS:
        x_TH = torch.randn(num_tokens, hidden)
        times, reads = time_in_turns(contestants, x_TH, ballast, rounds)
        bandwidth = READ_BYTES / statistics.median(reads) / 1e9
        print(f"\n{num_tokens} tokens; read bandwidth {bandwidth:.1f} GB/s on this run's threads")
        for contestant in contestants:
            row = make_row(
                contestant, times, bandwidth, f"H {hidden}, F {ffn}", num_tokens, num_threads
            )
            beside = f", {row.times_affine} of affine's time" if row.times_affine else ""
            print(
                f"{row.what:36} {row.p20:9.1f} {row.p50:9.1f} {row.p80:9.1f} {row.unit}"
                f" {row.gb_per_s:6.1f} GB/s {row.share_of_read_bandwidth:6.0%} of read bandwidth"
                f"{beside}"
            )
            rows.append(row)
    return rows


def time_in_turns(
    contestants: list[Contestant], x_TH: torch.Tensor, ballast: torch.Tensor, rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds per call of each contestant, and per read of a ballast row, round by round."""
    times: dict[str, list[float]] = {contestant.what: [] for contestant in contestants}
    reads = []
    for round_number in range(rounds):
        piece = ballast[round_number % len(ballast)]
        started = time.perf_counter()
        torch.dot(piece, piece)
        reads.append(time.perf_counter() - started)
        for contestant in contestants:
            calls = contestant.calls
            # The first call after another contestant also pays for cold code; time the second.
            calls[2 * round_number % len(calls)](x_TH)
            started = time.perf_counter()
            calls[(2 * round_number + 1) % len(calls)](x_TH)
            times[contestant.what].append(time.perf_counter() - started)
    return times, reads


def make_row(
    contestant: Contestant,
    times: dict[str, list[float]],
    bandwidth: float,
    shape: str,
    num_tokens: int,
    num_threads: int,
) -> Row:
    seconds, times_affine = times[contestant.what], None
    if contestant.rival is not None:
        ratios = [own / other for own, other in zip(seconds, times[contestant.rival], strict=True)]
        times_affine = round(statistics.median(ratios), 3)
    p20, p50, p80 = (statistics.quantiles(seconds, n=10)[i] * 1e6 for i in (1, 4, 7))
    speed = contestant.num_bytes / p50 / 1e3
    return Row(
        what=contestant.what,
        shape=shape,
        tokens=num_tokens,
        num_bytes=contestant.num_bytes,
        p20=round(p20, 1),
        p50=round(p50, 1),
        p80=round(p80, 1),
        unit="us",
        gb_per_s=round(speed, 2),
        share_of_read_bandwidth=round(speed / bandwidth, 3),
        times_affine=times_affine,
        rounds=len(seconds),
        threads=num_threads,
        hardware=f"{processor()}, {ops.native_isa()}",
        load=f"{os.getloadavg()[0]:.1f}/{os.cpu_count()}",
        commit=commit(),
        date=today(),
    )


def gate(contestant: Contestant) -> None:
    """Raises AssertionError when a contestant's answer is not the reference's."""
    x_TH = torch.randn(3, contestant.mlp.gate.cols)
    expected = reference.gated_mlp(x_TH, contestant.mlp, contestant.repair)
    error = float((contestant.calls[0](x_TH).float() - expected).norm() / expected.norm())
    allowed = next(value for name, value in TOLERANCE.items() if contestant.what.startswith(name))
    assert error < allowed, f"{contestant.what}: relative error {error:.2e}, allowed {allowed:.0e}"


def int8_contestant(hidden: int, ffn: int, bits: int, grid: Grid, num_threads: int) -> Contestant:
    def call(copy: GatedMLP) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: ops.gated_mlp_many([MlpCall(x, copy)], num_threads=num_threads)[0]

    mlp = random_mlp(hidden, ffn, bits, grid)
    what, rival = f"cpu_int8 {bits} bits", None
    if grid == "symmetric":
        rival = what if bits in GRID_BITS["affine"] else None
        what += " symmetric"
    num_bytes = mlp_bytes(mlp)
    copies = [copy_mlp(mlp) for _ in range(pool_size(num_bytes))]
    return Contestant(what, num_bytes, [call(copy) for copy in copies], mlp, rival=rival)


def repaired_contestant(hidden: int, ffn: int) -> Contestant:
    """A restored expert: its codes and one plane for each matrix."""
    mlp = random_mlp(hidden, ffn, 2, "symmetric")
    shapes = ((ffn, hidden), (ffn, hidden), (hidden, ffn))
    planes = [random_matrix(rows, cols, 1, "symmetric") for rows, cols in shapes]

    def copy_planes() -> GatedRepair:
        gate, up, down = (replace(plane, data=plane.data.clone()) for plane in planes)
        nothing = torch.empty(0, dtype=torch.uint8)
        wide, tall = LowRank(nothing, (), ffn, hidden, 3), LowRank(nothing, (), hidden, ffn, 3)
        return GatedRepair(wide, wide, tall, (gate,), (up,), (down,))

    def call(copy: GatedMLP, repair: GatedRepair) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: ops.gated_mlp(x, copy, repair, backend="cpu_int8")

    num_bytes = mlp_bytes(mlp) + sum(plane.data.numel() for plane in planes)
    calls = [call(copy_mlp(mlp), copy_planes()) for _ in range(pool_size(num_bytes))]
    return Contestant("cpu_int8 2 bits symmetric + plane", num_bytes, calls, mlp, copy_planes())


def fp32_contestant(mlp: GatedMLP) -> Contestant:
    def call(copy: GatedMLP) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: ops.gated_mlp(x, copy, backend="cpu_fp32")

    num_bytes = mlp_bytes(mlp)
    copies = [copy_mlp(mlp) for _ in range(pool_size(num_bytes))]
    return Contestant("cpu_fp32 2 bits", num_bytes, [call(copy) for copy in copies], mlp)


def dense_contestant(mlp: GatedMLP, dtype: torch.dtype) -> Contestant:
    """Plain torch linears on the dequantised weights, which the link would have had to carry."""
    weights = [reference.dequantize(m).to(dtype) for m in (mlp.gate, mlp.up, mlp.down)]

    def call(copy: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        gate, up, down = copy

        def run(x_TH: torch.Tensor) -> torch.Tensor:
            x = x_TH.to(dtype)
            h_TF = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            return h_TF @ down.T

        return run

    num_bytes = sum(w.numel() * w.element_size() for w in weights)
    copies = [[w.clone() for w in weights] for _ in range(pool_size(num_bytes))]
    name = "torch fp32" if dtype == torch.float32 else "torch bf16"
    return Contestant(name, num_bytes, [call(copy) for copy in copies], mlp)


def pool_size(num_bytes: int) -> int:
    return max(2, -(-POOL_BYTES // num_bytes))


def mlp_bytes(mlp: GatedMLP) -> int:
    return sum(matrix.data.numel() for matrix in (mlp.gate, mlp.up, mlp.down))


def random_mlp(hidden: int, ffn: int, bits: int, grid: Grid) -> GatedMLP:
    return GatedMLP(
        random_matrix(ffn, hidden, bits, grid),
        random_matrix(ffn, hidden, bits, grid),
        random_matrix(hidden, ffn, bits, grid),
        "silu",
    )


def random_matrix(rows: int, cols: int, bits: int, grid: Grid) -> QuantizedMatrix:
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8)
    if grid == "symmetric":
        scale8 = torch.randint(85, 256, (rows, cols // 64), dtype=torch.uint8)
        row_scale = torch.full((rows,), 1.5 / (cols**0.5 * 2 ** (bits - 1)))
        return pack_symmetric(codes, scale8, row_scale, bits)
    scale = (torch.rand(rows, cols // 64) + 0.5) / (cols**0.5 * 2 ** (bits - 1))
    return pack(codes, scale, torch.full_like(scale, (2**bits - 1) / 2), bits)


def copy_mlp(mlp: GatedMLP) -> GatedMLP:
    gate, up, down = (replace(m, data=m.data.clone()) for m in (mlp.gate, mlp.up, mlp.down))
    return replace(mlp, gate=gate, up=up, down=down)


if __name__ == "__main__":
    main()
