"""Step 3a: how fast the decode kernel reads packed weights, as a share of a device copy.

Weights rotate through a pool many times the L2 cache, a round is one CUDA graph over the pool, and
the copy takes its turn in the same rounds. Rates of kernels count packed bytes read; the copy's
counts bytes read plus bytes written.

Legend: T tokens, N rows, K cols, H hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.gpu.clock import as_graph, in_turns
from benchmarks.gpu.matrices import (
    copies,
    form_name,
    random_expert,
    random_inputs,
    random_matrix,
    random_repair,
)
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.setting import Setting
from kernels import ops, triton_decode, triton_matmul
from kernels.triton_digits import to_digits
from kernels.types import GRID_BITS, Grid, QuantizedMatrix

SHAPES = ((14336, 4096), (4096, 14336), (1408, 2048), (2048, 1408))
POINTS = (
    *(("decode", tokens) for tokens in (1, 2, 4, 8)),
    # Where the tensor cores' kernel overtakes: what `triton_matmul.DECODE_TOKENS` should be.
    *(("prefill", tokens) for tokens in (1, 2, 8)),
)
SYMMETRIC_SHAPES = ((14336, 4096), (2048, 1408))
SYMMETRIC_POINTS = (("decode", 1), ("decode", 4), ("prefill", 1))
"""The same kernels with other scales: fewer points show whether fewer bytes are less time."""
EXPERTS = ((4096, 14336), (2048, 1408))
ROUNDS = 20
EXPERT_ROUNDS = 40
POOL_BYTES = 512 << 20
"""Eight times an H200's L2."""


def run(setting: Setting, recorder: Recorder) -> None:
    device, tiny = setting.device, setting.tiny
    pool_bytes = 1 << 8 if tiny else POOL_BYTES
    source = torch.randint(0, 256, (pool_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        for bits, grid, shapes, points in _plan(tiny=tiny):
            for rows, cols in shapes:
                pool = copies(random_matrix(rows, cols, bits, device, grid=grid), pool_bytes)
                work: dict[tuple[str, int], Callable[[], object]] = {}
                kinds = set()
                for kernel, num_tokens in points:
                    x = random_inputs(num_tokens, cols, device)
                    run_all = (decode_all if kernel == "decode" else _prefill)(pool, x)
                    work[kernel, num_tokens], kind = as_graph(run_all, device)
                    kinds.add(kind)
                work["copy", 0] = lambda: target.copy_(source)
                times = in_turns(work, device=device, rounds=setting.rounds(ROUNDS))
                _rows(recorder, times, pool, pool_bytes, ", ".join(sorted(kinds)))
        _whole_experts(setting, recorder)


def _plan(
    *, tiny: bool
) -> Iterator[tuple[int, Grid, Sequence[tuple[int, int]], Sequence[tuple[str, int]]]]:
    """Bits, grid, shapes and points of what is timed."""
    for grid, widths in GRID_BITS.items():
        if tiny:
            yield widths[0], grid, ((16, 64),), (("decode", 1), ("prefill", 1))
            continue
        for bits in widths:
            if grid == "affine":
                yield bits, grid, SHAPES, POINTS
            else:
                yield bits, grid, SYMMETRIC_SHAPES, SYMMETRIC_POINTS


def decode_all(pool: list[QuantizedMatrix], x_TK: torch.Tensor) -> Callable[[], None]:
    """The decode kernel on each matrix; inputs' digits and job tables are there already: all
    experts of a layer share one launch that makes digits and one copy of tables."""
    num_tokens, cols = x_TK.shape
    rows, form = pool[0].rows, triton_decode.Form.of(pool[0])
    in_order = torch.arange(num_tokens, device=x_TK.device)
    x = to_digits(x_TK.data_ptr() + in_order * (4 * cols), cols, x_TK)
    y_TN = x_TK.new_empty(num_tokens, rows)
    tokens = triton_decode.tokens_per_job(num_tokens)
    tables = [triton_decode.single_jobs(matrix, num_tokens, tokens) for matrix in pool]

    def work() -> None:
        for table in tables:
            triton_decode.multiply_rows(
                table, form, x, y_TN, in_order, rows=rows, tokens=tokens, add=False
            )

    return work


def _prefill(pool: list[QuantizedMatrix], x_TK: torch.Tensor) -> Callable[[], None]:
    def work() -> None:
        for matrix in pool:
            triton_matmul.matmul_prefill(matrix, x_TK)

    return work


def _rows(
    recorder: Recorder,
    times: dict[tuple[str, int], list[float]],
    pool: list[QuantizedMatrix],
    pool_bytes: int,
    kind: str,
) -> None:
    """Times per matrix: a round's over the pool's length."""
    matrix = pool[0]
    shape, form = f"{matrix.rows} x {matrix.cols}", form_name(matrix.bits, matrix.grid)
    copied = recorder.row(
        "device copy, read + written",
        times.pop(("copy", 0)),
        shape=f"{pool_bytes >> 20} MiB",
        tokens=0,
        gates=(f"decode {form}",),
        rate_of_s=2 * pool_bytes / 1e9,
        rate_unit="GB/s",
    )
    for (kernel, num_tokens), seconds in times.items():
        recorder.row(
            f"{kernel} kernel {form}",
            [s / len(pool) for s in seconds],
            shape=shape,
            tokens=num_tokens,
            gates=(f"{kernel} {form}",),
            rate_of_s=matrix.data.numel() / 1e9,
            rate_unit="GB/s",
            share_of=("device copy", copied),
            note=f"{len(pool)} matrices in a {kind}",
        )


def _whole_experts(setting: Setting, recorder: Recorder) -> None:
    """One expert as the worker calls it, launch by launch, against bf16 linears of the same shape.

    The gap to the kernels' own times is what launching costs.
    """
    device, tiny = setting.device, setting.tiny
    rounds = setting.rounds(EXPERT_ROUNDS)
    for hidden, ffn in ((64, 128),) if tiny else EXPERTS:
        mlp = random_expert(hidden, ffn, 2, device)
        factors = random_repair(hidden, ffn, 16, device)
        symmetric = random_expert(hidden, ffn, 2, device, grid="symmetric")
        plane = random_repair(hidden, ffn, 0, device, num_planes=1)
        dense = [  # as stored by torch, [out, in]
            torch.randn(shape, device=device).bfloat16()
            for shape in ((ffn, hidden), (ffn, hidden), (hidden, ffn))
        ]
        for num_tokens in (1,) if tiny else (1, 8):
            x = random_inputs(num_tokens, hidden, device)
            x_bf16 = x.bfloat16()
            work = {
                "expert 2 bits": lambda x=x, mlp=mlp: ops.gated_mlp(x, mlp, backend="triton"),
                "expert 2 bits + rank 16": lambda x=x, mlp=mlp, factors=factors: ops.gated_mlp(
                    x, mlp, factors, backend="triton"
                ),
                "expert 2 bits symmetric": lambda x=x, mlp=symmetric: ops.gated_mlp(
                    x, mlp, backend="triton"
                ),
                "expert 2 bits symmetric + plane": lambda x=x, mlp=symmetric, plane=plane: (
                    ops.gated_mlp(x, mlp, plane, backend="triton")
                ),
                "expert bf16, torch": lambda x=x_bf16, w=dense: (
                    (torch.nn.functional.silu(x @ w[0].T) * (x @ w[1].T)) @ w[2].T
                ),
            }
            times = in_turns(work, device=device, rounds=rounds)
            for what, seconds in times.items():
                recorder.row(
                    what,
                    seconds,
                    shape=f"H {hidden}, F {ffn}",
                    tokens=num_tokens,
                    gates=("mlp 2 bits symmetric" if "symmetric" in what else "mlp 2 bits",),
                    note="launch by launch, same weights each round",
                )
