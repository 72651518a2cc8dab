"""ggml's contestants: its K-quants and 4-bit forms, plain and repacked, as graphs on one thread.

Legend: T tokens, N rows, K cols.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import ExitStack

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
from benchmarks.cpu_kernels.ggml_library import F32, TYPES, Ggml, library

BITS = {"Q2_K": 2, "Q3_K": 3, "Q4_0": 4, "Q4_K": 4}
K_QUANT_COLS = 256
FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0"}
"""What llama.cpp takes for a matrix whose inputs are no multiple of 256."""
TOLERANCE = 3e-2  # activations are rounded to int8, as ours are


def contestants(shape: Shape, form: Form, memory: ExitStack) -> list[Contestant]:
    """Every type that has kernels here; none without the library. `memory` frees their weights."""
    ggml = library()
    if ggml is None:
        return []
    found = []
    for name in BITS:
        for buffers in (ggml.plain_buffers(), ggml.repacked_buffers()):
            contestant = buffers and _contestant(ggml, shape, form, name, buffers, memory)
            if contestant:
                found.append(contestant)
    return found


def _contestant(
    ggml: Ggml, shape: Shape, form: Form, name: str, buffers: int, memory: ExitStack
) -> Contestant | None:
    """None when ggml has no repacked form of this type on this processor."""
    sizes = shape.matrices(form)
    kinds = [name if cols % K_QUANT_COLS == 0 else FALLBACK.get(name, name) for _, cols in sizes]
    rows_bytes = [
        _quantized(ggml, kind, cols) for kind, (_, cols) in zip(kinds, sizes, strict=True)
    ]
    parts = [
        rows.repeat(num_rows // PATTERN_ROWS)
        for rows, (num_rows, _) in zip(rows_bytes, sizes, strict=True)
    ]
    num_bytes = sum(part.numel() for part in parts)
    copies = []
    for _ in range(num_copies(num_bytes)):
        tensors = _put(ggml, kinds, sizes, parts, buffers, memory)
        if tensors is None:
            return None
        copies.append(tensors)

    def weights() -> list[torch.Tensor]:
        return [
            _dequantized(ggml, kind, rows, cols).repeat(num_rows // PATTERN_ROWS, 1)
            for kind, rows, (num_rows, cols) in zip(kinds, rows_bytes, sizes, strict=True)
        ]

    label = f"ggml {name}" + ("" if buffers == ggml.plain_buffers() else " repacked")
    if len(set(kinds)) > 1:
        label += f" (down {kinds[-1]})"
    start = functools.partial(_start, ggml, copies, memory)
    return Contestant(label, BITS[name], num_bytes, TOLERANCE, start, weights)


def _quantized(ggml: Ggml, kind: str, cols: int) -> torch.Tensor:
    """PATTERN_ROWS random rows in ggml's own quantiser, as bytes."""
    weight = random_pattern(PATTERN_ROWS, cols).contiguous()
    out = torch.empty(PATTERN_ROWS * ggml.call("row_size", TYPES[kind], cols), dtype=torch.uint8)
    ggml.call(
        "quantize_chunk",
        TYPES[kind],
        weight.data_ptr(),
        out.data_ptr(),
        0,
        PATTERN_ROWS,
        cols,
        None,
    )
    return out


def _dequantized(ggml: Ggml, kind: str, rows: torch.Tensor, cols: int) -> torch.Tensor:
    out = torch.empty(PATTERN_ROWS, cols)
    to_float = ggml.call("get_type_traits", TYPES[kind]).contents.to_float
    to_float(rows.data_ptr(), out.data_ptr(), out.numel())
    return out


def _put(
    ggml: Ggml,
    kinds: list[str],
    sizes: list[tuple[int, int]],
    parts: list[torch.Tensor],
    buffers: int,
    memory: ExitStack,
) -> list[int] | None:
    """Tensors with these bytes in one buffer of that type; None when it has no kernels for them."""
    context = ggml.context(len(parts) + 2)
    memory.callback(ggml.call, "free", context)
    tensors = [
        ggml.call("new_tensor_2d", context, TYPES[kind], cols, rows)
        for kind, (rows, cols) in zip(kinds, sizes, strict=True)
    ]
    buffer = ggml.call("backend_alloc_ctx_tensors_from_buft", context, buffers)
    memory.callback(ggml.call, "backend_buffer_free", buffer)
    for tensor, part, (_, cols) in zip(tensors, parts, sizes, strict=True):
        scratch = ggml.context(2)
        x = ggml.call("new_tensor_2d", scratch, F32, cols, 1)
        product = ggml.call("mul_mat", scratch, tensor, x)
        supported = ggml.call("backend_dev_supports_op", ggml.device, product)
        ggml.call("free", scratch)
        if not supported:
            return None
        ggml.call("backend_tensor_set", tensor, part.data_ptr(), 0, part.numel())
    return tensors


def _start(
    ggml: Ggml, copies: list[list[int]], memory: ExitStack, x_TK: torch.Tensor
) -> list[Call]:
    return list(_calls(ggml, copies, memory, x_TK))


def _calls(
    ggml: Ggml, copies: list[list[int]], memory: ExitStack, x_TK: torch.Tensor
) -> Iterator[Call]:
    """A graph for each copy, made once; its answer is a view of ggml's memory."""
    num_tokens, cols = x_TK.shape
    x_TK = x_TK.contiguous()
    for tensors in copies:
        context = ggml.context(8)
        memory.callback(ggml.call, "free", context)
        x = ggml.call("new_tensor_2d", context, F32, cols, num_tokens)
        y = ggml.call("mul_mat", context, tensors[0], x)
        if len(tensors) == 3:
            up = ggml.call("mul_mat", context, tensors[1], x)
            middle = ggml.call("swiglu_split", context, y, up)
            y = ggml.call("mul_mat", context, tensors[2], middle)
        graph = ggml.call("new_graph", context)
        ggml.call("build_forward_expand", graph, y)
        buffer = ggml.call("backend_alloc_ctx_tensors", context, ggml.backend)
        memory.callback(ggml.call, "backend_buffer_free", buffer)
        ggml.call("backend_tensor_set", x, x_TK.data_ptr(), 0, x_TK.numel() * 4)
        yield functools.partial(
            _compute, ggml.backend_graph_compute, ggml.backend, graph, _view(ggml, y, num_tokens)
        )


def _view(ggml: Ggml, tensor: int, num_tokens: int) -> torch.Tensor:
    """A float32 tensor's data as [T, N]; its sizes are the first field after type and buffer."""
    num_rows = ctypes.cast(tensor, ctypes.POINTER(ctypes.c_int64))[2]
    data = ggml.call("get_data", tensor)
    values = (ctypes.c_float * (num_rows * num_tokens)).from_address(data)
    return torch.frombuffer(values, dtype=torch.float32).view(num_tokens, num_rows)


def _compute(compute, backend: int, graph: int, answer: torch.Tensor) -> torch.Tensor:
    status = compute(backend, graph)
    if status:
        raise RuntimeError(f"ggml: a graph ended with status {status}")
    return answer
