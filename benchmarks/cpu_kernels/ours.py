"""moetier's own contestants: int8 kernels at every width, grid and instruction set, and cpu_fp32.

Legend: T tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.cpu_kernels.contestant import (
    PATTERN_ROWS,
    Call,
    Contestant,
    Form,
    Shape,
    num_copies,
    random_pattern,
)
from kernels import cpu_native, ops, reference
from kernels.cpu_native import Isa
from kernels.packing import middle_code, pack, pack_symmetric
from kernels.types import (
    GROUP_SIZE,
    GatedMLP,
    GatedRepair,
    Grid,
    LowRank,
    MlpCall,
    QuantizedMatrix,
    tiles_bytes,
)

INT8_TOLERANCE = 3e-2  # as in tests/kernels
FP32_TOLERANCE = 1e-5


def contestants(shape: Shape, form: Form) -> list[Contestant]:
    """Every width and grid with the best instruction set, affine ones with AVX2 too; for an expert
    also one with a plane for every token, and the float32 path."""
    found = [
        int8(shape, form, bits, grid, None)
        for bits in (2, 3, 4)
        for grid in ("affine", "symmetric")
    ]
    if cpu_native.best_isa() == "avx512vnni":
        found += [int8(shape, form, bits, "affine", "avx2") for bits in (2, 3, 4)]
    if form == "expert":
        found.append(with_plane(shape))
        if shape.hidden <= 2048:  # seconds a call at Mixtral's size
            found.append(fp32(shape))
    return found


def int8(shape: Shape, form: Form, bits: int, grid: Grid, isa: Isa | None) -> Contestant:
    """The public call on an expert, the native product on a matrix."""
    matrices = [random_matrix(*each, bits, grid) for each in shape.matrices(form)]
    num_bytes = sum(matrix.data.numel() for matrix in matrices)
    copies = [copy(matrices) for _ in range(num_copies(num_bytes))]

    def start(x_TH: torch.Tensor) -> list[Call]:
        if form == "matrix":
            return [lambda m=m: cpu_native.matmul(m[0], x_TH, isa=isa) for m in copies]
        calls = [[MlpCall(x_TH, GatedMLP(*each, "silu"))] for each in copies]
        if isa is not None:
            return [lambda c=c: cpu_native.gated_mlp_many(c, isa=isa)[0] for c in calls]
        return [lambda c=c: ops.gated_mlp_many(c, num_threads=1)[0] for c in calls]

    name = f"moetier {bits} bits" + (" symmetric" if grid == "symmetric" else "")
    return Contestant(
        name + (f" ({isa})" if isa else ""),
        bits,
        num_bytes,
        INT8_TOLERANCE,
        start,
        lambda: [reference.dequantize(matrix) for matrix in matrices],
    )


def with_plane(shape: Shape) -> Contestant:
    """A restored expert: 2 bits symmetric and one plane of 1 bit for each matrix."""
    matrices = [random_matrix(*each, 2, "symmetric") for each in shape.matrices("expert")]
    planes = [random_matrix(*each, 1, "symmetric") for each in shape.matrices("expert")]
    num_bytes = sum(matrix.data.numel() for matrix in matrices + planes)
    nothing = torch.empty(0, dtype=torch.uint8)
    wide = LowRank(nothing, (), shape.ffn, shape.hidden, 3)
    tall = LowRank(nothing, (), shape.hidden, shape.ffn, 3)
    copies = []
    for _ in range(num_copies(num_bytes)):
        gate, up, down = copy(planes)
        repair = GatedRepair(wide, wide, tall, (gate,), (up,), (down,))
        copies.append((GatedMLP(*copy(matrices), "silu"), repair))

    def start(x_TH: torch.Tensor) -> list[Call]:
        calls = [[MlpCall(x_TH, mlp, repair)] for mlp, repair in copies]
        return [lambda c=c: ops.gated_mlp_many(c, num_threads=1)[0] for c in calls]

    def weights() -> list[torch.Tensor]:
        return [
            reference.dequantize(matrix) + reference.dequantize(plane)
            for matrix, plane in zip(matrices, planes, strict=True)
        ]

    return Contestant(
        "moetier 2 bits symmetric + plane", 3, num_bytes, INT8_TOLERANCE, start, weights
    )


def fp32(shape: Shape) -> Contestant:
    """What a GPU worker without a GPU runs: float32 activations on 2-bit codes."""
    matrices = [random_matrix(*each, 2, "affine") for each in shape.matrices("expert")]
    num_bytes = sum(matrix.data.numel() for matrix in matrices)
    copies = [GatedMLP(*copy(matrices), "silu") for _ in range(num_copies(num_bytes))]

    def start(x_TH: torch.Tensor) -> list[Call]:
        return [lambda mlp=mlp: ops.gated_mlp(x_TH, mlp, backend="cpu_fp32") for mlp in copies]

    return Contestant(
        "moetier cpu_fp32 2 bits",
        2,
        num_bytes,
        FP32_TOLERANCE,
        start,
        lambda: [reference.dequantize(matrix) for matrix in matrices],
    )


def random_matrix(rows: int, cols: int, bits: int, grid: Grid) -> QuantizedMatrix:
    """A random packed pattern, repeated up to `rows`: row blocks simply follow each other."""
    pattern = packed(random_pattern(rows, cols), bits, grid)
    times = rows // PATTERN_ROWS
    split = tiles_bytes(PATTERN_ROWS, cols, bits, grid)
    data = torch.cat((pattern.data[:split].repeat(times), pattern.data[split:].repeat(times)))
    return QuantizedMatrix(data, rows, cols, bits, grid=grid)


def packed(weight_NK: torch.Tensor, bits: int, grid: Grid) -> QuantizedMatrix:
    """Round to the nearest level of a min-max grid."""
    grouped_NGK = weight_NK.view(weight_NK.shape[0], -1, GROUP_SIZE)
    if grid == "affine":
        low, high = grouped_NGK.amin(-1), grouped_NGK.amax(-1)
        scale = (high - low) / (2**bits - 1)
        codes = ((grouped_NGK - low[..., None]) / scale[..., None]).round()
        return pack(codes.flatten(1).to(torch.uint8), scale, -low / scale, bits)
    scale = grouped_NGK.abs().amax(-1) / max(middle_code(bits), 1)
    row_scale = scale.amax(-1).half().float()
    scale8 = (255 * scale / row_scale[:, None]).round().clamp(1, 255)
    step = (row_scale[:, None] * scale8 / 255)[..., None]
    codes = (grouped_NGK / step + middle_code(bits)).round().clamp(0, 2**bits - 1)
    return pack_symmetric(codes.flatten(1).to(torch.uint8), scale8.to(torch.uint8), row_scale, bits)


def copy(matrices: list[QuantizedMatrix]) -> list[QuantizedMatrix]:
    return [replace(matrix, data=matrix.data.clone()) for matrix in matrices]
