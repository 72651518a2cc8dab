"""Goal: `moetier recalibrate` changes the routers of a store and nothing else, and says what for.

Method: a copy of the bundled model's store; few tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.recalibrate import RecalibrationSettings
from expert_store.format import load_manifest
from expert_store.verify import verify

Run = Callable[..., tuple[int, str, str]]
FEW = ("--tokens", 1024, "--window-tokens", 64, "--eval-windows", 4)


def test_the_command_writes_a_whole_store_that_routes_as_it_said(
    moetier: Run, mini_cache: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(mini_cache / "stores" / "mixtral-mini", store)
    old = load_manifest(store)
    code, out, _ = moetier("recalibrate", store, "--original", "mixtral-mini", *FEW, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["after"]["same_experts"] > found["before"]["same_experts"]
    assert found["after"]["kl"] == pytest.approx(found["before"]["kl"], rel=0.5)
    assert [layer["ridge"] is None for layer in found["layers"]][:1] == [True]
    for layer in found["layers"]:
        assert layer["error_after"] <= layer["error_before"]
    new = load_manifest(store)
    assert new.version == found["version"] != old.version
    assert new.recipe.name == f"{old.recipe.name}-recalibrated"
    assert new.experts == old.experts
    assert not verify(store).damage
    # What was measured with routers in memory is what the store on disk does.
    code, out, _ = moetier(
        "recalibrate", store, "--original", "mixtral-mini", *FEW, "--dry-run", "--json"
    )
    assert code == 0
    again = json.loads(out)["before"]
    assert again["window_kl"] == pytest.approx(found["after"]["window_kl"], rel=1e-3)
    assert again["same_experts"] == found["after"]["same_experts"]
    assert load_manifest(store) == new, "a dry run writes nothing"


def test_mistakes_are_the_callers(moetier: Run, mini_cache: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    store = mini_cache / "stores" / "mixtral-mini"
    version = load_manifest(store).version
    code, _, error = moetier(
        "recalibrate", store, "--original", "mixtral-mini", "--text", short, *FEW
    )
    assert code == 2
    assert "short: text:" in error
    assert load_manifest(store).version == version
    with pytest.raises(ValueError, match="tokens: got 0"):
        RecalibrationSettings(tokens=0)
