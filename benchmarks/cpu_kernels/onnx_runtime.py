"""ONNX Runtime's contestants: MatMulNBits at 2 and 4 bits with int8 products, one session a copy.

Legend: T tokens, N rows, K cols.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import numpy as np
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

BLOCK = 64
INT8_PRODUCT = 4  # accuracy_level: activations rounded to int8, its fastest
TOLERANCE = 3e-2


def contestants(shape: Shape, form: Form) -> list[Contestant]:
    """2 and 4 bits, the widths it has; none without onnxruntime and onnx."""
    if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")):
        return []
    return [_contestant(shape, form, bits) for bits in (2, 4)]


def _contestant(shape: Shape, form: Form, bits: int) -> Contestant:
    runtime, onnx = importlib.import_module("onnxruntime"), importlib.import_module("onnx")
    matrices = [_matrix(rows, cols, bits) for rows, cols in shape.matrices(form)]
    num_bytes = sum(codes.nbytes + scales.nbytes for codes, scales in matrices)
    model = _model(onnx, shape, form, bits, matrices)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [
        runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(num_copies(num_bytes))
    ]

    def start(x_TK: torch.Tensor) -> list[Call]:
        return [_call(session, x_TK) for session in sessions]

    def weights() -> list[torch.Tensor]:
        return [_dequantized(codes, scales, bits) for codes, scales in matrices]

    return Contestant(f"ONNX Runtime {bits} bits", bits, num_bytes, TOLERANCE, start, weights)


def _call(session, x_TK: torch.Tensor) -> Call:
    """One run with its inputs and outputs bound beforehand."""
    binding = session.io_binding()
    binding.bind_cpu_input("x", x_TK.contiguous().numpy())
    binding.bind_output("y")

    def run() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[0].numpy())

    return run


def _matrix(rows: int, cols: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K/64, bytes] uint8, lowest bits first, and scales [N * K/64] float32.

    No zero points: the operator then takes the middle code, 2**(bits - 1).
    """
    grouped = random_pattern(rows, cols).view(PATTERN_ROWS, cols // BLOCK, BLOCK)
    middle = 2 ** (bits - 1)
    scale = grouped.abs().amax(-1, keepdim=True) / max(middle - 1, 1)
    codes = (grouped / scale + middle).round().clamp(0, 2**bits - 1).to(torch.uint8)
    per_byte = 8 // bits
    fields = codes.view(PATTERN_ROWS, cols // BLOCK, -1, per_byte)
    packed = sum(fields[..., i] << (bits * i) for i in range(per_byte))
    times = rows // PATTERN_ROWS
    return (
        packed.repeat(times, 1, 1).contiguous().numpy(),
        scale.flatten().repeat(times).contiguous().numpy(),
    )


def _dequantized(codes: np.ndarray, scales: np.ndarray, bits: int) -> torch.Tensor:
    packed = torch.from_numpy(codes)
    fields = [packed >> (bits * i) & (2**bits - 1) for i in range(8 // bits)]
    values = torch.stack(fields, dim=-1).flatten(2).float() - 2 ** (bits - 1)
    scale = torch.from_numpy(scales).view(codes.shape[0], codes.shape[1], 1)
    return (values * scale).flatten(1)


def _model(onnx: ModuleType, shape: Shape, form: Form, bits: int, matrices: list[tuple]) -> bytes:
    """A graph with one product, or with a whole gated MLP."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes, initializers = [], []
    inputs, outputs = (["x"], ["y"]) if form == "matrix" else (["x", "x", "h"], ["g", "u", "y"])
    for i, ((codes, scales), (rows, cols)) in enumerate(
        zip(matrices, shape.matrices(form), strict=True)
    ):
        initializers += [
            numpy_helper.from_array(codes, f"codes{i}"),
            numpy_helper.from_array(scales, f"scales{i}"),
        ]
        nodes.append(
            helper.make_node(
                "MatMulNBits", [inputs[i], f"codes{i}", f"scales{i}"], [outputs[i]],
                domain="com.microsoft", K=cols, N=rows, bits=bits, block_size=BLOCK,
                accuracy_level=INT8_PRODUCT,
            )
        )  # fmt: skip
    if form == "expert":
        nodes[2:2] = [
            helper.make_node("Sigmoid", ["g"], ["s"]),
            helper.make_node("Mul", ["g", "s"], ["a"]),
            helper.make_node("Mul", ["a", "u"], ["h"]),
        ]
    float32 = onnx.TensorProto.FLOAT
    last_rows = shape.matrices(form)[-1][0]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", float32, ["T", shape.hidden])],
        [helper.make_tensor_value_info("y", float32, ["T", last_rows])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
