"""Best without one item each, and with what it does not do: the lines of the table of items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.per_byte.experiment import PAPER_3, Experiment, best, config_of
from expert_store.methods import METHODS, Methods


def ablations(budget: float, calibration: Path | None, alike: Path | None) -> Iterator[Experiment]:
    """Best without one item each, and with what it does not do."""
    whole = METHODS["best"]
    without: dict[str, Methods] = {
        "the searched grid and error feedback (HQQ instead)": replace(
            whole, quantizer="hqq", grids=("affine",)
        ),
        "error feedback (clip search instead)": replace(whole, quantizer="grid"),
        "activation weighting and error feedback": replace(whole, quantizer="grid", weighted=False),
        "refinement planes": replace(whole, repairs=("rank",)),
        "rank blocks": replace(whole, repairs=("plane",)),
        "compensators": replace(whole, repairs=()),
        "the symmetric grid (affine instead)": replace(whole, grids=("affine",)),
        "symmetric factors": replace(whole, factor_grid="affine"),
        "a choice of widths (2 bits, repairs only)": replace(whole, bits=(2,)),
    }

    def one(
        words: str,
        item: str,
        methods: Methods | None,
        read: Path | None = calibration,
        **changes: Any,
    ) -> Experiment:
        return Experiment(
            f"{best(budget)} {words} {item}",
            "ablation",
            config_of("best", read, budget=budget, methods=methods),
            place="ablation",
            base=best(budget),
            item=item,
            **changes,
        )

    for item, methods in without.items():
        yield one("without", item, methods)
    yield one("without", "layer sensitivity", None, no_sensitivity=True)
    if alike is not None:
        yield one("without", "tokens by importance (all alike)", None, alike)
    yield one("with", "an alternation", replace(whole, alternations=1), adds=True)


def recalibrated(budget: float, calibration: Path | None) -> Iterator[Experiment]:
    for label, config in (
        (best(budget), config_of("best", calibration, budget=budget)),
        (PAPER_3, config_of("paper", bits=3)),
    ):
        yield Experiment(
            f"{label}, routers recalibrated",
            "ablation",
            config,
            place="ablation",
            base=label,
            item="recalibrated routers",
            adds=True,
            recalibrated=True,
        )
