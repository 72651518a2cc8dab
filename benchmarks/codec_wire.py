"""The lossless wire form of low-bit codes: its size, its speed, and a whole store over gRPC."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.codec_measures import Weights, relative_error, timed
from expert_store.codecs.entropy import compress, decompress, matrix_sections
from expert_store.format import load_manifest
from expert_store.listing import Listing
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.hqq import quantize_hqq
from expert_store.matrix.rtn import quantize_rtn
from expert_store.rpc import GrpcSource, RecordServer
from expert_store.segment import Segment
from expert_store.types import RecordKind, RecordRequest
from expert_store.wire import Compression
from kernels import ops
from kernels.packing import pack_bf16, unpack
from kernels.types import QuantizedMatrix


@dataclass(frozen=True, slots=True)
class WireRow:
    """Likewise of the wire form of low-bit codes; speeds in GB of the record."""

    quantiser: str
    bits: float  # per weight as stored
    wire_bits: float
    code_entropy: float | None  # bits per code of the codes' histogram
    error: float
    encode_gb_s: float
    decode_gb_s: float


def wire_forms(weights: Weights) -> Iterator[WireRow]:
    quantisers: dict[str, Callable[[torch.Tensor, int], QuantizedMatrix]] = {
        "min/max": partial(quantize_rtn, grid="affine"),
        "HQQ": quantize_hqq,
        "grid affine": partial(quantize_grid, grid="affine"),
        "min/max symmetric": partial(quantize_rtn, grid="symmetric"),
        "grid symmetric": partial(quantize_grid, grid="symmetric"),
    }
    for name, quantise in quantisers.items():
        for bits in (1, 2, 3, 4) if "symmetric" in name else (2, 3, 4):
            yield _wire(weights, f"{name} {bits}", partial(quantise, bits=bits))
    yield _wire(weights, "bfloat16", pack_bf16)


def _wire(
    weights: Weights, name: str, quantise: Callable[[torch.Tensor], QuantizedMatrix]
) -> WireRow:
    stored = wired = total = 0
    encode_s = decode_s = 0.0
    errors, entropies = [], []
    for weight in weights.values():
        matrix = quantise(weight)
        sections = matrix_sections(matrix.rows, matrix.cols, matrix.bits, matrix.grid)
        seconds, frame = timed(partial(compress, matrix.data, sections))
        encode_s += seconds
        seconds, back = timed(partial(decompress, frame, matrix.data.numel()))
        decode_s += seconds
        assert torch.equal(back, matrix.data), f"{name}: not the same bytes, no table is written"
        stored, wired = stored + matrix.data.numel(), wired + len(frame)
        total += weight.numel()
        errors.append(relative_error(ops.dequantize(matrix), weight))
        if matrix.bits != 16:
            entropies.append(_entropy(unpack(matrix)[0], 2**matrix.bits))
    return WireRow(
        name, 8 * stored / total, 8 * wired / total, fmean(entropies) if entropies else None,
        fmean(errors), stored / encode_s / 1e9, stored / decode_s / 1e9,
    )  # fmt: skip


def _entropy(codes: torch.Tensor, num_codes: int) -> float:
    counts = torch.bincount(codes.flatten().int(), minlength=num_codes).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log2()).sum())


def wire_table(rows: Iterable[WireRow]) -> str:
    lines = [
        "| codes | relative error | stored bits/weight | wire bits/weight | share | entropy of the "
        "codes | D x 4^wire bits | encode GB/s | decode GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        entropy = "" if row.code_entropy is None else f"{row.code_entropy:.3f}"
        lines.append(
            f"| {row.quantiser} | {row.error:.4f} | {row.bits:.3f} | {row.wire_bits:.3f} | "
            f"{row.wire_bits / row.bits:.1%} | {entropy} | "
            f"{row.error**2 * 4**row.wire_bits:.2f} | {row.encode_gb_s:.2f} | "
            f"{row.decode_gb_s:.2f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def transport_table(store: Path) -> str:
    """All codes and all factors of a store over loopback gRPC, twice, plain and compressed."""
    lines = [
        f"Every record of the bundled store ({load_manifest(store).recipe.name} recipe), fetched "
        "twice; the second time the server has the frames. Wall time on loopback, where bytes cost "
        "nothing: what compression costs, not what it saves.\n",
        "| records | compression | MB of records | MB on the wire | share | first s | again s |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds: tuple[RecordKind, ...] = ("codes", "factors")
    for kind in kinds:
        for compression in ("none", "zstd"):
            lines.append(_transported(store, kind, compression))
            print(lines[-1], flush=True)
    return "\n".join(lines)


def _transported(store: Path, kind: RecordKind, compression: Compression) -> str:
    with ExitStack() as stack:
        segment = stack.enter_context(closing(Segment(store)))
        manifest = segment.manifest
        server = stack.enter_context(closing(RecordServer(segment)))
        listing = Listing("bench", "records", manifest.version, "node", server.addresses)
        source = GrpcSource(manifest, lambda: [listing], compression=compression, deadline_s=600)
        stack.enter_context(closing(source))
        requests = [
            RecordRequest(key, kind)
            for key, info in manifest.experts.items()
            if kind == "codes" or info.factors is not None
        ]
        truth = segment.fetch(requests)
        seconds = []
        for _ in range(2):
            start_s = time.perf_counter()
            found = source.fetch(requests)
            seconds.append(time.perf_counter() - start_s)
        assert all(map(torch.equal, truth, found)), "not the same bytes, no table is written"
        records, received = source.record_bytes / 2, source.bytes_moved[1] / 2
    return (
        f"| {kind} | {compression} | {records / 1e6:.2f} | {received / 1e6:.2f} | "
        f"{received / records:.1%} | {seconds[0]:.2f} | {seconds[1]:.2f} |"
    )
