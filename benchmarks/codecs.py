"""Bits, error and speed of the error-bounded codecs and of the lossless wire form, on real weights.

`python -m benchmarks.codecs [MODEL ...]` writes a table; by default the bundled model and, where it
was assembled, smol-moe. Speeds are of process CPU time on one thread, the best of three.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.codec_measures import Weights, relative_error, timed
from benchmarks.codec_wire import transport_table, wire_forms, wire_table
from benchmarks.record import RESULTS, provenance
from cluster.stores import bundled_store
from expert_store.checkpoint import Checkpoint
from expert_store.codecs import cuszp, sz3
from expert_store.codecs.bound import ErrorBound, largest_error
from kernels import ops
from kernels.packing import bf16_weight
from models import MIXTRAL_MINI

OUT = RESULTS / "codecs.md"
SMOL = Path.home() / ".cache" / "moetier" / "models" / "smol-moe"
ROW_BOUNDS = (0.03, 0.1, 0.3, 0.5, 0.7, 1.0)
OTHER_BOUNDS = (0.1, 0.5)


@dataclass(frozen=True, slots=True)
class CodecRow:
    """Means over the matrices of one model. Speeds in GB of bfloat16 weights per CPU second."""

    codec: str
    bound: str
    bits: float  # per weight
    error: float  # relative Frobenius error of what is served
    largest: float  # largest error of any weight over its bound
    encode_gb_s: float
    decode_gb_s: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="*", type=Path, help="checkpoint folders")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    models = args.model or [MIXTRAL_MINI, *([SMOL] if SMOL.is_dir() else [])]
    parts = [HEAD.format(provenance=provenance())]
    for model in models:
        weights = matrices(model)
        print(f"{model.name}: {len(weights)} matrices", flush=True)
        parts.append(f"## {model.name}\n\nMatrices: {', '.join(weights)}.")
        parts.append("### Does prediction help?\n\n" + codec_table(predictions(weights)))
        parts.append("### Bounds\n\n" + codec_table(bounds(weights)))
        parts.append("### Low-bit codes between hosts\n\n" + wire_table(wire_forms(weights)))
    parts.append("## Over a real gRPC server\n\n" + transport_table(bundled_store()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n\n".join(parts) + "\n")
    print(f"wrote {args.out}")
    return 0


def matrices(model: Path) -> Weights:
    """Gate and down of an expert of the first, a middle and the last MoE layer."""
    checkpoint = Checkpoint(model)
    layers = sorted({key.layer for key in checkpoint.keys})
    found = {}
    for layer in dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])):
        expert = checkpoint.expert(min(k for k in checkpoint.keys if k.layer == layer))
        for name in ("gate", "down"):
            weight = getattr(expert, name)
            rows, cols = weight.shape
            found[f"layer {layer} {name} [{rows}, {cols}]"] = weight.float()
    return found


def predictions(weights: Weights) -> Iterator[CodecRow]:
    for value in (0.1, 0.5):
        bound = partial(ErrorBound, value, "row")
        for predictor in ("none", "interpolation", "lorenzo"):
            yield _sz3(weights, bound, predictor)
        for differenced in (False, True):
            yield _cuszp(weights, bound, differenced)


def bounds(weights: Weights) -> Iterator[CodecRow]:
    for mode, values in (("row", ROW_BOUNDS), ("group", OTHER_BOUNDS), ("absolute", OTHER_BOUNDS)):
        for value in values:
            for measure in (_sz3, _cuszp):
                yield measure(weights, partial(ErrorBound, value, mode))


def _sz3(
    weights: Weights, bound: Callable[[], ErrorBound], predictor: sz3.Predictor = "none"
) -> CodecRow:
    def serve(data: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        return bf16_weight(sz3.decode(data, rows, cols))

    name = "sz3" if predictor == "none" else f"sz3, {predictor}"
    return _measured(name, weights, bound(), partial(sz3.encode, predictor=predictor), serve)


def _cuszp(
    weights: Weights, bound: Callable[[], ErrorBound], differenced: bool = False
) -> CodecRow:
    def serve(data: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        return ops.dequantize(cuszp.decode(data, rows, cols))

    name = "cuszp, differenced" if differenced else "cuszp"
    return _measured(name, weights, bound(), partial(cuszp.encode, differenced=differenced), serve)


def _measured(
    name: str,
    weights: Weights,
    bound: ErrorBound,
    encode: Callable[..., torch.Tensor],
    serve: Callable[..., torch.Tensor],
) -> CodecRow:
    bits, errors, largest, encode_s, decode_s = [], [], [], [], []
    for weight in weights.values():
        own = bound
        if bound.mode == "absolute":  # of the whole matrix's rms, to stand beside the others
            own = ErrorBound(bound.value * float(weight.double().pow(2).mean().sqrt()), "absolute")
        seconds, data = timed(partial(encode, weight, own))
        encode_s.append(seconds)
        seconds, served = timed(partial(serve, data, *weight.shape))
        decode_s.append(seconds)
        bits.append(8 * data.numel() / weight.numel())
        errors.append(relative_error(served, weight))
        largest.append(largest_error(weight, served, own.of(weight)))
    assert max(largest) <= 1, f"{name} {bound}: the bound is broken, no table is written"
    gigabytes = 2e-9 * sum(weight.numel() for weight in weights.values())
    text = f"{bound.mode} {bound.value:g}"
    return CodecRow(
        name, text, fmean(bits), fmean(errors), max(largest), gigabytes / sum(encode_s),
        gigabytes / sum(decode_s),
    )  # fmt: skip


def codec_table(rows: Iterable[CodecRow]) -> str:
    lines = [
        "| codec | bound | bits/weight | relative error | D x 4^bits | largest error / bound "
        "| encode GB/s | decode GB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.codec} | {row.bound} | {row.bits:.3f} | {row.error:.4f} | "
            f"{row.error**2 * 4**row.bits:.2f} | {row.largest:.4f} | {row.encode_gb_s:.3f} | "
            f"{row.decode_gb_s:.2f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


HEAD = """# Error-bounded codecs and the wire form of low-bit codes

{provenance} Made by `python -m benchmarks.codecs`. One thread, CPU time, best of 3.

- Bounds: `row 0.1` is 0.1 of the root mean square of the weight's row, `group` of its group of 64,
  `absolute` of the whole matrix. Every weight served was checked against its bound.
- sz3 (library `pysz`) is served as bfloat16, cuszp (our block code, native decoder) as float32;
  their speeds are in GB of bfloat16 weights. Encoding includes the check of the bound.
- The wire form is lossless: zstd over rearranged tiles; its speeds are in GB of the record.
- D x 4^bits is the squared relative error times 4 to the bits per weight: what is left of it is how
  well the bits are used. Rate-distortion theory allows a Gaussian 1.00, uniform steps with ideal
  entropy coding 1.42 at many bits. Lower is better."""


if __name__ == "__main__":
    raise SystemExit(main())
