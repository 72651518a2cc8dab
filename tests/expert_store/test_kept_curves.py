"""Goal: curves measured for one budget serve every other, and never one they do not belong to.

Method: a tiny Mixtral compressed for real; the progress of the stage "plan" tells who measured.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from expert_store.compress import Progress, compress
from expert_store.config import CompressionConfig
from tests.tiny_checkpoints import write_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("curves") / "model")


def tiny(folder: Path, seed: int = 0) -> Path:
    return write_tiny_checkpoint("mixtral", folder, hidden=128, ffn=192, seed=seed)


def has_measured(model: Path, store: Path, curves: Path | None, **changes: object) -> bool:
    seen: list[Progress] = []
    config = CompressionConfig(**{"recipe": "fast", "budget": 2.75} | changes)  # type: ignore[arg-type]
    compress(model, store, config, progress=seen.append, jobs=2, curves=curves)
    return any(step.stage == "plan" for step in seen)


def test_another_budget_measures_nothing(model: Path, tmp_path: Path) -> None:
    curves = tmp_path / "curves"
    assert has_measured(model, tmp_path / "a", curves)
    assert not has_measured(model, tmp_path / "b", curves, budget=3.5)
    assert has_measured(model, tmp_path / "c", None, budget=3.5)
    same = [(tmp_path / name / "manifest.json").read_bytes() for name in "bc"]
    assert same[0] == same[1]


def test_what_curves_depend_on_measures_anew(model: Path, tmp_path: Path) -> None:
    curves = tmp_path / "curves"
    assert has_measured(model, tmp_path / "a", curves)
    assert has_measured(model, tmp_path / "b", curves, recipe="mixed", budget=3.0)
    assert has_measured(model, tmp_path / "c", curves, factor_bits=4)
    assert has_measured(tiny(tmp_path / "other", seed=1), tmp_path / "d", curves)
    assert len(list(curves.iterdir())) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"experts": []}'])
def test_a_damaged_file_costs_only_time(
    model: Path, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    curves = tmp_path / "curves"
    assert has_measured(model, tmp_path / "a", curves)
    (kept,) = curves.iterdir()
    whole = kept.read_text()
    kept.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert has_measured(model, tmp_path / "b", curves)
    assert kept.read_text() == whole
    # Curves of other experts are no damage: they are of a calibration with other favourites.
    assert ("measuring curves anew" in caplog.text) == (text != '{"experts": []}')


def test_a_folder_that_cannot_be_written_costs_only_time(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "curves").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        assert has_measured(model, tmp_path / "a", tmp_path / "curves")
    assert "not kept for other budgets" in caplog.text
