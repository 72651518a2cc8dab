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

from benchmarks.record import RESULTS, provenance, write_rows
from expert_store.curves import measure_choices
from expert_store.matrix.moments import Moment, MomentSum
from expert_store.matrix.weighting import Weighting
from expert_store.matrix_recipe import compress_matrix
from expert_store.methods import METHODS, Methods
from expert_store.plan import MatrixPlan
from expert_store.recipe import heard

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
    paper_ratio: float  # of the paper's matrix_s in the same run to this one's
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
LARGEST_OF_BEST = 1 << 24
"""Weights of a matrix that best is timed on; a larger one takes many minutes with its curves."""


def measure(model: str) -> Iterator[SpeedRow]:
    """A row per recipe for one of `SHAPES`."""
    rows, cols = SHAPES[model]
    weight_NK = heavy_tailed(rows, cols)
    moments = MomentSum(cols)
    mix_K = torch.rand(cols) + 0.1
    moments.add(torch.randn(TOKENS, cols) * mix_K)
    paper_s = 0.0
    for case in CASES:
        if case.recipe == "best" and weight_NK.numel() > LARGEST_OF_BEST:
            continue
        how = METHODS[case.recipe]
        moment = moments.moment() if case.calibrated else None
        bare = MatrixPlan(case.plan.bits, case.plan.grid)
        codes_s = seconds(weight_NK, bare, case, moment)
        matrix_s = seconds(weight_NK, case.plan, case, moment)
        curves_s = 0.0
        if how.allocation == "solver":
            start_s = time.process_time()
            measure_choices(weight_NK, how, weighting_of(how, moment), factor_bits=FACTOR_BITS)
            curves_s = time.process_time() - start_s
        paper_s = paper_s or matrix_s
        total_s = matrix_s * MODELS[model] + curves_s * SAMPLED
        yield SpeedRow(
            model=model,
            rows=rows,
            cols=cols,
            recipe=case.label,
            blocks=" ".join(case.plan.blocks),
            codes_s=round(codes_s, 2),
            matrix_s=round(matrix_s, 2),
            curves_s=round(curves_s, 1),
            paper_ratio=round(paper_s / matrix_s, 2),
            minutes_2_cores=round(total_s / CORES[0] / 60, 1),
            minutes_64_cores=round(total_s / CORES[1] / 60, 2),
            experts_per_minute_2_cores=round(60 * CORES[0] / (3 * matrix_s), 2),
        )


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
        "moment for every matrix anew; making the calibration is not counted.",
        "best was not timed on the large shape: its feedback alone takes minutes there.",
        "",
        "| shape | recipe | codes s | whole matrix s | times faster than paper | curves s a sample "
        "| model on 2 cores, min | on 64 cores, min | experts/min on 2 cores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.rows}x{row.cols} ({row.model}) | {row.recipe} | {row.codes_s} | "
            f"{row.matrix_s} | {row.paper_ratio} | {row.curves_s or '-'} | {row.minutes_2_cores} | "
            f"{row.minutes_64_cores} | {row.experts_per_minute_2_cores} |"
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
