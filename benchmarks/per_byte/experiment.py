"""What an experiment of `benchmarks.quality_per_byte` is, and the labels that others refer to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from expert_store.config import CompressionConfig
from expert_store.methods import METHODS

PAPER = "paper 2-bit, rank 16, Top-1"
PAPER_3 = "paper 3-bit, rank 16, Top-1"
PAPER_4 = "paper 4-bit, rank 16, Top-1"
PAPER_64 = "paper 2-bit, rank 64, Top-1"
ORIGINAL = "original bf16"

Place = Literal["front", "ablation", "policy", "prefix", "skip"]
"""The section of the page that a variant belongs to."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One variant.

    - base: what it is held against, by label, in sections other than the front;
    - item: what it lacks, or with `adds` has more, than its base: a line of the table of items;
    - recalibrated: its store is base's with its routers fitted again;
    - budget_of: the label of a measured variant whose bits moved become the budget;
    - equal_bytes_to: likewise, for the threshold of a restore policy;
    - no_sensitivity: its calibration without the layers' measured sensitivities.
    """

    label: str
    family: str
    config: CompressionConfig
    place: Place = "front"
    policies: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    budget_of: str | None = None
    equal_bytes_to: str | None = None
    no_sensitivity: bool = False
    item: str | None = None
    adds: bool = False
    recalibrated: bool = False


def best(budget: float) -> str:
    """The label of recipe best at a budget."""
    return f"best {budget:g}"


def config_of(recipe: str, calibration: Path | None = None, **changes: Any) -> CompressionConfig:
    """Without a calibration a recipe that needs one gets a folder that is none: no config can be
    without, and the list of experiments leaves it out."""
    if calibration is None and METHODS[recipe].needs_calibration:
        calibration = Path("missing")
    return CompressionConfig(recipe=recipe, calibration=calibration, **changes)
