"""How long compressing takes: CPU-seconds per matrix by recipe, and what that means for a model.

`python -m benchmarks.compress_speed` measures one matrix of each shape through the code that
`moetier compress` runs, on one thread, in process CPU time, all recipes in the same run. Times for
whole models are those figures multiplied by their number of matrices and divided by cores: no model
of that size was compressed here.

Legend: N rows, K cols.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from hqq.core.quantize import Quantizer

from benchmarks.record import RESULTS, provenance, write_rows
from expert_store.curves import measure_choices
from expert_store.matrix.moments import Moment
from expert_store.matrix.weighting import Weighting
from expert_store.matrix_recipe import compress_matrix
from expert_store.methods import METHODS, Methods
from expert_store.plan import MatrixPlan
from expert_store.recipe import heard
from expert_store.statistics import MAX_FULL_SIZE
from kernels.types import GROUP_SIZE

SHAPES = {"Mixtral-8x7B": (4096, 14336), "DeepSeek-V2-Lite": (2048, 1408)}
"""[N, K] of one matrix; gate, up and down have the same number of weights."""
MODELS = {"Mixtral-8x7B": 32 * 8 * 3, "DeepSeek-V2-Lite": 26 * 64 * 3}
"""Layers x routed experts x matrices."""
SAMPLED = 6 * 3
"""Matrices whose curves a recipe with a solver measures first, whatever the model's size."""
CORES = (2, 64)
TOKENS = 2048
FACTOR_BITS = 3
RANK_32 = ("rank", "rank")
REPORT = RESULTS / "compress-speed.md"


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One recipe on one matrix. Times are process CPU seconds of one thread."""

    model: str
    rows: int
    cols: int
    recipe: str
    blocks: str
    codes_s: float  # the matrix, its repairs left out
    matrix_s: float  # codes, repairs and their figures
    curves_s: float  # measuring the solver's choices, per sampled matrix; 0 without a solver
    paper_ratio: float  # of our paper recipe's matrix_s in the same run to this one's
    library_ratio: float  # likewise, of the libraries'
    minutes_2_cores: float  # of the whole model, multiplied
    minutes_64_cores: float
    experts_per_minute_2_cores: float


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe; `calibrated` when it is given a calibration, whose root it then has to take."""

    label: str
    recipe: str
    plan: MatrixPlan
    calibrated: bool = False


CASES = (
    Case("paper", "paper", MatrixPlan(2, "affine", RANK_32)),
    Case("fast", "fast", MatrixPlan(2, "symmetric", RANK_32)),
    Case("fast with a calibration", "fast", MatrixPlan(2, "symmetric", RANK_32), calibrated=True),
    Case("best", "best", MatrixPlan(2, "symmetric", RANK_32), calibrated=True),
)
LIBRARIES = "paper, by the libraries alone"
LARGEST_CURVES_OF_BEST = 1 << 24
"""Weights of a matrix that best's curves are timed on; a larger one takes many minutes."""


def measure(model: str) -> Iterator[SpeedRow]:
    """A row per recipe for one of `SHAPES`."""
    rows, cols = SHAPES[model]
    weight_NK = heavy_tailed(rows, cols)
    seen = seen_moment(cols)
    libraries_s = library_seconds(weight_NK)
    paper_s = 0.0
    for case in CASES:
        how = METHODS[case.recipe]
        moment = seen if case.calibrated else None
        bare = MatrixPlan(case.plan.bits, case.plan.grid)
        codes_s = seconds(weight_NK, bare, case, moment)
        matrix_s = seconds(weight_NK, case.plan, case, moment)
        curves_s = 0.0
        too_large = case.label == "best" and weight_NK.numel() > LARGEST_CURVES_OF_BEST
        if how.allocation == "solver" and not too_large:
            start_s = time.process_time()
            measure_choices(weight_NK, how, weighting_of(how, moment), factor_bits=FACTOR_BITS)
            curves_s = time.process_time() - start_s
        paper_s = paper_s or matrix_s
        times = codes_s, matrix_s, curves_s
        blocks = " ".join(case.plan.blocks)
        yield _row(model, case.label, blocks, times, (paper_s, libraries_s[1]))
        if case.label == "paper":
            yield _row(model, LIBRARIES, blocks, libraries_s, (paper_s, libraries_s[1]))


def _row(
    model: str,
    recipe: str,
    blocks: str,
    times: tuple[float, float, float],
    compared: tuple[float, float],
) -> SpeedRow:
    codes_s, matrix_s, curves_s = times
    rows, cols = SHAPES[model]
    total_s = matrix_s * MODELS[model] + curves_s * SAMPLED
    return SpeedRow(
        model=model,
        rows=rows,
        cols=cols,
        recipe=recipe,
        blocks=blocks,
        codes_s=round(codes_s, 2),
        matrix_s=round(matrix_s, 2),
        curves_s=round(curves_s, 1),
        paper_ratio=round(compared[0] / matrix_s, 2),
        library_ratio=round(compared[1] / matrix_s, 2),
        minutes_2_cores=round(total_s / CORES[0] / 60, 1),
        minutes_64_cores=round(total_s / CORES[1] / 60, 2),
        experts_per_minute_2_cores=round(60 * CORES[0] / (3 * matrix_s), 2),
    )


def library_seconds(weight_NK: torch.Tensor) -> tuple[float, float, float]:
    """CPU seconds of codes, and of all, where hqq quantises the matrix whole and torch's own
    randomised SVD, with its defaults, finds the factors, which hqq quantises too."""
    start_s = time.process_time()
    residual_NK = weight_NK - _by_hqq(weight_NK, 2)
    codes_s = time.process_time() - start_s
    left_NR, value_R, right_KR = torch.svd_lowrank(residual_NK, q=32)
    root_R = value_R.sqrt()
    for factor in ((left_NR * root_R).T, (right_KR * root_R).T):
        _by_hqq(factor.contiguous(), FACTOR_BITS)
    return codes_s, time.process_time() - start_s, 0.0


def _by_hqq(values_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """The library's codes, and what they stand for."""
    codes, meta = Quantizer.quantize(
        values_NK, nbits=bits, group_size=GROUP_SIZE, axis=1, bitpack=False, device="cpu"
    )
    restored: torch.Tensor = (codes.float() - meta["zero"]) * meta["scale"]
    return restored.reshape(values_NK.shape)


def seen_moment(cols: int) -> Moment:
    """Of `TOKENS` random inputs, in the form that a calibration keeps for so many."""
    x_TK = torch.randn(TOKENS, cols) * (torch.rand(cols) + 0.1)
    if cols <= MAX_FULL_SIZE:
        return Moment(x_TK.T @ x_TK / TOKENS)
    x_GTg = x_TK.view(TOKENS, -1, GROUP_SIZE).transpose(0, 1)
    return Moment(torch.bmm(x_GTg.mT, x_GTg) / TOKENS)


def seconds(weight_NK: torch.Tensor, plan: MatrixPlan, case: Case, moment: Moment | None) -> float:
    """CPU seconds of one matrix through a recipe, with the root of its moment."""
    how = METHODS[case.recipe]
    start_s = time.process_time()
    weighting = weighting_of(how, moment)
    compress_matrix(weight_NK, "gate", plan, how, weighting, factor_bits=FACTOR_BITS)
    return time.process_time() - start_s


def weighting_of(how: Methods, moment: Moment | None) -> Weighting:
    return Weighting.of() if moment is None else Weighting.of(heard(moment, how))


def heavy_tailed(rows: int, cols: int) -> torch.Tensor:
    """A Student-t weight with 4 degrees of freedom, as heavy-tailed as trained ones get."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, cols, generator=generator)
    square = torch.stack([torch.randn(rows, cols, generator=generator) ** 2 for _ in range(4)])
    return 0.02 * normal / (square.mean(dim=0)).sqrt()


def page(rows: Sequence[SpeedRow]) -> str:
    """The report."""
    lines = [
        "# Compressing: CPU-seconds per matrix, and whole models by multiplication",
        "",
        provenance(),
        "",
        "One matrix of each shape through the code of `moetier compress`, 2-bit codes and rank 32,",
        "process CPU time on one thread, all recipes in one run. Whole models: that figure times",
        "their matrices (768 and 4992), plus the solver's sample curves, over the cores; nothing",
        "of that size was compressed here. A recipe that reads a calibration takes the root of its",
        "moment for every matrix anew; making the calibration is not counted. Moments are in the",
        "form that a calibration keeps: in full up to 2048 inputs, else in blocks. By libraries",
        "alone: hqq on the whole matrix and its factors, torch.svd_lowrank with its defaults; our",
        "paper recipe gives hqq pieces that fit the cache, and takes an exact SVD. Curves of best",
        "were not timed on the large shape: its times for a whole model lack them.",
        "",
        "| shape | recipe | codes s | whole matrix s | times faster than paper "
        "| than the libraries | curves s a sample | model on 2 cores, min | on 64 cores, min "
        "| experts/min on 2 cores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.rows}x{row.cols} ({row.model}) | {row.recipe} | {row.codes_s} | "
            f"{row.matrix_s} | {row.paper_ratio} | {row.library_ratio} | {row.curves_s or '-'} | "
            f"{row.minutes_2_cores} | {row.minutes_64_cores} | {row.experts_per_minute_2_cores} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), action="append")
    chosen = parser.parse_args(argv).model or sorted(SHAPES)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for model in chosen:
        for row in measure(model):
            rows.append(row)
            print(row, flush=True)
    write_rows(REPORT.with_suffix(".csv"), rows)
    REPORT.write_text(page(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
