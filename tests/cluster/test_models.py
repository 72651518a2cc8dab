"""Goal: smol-moe is a model like any other once it is there, and says how to get it until then.

Method: a cache folder of the test's own; commands in this process; assembling replaced or refused.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import models as cluster_models
from cluster.commands import demo, fetch
from cluster.models import find_model, has_smol, smol_folder
from expert_store.errors import CheckpointError
from models import MIXTRAL_MINI
from models.smol import assemble as assembling
from models.smol.recipe import RECIPE_FILE, recipe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOETIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend_assembled() -> Path:
    smol_folder().mkdir(parents=True)
    (smol_folder() / RECIPE_FILE).write_text(json.dumps(recipe()))
    return smol_folder()


def test_smol_is_found_by_name_once_it_is_assembled(cache: Path) -> None:
    assert not has_smol()
    folder = pretend_assembled()
    assert has_smol()
    assert find_model("smol-moe") == folder == cache / "models" / "smol-moe"


def test_one_made_from_other_deltas_does_not_count() -> None:
    folder = pretend_assembled()
    (folder / RECIPE_FILE).write_text(json.dumps(recipe() | {"deltas": "0" * 64}))
    with pytest.raises(CheckpointError, match="other deltas .*make smol"):
        find_model("smol-moe")


def test_other_names_mean_what_they_did(tmp_path: Path) -> None:
    assert find_model("mixtral-mini") == MIXTRAL_MINI
    assert find_model(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="empty name"):
        find_model("")


def test_compress_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    from cluster import cli

    assert cli.main(["compress", "smol-moe", str(tmp_path / "store")]) == 1
    told = capsys.readouterr().err
    assert "make smol" in told
    assert str(cache) in told
    assert not (tmp_path / "store").exists()


@pytest.fixture
def assembled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where make_smol was asked to assemble."""
    asked: list[Path] = []

    def make(cache: Path, target: Path, say: Callable[[str], None]) -> Path:
        asked.append(target)
        say("fetching ...")
        return target

    monkeypatch.setattr(assembling, "make_smol", make)
    return asked


def test_fetch_assembles_where_find_model_looks(
    assembled: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    fetch.add_arguments(parser)
    assert fetch.run(parser.parse_args([])) == 0
    assert assembled == [smol_folder()]
    told = capsys.readouterr()
    assert told.out.strip() == str(smol_folder())
    assert "fetching" in told.err
    assert fetch.run(parser.parse_args(["smol-moe", "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(smol_folder())
    with pytest.raises(SystemExit):
        parser.parse_args(["another"])


@pytest.mark.parametrize(
    ("name", "is_there", "fetches"),
    [
        (None, False, False),
        (None, True, True),
        ("mini", True, False),
        ("smol", False, True),
    ],
)
def test_the_demo_takes_the_model_that_is_there_or_asked_for(
    name: str | None,
    is_there: bool,
    fetches: bool,
    assembled: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "has_smol", lambda: is_there)
    subject = demo.choose(name, demo.Teller(as_json=True))
    assert bool(assembled) == fetches
    assert subject.model == (smol_folder() if fetches else MIXTRAL_MINI)
    assert subject.chats == fetches
    assert cluster_models.SMOL == "smol-moe"
