"""`python -m benchmarks.cpu_kernels`: gate, measure, write results/cpu-kernels.csv and .md."""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import torch

from benchmarks.cpu_kernels import ggml, onnx_runtime, ours, torch_own
from benchmarks.cpu_kernels.contestant import Contestant, Form, Shape, gate
from benchmarks.cpu_kernels.report import Row, print_row, rows_of, write_report
from benchmarks.cpu_kernels.roofline import Roofline
from benchmarks.cpu_kernels.rounds import take_turns
from benchmarks.record import RESULTS

SHAPES = (Shape(2048, 768), Shape(2048, 1408), Shape(4096, 14336))
TOKENS = (1, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", type=shape, default=SHAPES, metavar="HIDDENxFFN")
    parser.add_argument("--forms", nargs="*", choices=get_args(Form), default=get_args(Form))
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=6, help="for each form and token count")
    parser.add_argument("--only", default="", help="contestants with this in their name")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-kernels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    roofline, rows = Roofline(), []
    with torch.inference_mode():
        for each, form in itertools.product(arguments.shapes, arguments.forms):
            tokens, seconds = tuple(arguments.tokens), arguments.seconds
            rows += measure(each, form, roofline, tokens, seconds, arguments.only)
            gc.collect()  # pools of gigabytes: one at a time
    write_report(arguments.out, rows)


def shape(text: str) -> Shape:
    hidden, _, ffn = text.partition("x")
    return Shape(int(hidden), int(ffn))


def measure(
    shape: Shape,
    form: Form,
    roofline: Roofline,
    tokens: Sequence[int],
    budget_s: float,
    only: str,
) -> list[Row]:
    """Every contestant at every token count; a red gate ends the run before any number."""
    rows = []
    with ExitStack() as memory:
        contestants = [each for each in everyone(shape, form, memory) if only in each.name]
        x_TH = torch.randn(max(tokens), shape.hidden)
        for contestant in contestants:
            gate(contestant, x_TH, tokens)
        for num_tokens in tokens:
            times = take_turns(contestants, x_TH[:num_tokens], roofline, budget_s)
            print(
                f"\n{shape} {form}, {num_tokens} tokens: {times.read_bandwidth / 1e9:.1f} GB/s, "
                f"{times.dot_peak / 1e9:.0f} G products/s"
            )
            for row in rows_of(shape, form, num_tokens, contestants, times):
                print_row(row)
                rows.append(row)
    return rows


def everyone(shape: Shape, form: Form, memory: ExitStack) -> list[Contestant]:
    return [
        *ours.contestants(shape, form),
        *ggml.contestants(shape, form, memory),
        *onnx_runtime.contestants(shape, form),
        *torch_own.contestants(shape, form),
    ]


if __name__ == "__main__":
    main()
