"""Goal: the experiment list is sound, and its page says who won from the rows alone.

Method: the list for several models; pages of results made by hand; one tiny run end to end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import quality_per_byte
from benchmarks.per_byte import page as pages
from benchmarks.per_byte.experiment import ORIGINAL, PAPER, Experiment, best
from benchmarks.per_byte.experiments import BUDGETS, chosen, experiments
from benchmarks.per_byte.runner import Result
from cluster.eval_rows import EvalRow, Traffic, measures
from cluster.report.lines import Line
from cluster.report.page import Section, Table
from expert_store.config import CompressionConfig

CALIBRATION = Path("calibration")


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("calibration", [CALIBRATION, None])
def test_what_an_experiment_needs_stands_before_it(top_k: int, calibration: Path | None) -> None:
    every = experiments(top_k, calibration)
    labels = [item.label for item in every]
    assert labels[0] == ORIGINAL
    assert len(set(labels)) == len(labels)
    for place, item in enumerate(every):
        if calibration is not None:
            needed = {item.base, item.budget_of, item.equal_bytes_to} - {None}
            assert needed <= set(labels[:place]), item.label
        else:
            assert not item.config.how.needs_calibration
        assert 0 <= item.policies.get("top_n", 0) <= max(1, top_k)


def test_every_item_of_the_issue_is_there() -> None:
    labels = " | ".join(item.label for item in experiments(2, CALIBRATION))
    for budget in BUDGETS:
        for name in ("best", "fast", "mixed hqq", "mixed by best's quantiser"):
            assert f"{name} {budget:g} |" in labels
    for words in ("random 1", "milo", "sz3", "cuszp", "round to nearest", "skip < 0.1"):
        assert words in labels
    for item in ("layer sensitivity", "refinement planes", "rank blocks", "compensators"):
        assert f"best 2.5 without {item}" in labels
        assert f"best 3 without {item}" in labels


def test_choosing_takes_what_is_needed_along() -> None:
    every = experiments(2, CALIBRATION)
    labels = [item.label for item in chosen(every, ["best 2.5 without rank blocks"])]
    assert labels == [ORIGINAL, best(2.5), "best 2.5 without rank blocks"]
    labels = [item.label for item in chosen(every, [f"best at the bytes of {PAPER}"])]
    assert labels == [ORIGINAL, PAPER, f"best at the bytes of {PAPER}"]
    labels = [item.label for item in chosen(every, [], ["best 2.5 without rank blocks"])]
    assert labels == [ORIGINAL, best(2.5), "best 2.5 without rank blocks"]
    with pytest.raises(ValueError, match="--only: got 'nothing'"):
        chosen(every, ["nothing"])
    with pytest.raises(ValueError, match=r"--labels: got 'best 2\.', expected one of: original"):
        chosen(every, [], ["best 2."])


def test_a_calibration_of_tokens_alike_is_an_item() -> None:
    every = {item.label: item for item in experiments(2, CALIBRATION, Path("alike"))}
    without = every["best 2.5 without tokens by importance (all alike)"]
    assert without.config.calibration == Path("alike")
    assert every["best 2.5 without rank blocks"].config.calibration == CALIBRATION
    assert without.base == "best 2.5"


@pytest.mark.parametrize("name", ["smol-moe", "mixtral-mini", "finegrained-mini"])
def test_the_lists_of_the_committed_pages_are_of_labels_that_exist(name: str) -> None:
    file = Path(quality_per_byte.__file__).parent / "per_byte" / "lists" / f"{name}.txt"
    labels = file.read_text().splitlines()
    top_k = 6 if name == "finegrained-mini" else 2
    every = experiments(top_k, CALIBRATION, Path("alike"))
    assert len(chosen(every, [], labels)) >= len(set(labels)) > 20


def result(label: str, family: str, kl: float, bits: float, **fields: object) -> Result:
    windows = tuple(kl + step for step in (0.0, 0.0001, 0.0002, -0.0001))
    row = EvalRow(
        experts=label,
        text="text",
        **measures(tuple(3 + value for value in windows), windows, (0.9,) * 4),
        more_nats=None,
        more_nats_error=None,
        bits_per_weight_moved=bits,
        stored_bytes=1000,
        traffic=(Traffic(0.0, 1, 0, 500.0, 500.0, 400.0, 100.0, 500.0, 0.0, 64),),
        degraded_pairs=0,
        restored_share=0.5,
        skipped_share=0.0,
        seconds=1.0,
    )
    config = CompressionConfig(recipe="original")
    experiment = Experiment(label, family, config, **fields)  # type: ignore[arg-type]
    return Result(experiment, Line.of(label, family, [row], [row]), Path("store"), None)


def tables(section: Section) -> list[Table]:
    return [part for part in section.parts if isinstance(part, Table)]


def test_the_first_section_says_where_best_did_not_win() -> None:
    made = {best(b): result(best(b), "best", 0.01, b) for b in BUDGETS}
    made |= {f"mixed hqq {b:g}": result(f"mixed hqq {b:g}", "mixed hqq", 0.02, b) for b in BUDGETS}
    lines = {label: item.line for label, item in made.items()}
    won = pages.budget_section(lines)
    assert won.parts[0] == (
        "Best is strictly better than every control measured here, at every budget."
    )
    assert len(tables(won)[0].rows) == len(BUDGETS)
    lines["mixed hqq 3"] = replace(made["mixed hqq 3"].line, whole=lines[best(3)].whole)
    assert "everywhere but: 3: mixed hqq 3." in str(pages.budget_section(lines).parts[0])
    del lines[best(4)]
    assert "4: best was not measured" in str(pages.budget_section(lines).parts[0])
    assert "not measured" in str(pages.budget_section({}).parts[0])


def test_items_reach_their_table() -> None:
    base = result(best(2.5), "best", 0.01, 2.5)
    fields = {"place": "ablation", "base": best(2.5)}
    worse = result("best 2.5 without x", "ablation", 0.02, 2.5, item="x", **fields)
    more = result("best 2.5 with y", "ablation", 0.02, 2.5, item="y", adds=True, **fields)
    made = {item.experiment.label: item for item in (base, worse, more)}
    found = pages.items_section(pages.items(made))
    assert found is not None
    without, with_more = tables(found)[0].rows
    assert without[:3] == ("x", "best 2.5", "best 2.5 without x")
    assert without[3].startswith("+0.01000 ± ")
    assert without[-1] == "kept"
    assert with_more[:3] == ("y", "best 2.5 with y", "best 2.5")
    assert with_more[3].startswith("-0.01000 ± ")
    assert with_more[-1] == "not kept: better without"


def test_a_tiny_run_end_to_end_and_again_without_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOETIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quality_per_byte, "provenance", lambda: "here and now")
    arguments = [
        *("--model", "mixtral-mini", "--windows", "2", "--window-tokens", "16"),
        *("--only", "paper 2-bit, rank 16, random", "--only", "paper 2-bit, rank 16, Top-0"),
        *("--only", f"{PAPER}, skip < 0.1", "--rows", str(tmp_path / "rows.jsonl")),
        *("--text", str(_text(tmp_path))),
    ]
    assert quality_per_byte.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    name = "quality-per-byte-mixtral-mini"
    page = (tmp_path / "one" / f"{name}.md").read_text()
    for words in (PAPER, "random 1", "Router skew", "The paper's claims on this model"):
        assert words in page
    # No time: rows that were kept are read, nothing else is measured, and the page is the same.
    again = [*arguments, "--budget-minutes", "0", "--out", str(tmp_path / "two")]
    assert quality_per_byte.main(again) == 0
    assert (tmp_path / "two" / f"{name}.md").read_text() == page


def _text(folder: Path) -> Path:
    path = folder / "words.txt"
    path.write_text(" ".join(f"word {number} follows the one before it." for number in range(300)))
    return path
