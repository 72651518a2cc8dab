"""Goal: a model's name leads to a folder or a clear error. Method: every kind of name, no network.

The test run has HF_HUB_OFFLINE=1; other answers of the Hub are put in the library's place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from expert_store import sources
from expert_store.checkpoint import Checkpoint
from expert_store.errors import CheckpointError
from expert_store.sources import model_name, resolve_model


def test_the_bundled_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Checkpoint(resolve_model("mixtral-mini")).model_info.model_type == "mixtral"


def test_a_local_folder(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path


def test_a_local_folder_comes_before_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model") == Path("org/model")


@pytest.mark.parametrize(
    "name", ["no-such-model", "/no/such/folder", "./a/b", "../b", "~/none", "", "a b/c"]
)
def test_names_that_lead_nowhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("the Hub was asked for a name that is no Hub id")

    monkeypatch.setattr(sources, "snapshot_download", refuse)
    if name == "":
        name = "nothing/at/all"
    with pytest.raises(CheckpointError, match="no such folder; give a checkpoint folder, a Hub id"):
        resolve_model(name)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="expected a folder .* got a file"):
        resolve_model(path)


def test_no_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("Name or service not known")

    monkeypatch.setattr(sources, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="'org/model'.*Hub cannot be reached; check the netw"):
        resolve_model("org/model")


def test_offline_mode_of_the_real_library() -> None:
    with pytest.raises(CheckpointError, match="Hub cannot be reached"):
        resolve_model("moetier-test/no-such-model")


def test_a_failed_download_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="the download failed: .*No space left"):
        resolve_model("org/model")


def test_only_what_is_needed_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(sources, "snapshot_download", download)
    assert resolve_model("mistralai/Mixtral-8x7B-v0.1") == tmp_path
    assert asked["name"] == "mistralai/Mixtral-8x7B-v0.1"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])
    assert 0 < asked["etag_timeout"] <= 10


def test_names_of_models(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--mistralai--Mixtral-8x7B-v0.1" / "snapshots" / "0123abcd"
    assert model_name(snapshot) == "mistralai/Mixtral-8x7B-v0.1"
    assert model_name(tmp_path / "snapshots" / "mine") == "mine"
    assert model_name(resolve_model("mixtral-mini")) == "mixtral-mini"
