"""What `benchmarks.quality_per_byte` compares: every variant by name, most important first.

A list of plain values; what is made and measured of it is `benchmarks/per_byte/runner.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from expert_store.config import CompressionConfig
from expert_store.methods import METHODS, Methods

BUDGETS = (2.5, 3.0, 2.25, 4.0, 3.5, 2.75)
"""Bits per expert weight moved, most important first."""
ABLATED = (2.5, 3.0)
BOUNDS = ("row:0.6", "row:0.3", "row:0.15")
PAPER = "paper 2-bit, rank 16, Top-1"
PAPER_3 = "paper 3-bit, rank 16, Top-1"
PAPER_4 = "paper 4-bit, rank 16, Top-1"
PAPER_64 = "paper 2-bit, rank 64, Top-1"
ORIGINAL = "original bf16"

CACHED = (ORIGINAL, PAPER, PAPER_3, "best 2.5", "best 3", "mixed hqq 2.5", "fast 3")
"""Whose bytes are counted at every cache size and batch; of the others without, one sequence."""

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


def experiments(top_k: int, calibration: Path | None) -> list[Experiment]:
    """All of them; without a calibration those that need none. `top_k` experts serve a token."""
    every = [
        *_original(),
        *_paper(top_k),
        *_budgets(calibration),
        *_matched(calibration),
        *_ablations(ABLATED[0], calibration),
        *_recalibrated(calibration),
        *_static(calibration),
        *_policies(calibration),
        *_prefixes(calibration),
        *_skips(),
        *_error_bounded(),
        *_other_ranks(),
        *_ablations(ABLATED[1], calibration),
    ]
    return [item for item in every if calibration is not None or not _needs(item)]


def chosen(every: Sequence[Experiment], prefixes: Sequence[str]) -> list[Experiment]:
    """Those whose labels begin so, the original, and all that they are held against.

    Raises ValueError for a prefix that no label has.
    """
    for prefix in prefixes:
        if not any(item.label.startswith(prefix) for item in every):
            labels = ", ".join(item.label for item in every)
            raise ValueError(f"--only: got {prefix!r}, with which none begins of: {labels}")
    wanted = {ORIGINAL}
    for item in reversed(every):  # what an experiment needs stands before it
        if item.label in wanted or item.label.startswith(tuple(prefixes)):
            needed = (item.label, item.base, item.budget_of, item.equal_bytes_to)
            wanted |= {label for label in needed if label is not None}
    return [item for item in every if item.label in wanted]


def _needs(item: Experiment) -> bool:
    return item.config.how.needs_calibration


def _config(recipe: str, calibration: Path | None = None, **changes: Any) -> CompressionConfig:
    """Without a calibration a recipe that needs one gets a folder that is none: no config can be
    without, and `experiments` leaves it out."""
    if calibration is None and METHODS[recipe].needs_calibration:
        calibration = Path("missing")
    return CompressionConfig(recipe=recipe, calibration=calibration, **changes)


def _original() -> Iterator[Experiment]:
    yield Experiment(ORIGINAL, "original", _config("original"))


def _paper(top_k: int) -> Iterator[Experiment]:
    two = _config("paper", bits=2)
    yield Experiment(PAPER, "paper", two)
    for n in sorted({0, *range(2, min(top_k, 4) + 1), top_k} - {1}):
        text = f"paper 2-bit, rank 16, Top-{n}" + (" (all)" if n == top_k else "")
        yield Experiment(text, "paper, other n", two, policies={"top_n": n})
    random = {"restore": "random", "top_n": 1}
    yield Experiment("paper 2-bit, rank 16, random 1", "paper, other n", two, policies=random)
    three = _config("paper", bits=3)
    yield Experiment(PAPER_3, "paper", three)
    yield Experiment("paper 3-bit, rank 16, Top-0", "paper, other n", three, policies={"top_n": 0})
    yield Experiment(PAPER_4, "paper", _config("paper", bits=4))


def _budgets(calibration: Path | None) -> Iterator[Experiment]:
    """At equal bytes: ours, ours with its bytes in wider codes alone, and both simpler ones."""
    codes_only = replace(METHODS["best"], repairs=())
    for budget in BUDGETS:
        yield Experiment(best(budget), "best", _config("best", calibration, budget=budget))
        yield Experiment(
            f"mixed by best's quantiser {budget:g}",
            "mixed, best's quantiser",
            _config("best", calibration, budget=budget, methods=codes_only),
        )
        yield Experiment(
            f"mixed hqq {budget:g}", "mixed hqq", _config("mixed", calibration, budget=budget)
        )
        yield Experiment(f"fast {budget:g}", "fast", _config("fast", budget=budget))
        if calibration is not None:
            yield Experiment(
                f"fast with a calibration {budget:g}",
                "fast with a calibration",
                _config("fast", calibration, budget=budget),
            )


def _matched(calibration: Path | None) -> Iterator[Experiment]:
    """Ours at the very bytes of the paper's recipe: best, and without any calibration fast."""
    recipes = {
        "best": _config("best", calibration, budget=2.5),
        "fast": _config("fast", budget=2.5),
    }
    for label in (PAPER_3, PAPER, PAPER_4):
        for recipe, config in recipes.items():
            yield Experiment(f"{recipe} at the bytes of {label}", recipe, config, budget_of=label)


def _ablations(budget: float, calibration: Path | None) -> Iterator[Experiment]:
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

    def one(words: str, item: str, methods: Methods | None, **changes: Any) -> Experiment:
        return Experiment(
            f"{best(budget)} {words} {item}",
            "ablation",
            _config("best", calibration, budget=budget, methods=methods),
            place="ablation",
            base=best(budget),
            item=item,
            **changes,
        )

    for item, methods in without.items():
        yield one("without", item, methods)
    yield one("without", "layer sensitivity", None, no_sensitivity=True)
    yield one("with", "an alternation", replace(whole, alternations=1), adds=True)


def _recalibrated(calibration: Path | None) -> Iterator[Experiment]:
    for label, config in (
        (best(ABLATED[0]), _config("best", calibration, budget=ABLATED[0])),
        (PAPER_3, _config("paper", bits=3)),
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


def _static(calibration: Path | None) -> Iterator[Experiment]:
    quantizers = {"hqq": "HQQ", "rtn": "round to nearest", "grid": "clip search"}
    for bits in (2, 3, 4):
        for name, words in quantizers.items():
            methods = replace(METHODS["static"], quantizer=name)  # type: ignore[arg-type]
            yield Experiment(
                f"static {bits}-bit, {words}",
                f"static, {words}",
                _config("static", bits=bits, methods=methods),
            )
        methods = replace(METHODS["static"], quantizer="feedback", weighted=True)
        yield Experiment(
            f"static {bits}-bit, error feedback",
            "static, error feedback",
            _config("static", calibration or Path("missing"), bits=bits, methods=methods),
        )


def _policies(calibration: Path | None) -> Iterator[Experiment]:
    """Which pairs are restored, at equal mean bytes."""
    stores = {
        PAPER_64: _config("paper", bits=2, avg_rank=64),
        best(2.5): _config("best", calibration, budget=2.5),
    }
    for label, config in stores.items():
        if label == PAPER_64:
            yield Experiment(label, "paper", config)
        for rule in ("mass", "benefit", "random"):
            yield Experiment(
                f"{label}, restored by {rule}",
                rule,
                config,
                place="policy",
                policies={"restore": rule},
                base=label,
                equal_bytes_to=label,
                item=f"restoring by {rule}",
                adds=True,
            )


def _prefixes(calibration: Path | None) -> Iterator[Experiment]:
    stores = {
        best(2.5): _config("best", calibration, budget=2.5),
        "fast 2.5": _config("fast", budget=2.5),
        PAPER_64: _config("paper", bits=2, avg_rank=64),
    }
    for label, config in stores.items():
        for share in (0.0, 0.25, 0.5, 0.75):
            yield Experiment(
                f"{label}, {share:.0%} of compensators",
                label,
                config,
                place="prefix",
                policies={"factor_share": share},
                base=label,
            )


def _skips() -> Iterator[Experiment]:
    for skip in (0.05, 0.1, 0.2):
        yield Experiment(
            f"{PAPER}, skip < {skip:g}",
            "paper",
            _config("paper", bits=2),
            place="skip",
            policies={"skip_below": skip},
            base=PAPER,
        )
        yield Experiment(
            f"{ORIGINAL}, skip < {skip:g}",
            "original",
            _config("original"),
            place="skip",
            policies={"skip_below": skip},
            base=ORIGINAL,
        )


def _error_bounded() -> Iterator[Experiment]:
    for bound in BOUNDS:
        for codec in ("sz3", "cuszp"):
            yield Experiment(f"{codec} {bound}", codec, _config(codec, error_bound=bound))


def _other_ranks() -> Iterator[Experiment]:
    yield Experiment("paper 2-bit, rank 32, Top-1", "paper", _config("paper", bits=2, avg_rank=32))
    yield Experiment("milo 2-bit, rank 16, Top-1", "milo", _config("milo", bits=2))
    everyone = {"restore": "all"}
    yield Experiment("milo 2-bit, rank 16, all", "milo", _config("milo", bits=2), policies=everyone)
