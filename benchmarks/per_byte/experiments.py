"""What `benchmarks.quality_per_byte` compares: every variant by name, most important first.

A list of plain values; what is made and measured of it is `benchmarks/per_byte/runner.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.per_byte.ablations import ablations, recalibrated
from benchmarks.per_byte.experiment import (
    ORIGINAL,
    PAPER,
    PAPER_3,
    PAPER_4,
    PAPER_64,
    Experiment,
    best,
    config_of,
)
from expert_store.methods import METHODS

BUDGETS = (2.5, 3.0, 2.25, 4.0, 3.5, 2.75)
"""Bits per expert weight moved, most important first."""
ABLATED = (2.5, 3.0, 4.0)
BOUNDS = ("row:0.6", "row:0.3", "row:0.15")
CACHED = (ORIGINAL, PAPER, PAPER_3, "best 2.5", "best 3", "mixed hqq 2.5", "fast 3")
"""Whose bytes are counted at every cache size and batch; of the others without, one sequence."""


def experiments(
    top_k: int, calibration: Path | None, alike: Path | None = None
) -> list[Experiment]:
    """All of them; without a calibration those that need none. `top_k` experts serve a token;
    `alike` is a calibration of the same texts in which every token counts the same."""
    every = [
        *_original(),
        *_paper(top_k),
        *_budgets(calibration),
        *_matched(calibration),
        *ablations(ABLATED[0], calibration, alike),
        *recalibrated(ABLATED[0], calibration),
        *_static(calibration),
        *_policies(calibration),
        *_prefixes(calibration),
        *_skips(),
        *_error_bounded(),
        *_other_ranks(),
        *ablations(ABLATED[1], calibration, alike),
        *ablations(ABLATED[2], calibration, alike),
    ]
    return [item for item in every if calibration is not None or not _needs(item)]


def chosen(
    every: Sequence[Experiment], prefixes: Sequence[str], labels: Sequence[str] = ()
) -> list[Experiment]:
    """Those whose labels begin so, those with these very labels, the original, and all that they
    are held against.

    Raises ValueError for a prefix or a label that is none.
    """
    known = [item.label for item in every]
    for prefix in prefixes:
        if not any(label.startswith(prefix) for label in known):
            raise ValueError(
                f"--only: got {prefix!r}, with which none begins of: {', '.join(known)}"
            )
    for label in labels:
        if label not in known:
            raise ValueError(f"--labels: got {label!r}, expected one of: {', '.join(known)}")
    wanted = {ORIGINAL, *labels}
    for item in reversed(every):  # what an experiment needs stands before it
        if item.label in wanted or item.label.startswith(tuple(prefixes)):
            needed = (item.label, item.base, item.budget_of, item.equal_bytes_to)
            wanted |= {label for label in needed if label is not None}
    return [item for item in every if item.label in wanted]


def _needs(item: Experiment) -> bool:
    return item.config.how.needs_calibration


def _original() -> Iterator[Experiment]:
    yield Experiment(ORIGINAL, "original", config_of("original"))


def _paper(top_k: int) -> Iterator[Experiment]:
    two = config_of("paper", bits=2)
    yield Experiment(PAPER, "paper", two)
    for n in sorted({0, *range(2, min(top_k, 4) + 1), top_k} - {1}):
        text = f"paper 2-bit, rank 16, Top-{n}" + (" (all)" if n == top_k else "")
        yield Experiment(text, "paper, other n", two, policies={"top_n": n})
    random = {"restore": "random", "top_n": 1}
    yield Experiment("paper 2-bit, rank 16, random 1", "paper, other n", two, policies=random)
    three = config_of("paper", bits=3)
    yield Experiment(PAPER_3, "paper", three)
    yield Experiment("paper 3-bit, rank 16, Top-0", "paper, other n", three, policies={"top_n": 0})
    yield Experiment(PAPER_4, "paper", config_of("paper", bits=4))


def _budgets(calibration: Path | None) -> Iterator[Experiment]:
    """At equal bytes: ours, ours with its bytes in wider codes alone, and both simpler ones."""
    codes_only = replace(METHODS["best"], repairs=())
    for budget in BUDGETS:
        yield Experiment(best(budget), "best", config_of("best", calibration, budget=budget))
        yield Experiment(
            f"mixed by best's quantiser {budget:g}",
            "mixed, best's quantiser",
            config_of("best", calibration, budget=budget, methods=codes_only),
        )
        yield Experiment(
            f"mixed hqq {budget:g}", "mixed hqq", config_of("mixed", calibration, budget=budget)
        )
        yield Experiment(f"fast {budget:g}", "fast", config_of("fast", budget=budget))
        if calibration is not None:
            yield Experiment(
                f"fast with a calibration {budget:g}",
                "fast with a calibration",
                config_of("fast", calibration, budget=budget),
            )


def _matched(calibration: Path | None) -> Iterator[Experiment]:
    """Ours at the very bytes of the paper's recipe: best, and without any calibration fast."""
    recipes = {
        "best": config_of("best", calibration, budget=2.5),
        "fast": config_of("fast", budget=2.5),
    }
    for label in (PAPER_3, PAPER, PAPER_4):
        for recipe, config in recipes.items():
            yield Experiment(f"{recipe} at the bytes of {label}", recipe, config, budget_of=label)


def _static(calibration: Path | None) -> Iterator[Experiment]:
    quantizers = {"hqq": "HQQ", "rtn": "round to nearest", "grid": "clip search"}
    for bits in (2, 3, 4):
        for name, words in quantizers.items():
            methods = replace(METHODS["static"], quantizer=name)  # type: ignore[arg-type]
            yield Experiment(
                f"static {bits}-bit, {words}",
                f"static, {words}",
                config_of("static", bits=bits, methods=methods),
            )
        methods = replace(METHODS["static"], quantizer="feedback", weighted=True)
        yield Experiment(
            f"static {bits}-bit, error feedback",
            "static, error feedback",
            config_of("static", calibration or Path("missing"), bits=bits, methods=methods),
        )


def _policies(calibration: Path | None) -> Iterator[Experiment]:
    """Which pairs are restored, at equal mean bytes."""
    stores = {
        PAPER_64: config_of("paper", bits=2, avg_rank=64),
        best(2.5): config_of("best", calibration, budget=2.5),
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
        best(2.5): config_of("best", calibration, budget=2.5),
        "fast 2.5": config_of("fast", budget=2.5),
        PAPER_64: config_of("paper", bits=2, avg_rank=64),
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
            config_of("paper", bits=2),
            place="skip",
            policies={"skip_below": skip},
            base=PAPER,
        )
        yield Experiment(
            f"{ORIGINAL}, skip < {skip:g}",
            "original",
            config_of("original"),
            place="skip",
            policies={"skip_below": skip},
            base=ORIGINAL,
        )


def _error_bounded() -> Iterator[Experiment]:
    for bound in BOUNDS:
        for codec in ("sz3", "cuszp"):
            yield Experiment(f"{codec} {bound}", codec, config_of(codec, error_bound=bound))


def _other_ranks() -> Iterator[Experiment]:
    yield Experiment(
        "paper 2-bit, rank 32, Top-1", "paper", config_of("paper", bits=2, avg_rank=32)
    )
    yield Experiment("milo 2-bit, rank 16, Top-1", "milo", config_of("milo", bits=2))
    everyone = {"restore": "all"}
    yield Experiment(
        "milo 2-bit, rank 16, all", "milo", config_of("milo", bits=2), policies=everyone
    )
