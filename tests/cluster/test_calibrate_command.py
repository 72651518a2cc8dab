"""Goal: `moetier calibrate` as a user meets it: what it writes, says and refuses.

Method: the command's own entry, in this process, on the bundled model with little text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.calibrate import CalibrationSettings, allot
from cluster.docstrings import CALIBRATION_TEXT, built_in_calibration_text
from cluster.texts import built_in_text
from expert_store.calibration import Calibration
from expert_store.checkpoint import Checkpoint
from expert_store.types import ExpertKey
from models import MIXTRAL_MINI
from tests.tiny_checkpoints import write_tiny_checkpoint

Run = Callable[..., tuple[int, str, str]]
LITTLE = ("--tokens", 256, "--window-tokens", 64)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, count in (("long", 200), ("short", 7)):
        words = " ".join(f"The {name} report counts {i} apples." for i in range(count))
        (folder / f"{name}.txt").write_text(words)
    return folder


def test_what_it_writes_and_says(moetier: Run, tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = moetier("calibrate", "mixtral-mini", out, "--text", texts, *LITTLE)
    assert code == 0
    assert "calibration of mixtral-mini: 256 tokens of 2 texts in windows of 64, seed 0" in text
    assert "long: 192 tokens" in text
    assert "short: 64 tokens" in text
    assert "saw fewer than 128 tokens" in text
    calibration = Calibration(out)
    calibration.check_model(Checkpoint(MIXTRAL_MINI).model_info)
    assert f"id {calibration.id[:12]}" in text
    assert calibration.info.num_tokens == calibration.info.tables[3].num_tokens == 256
    assert set(calibration.layer_sensitivity) == set(range(6))
    assert all(nats > 0 for nats in calibration.layer_sensitivity.values())
    statistics = calibration.expert(ExpertKey(5, 1))
    assert statistics.moment_in.cols == 384
    assert statistics.moment_mid.cols == 320
    assert sum(table[0] for table in calibration.info.tables[5].use_at_EK) == pytest.approx(1)
    # The same again is the same to the bit, whatever the folder is called.
    other = tmp_path / "again"
    assert moetier("calibrate", "mixtral-mini", other, "--text", texts, *LITTLE)[0] == 0
    assert Calibration(other).id == calibration.id


def test_too_little_text_gives_what_it_has_and_says_so(
    moetier: Run, tmp_path: Path, texts: Path
) -> None:
    arguments = ("--text", texts / "short.txt", *LITTLE[2:])
    code, text, _ = moetier("calibrate", "mixtral-mini", tmp_path / "a", *arguments)
    assert code == 0
    assert "64 tokens of 1 text" in text
    assert "asked for 16,384: the text has no more" in text
    assert not Calibration(tmp_path / "a").info.alike
    alike = (*arguments, "--alike", "--json")
    code, text, _ = moetier("calibrate", "mixtral-mini", tmp_path / "b", *alike)
    assert Calibration(tmp_path / "b").info.alike
    said: dict[str, Any] = json.loads(text)
    assert (said["num_tokens"], said["asked_tokens"]) == (64, 16_384)
    assert said["texts"] == {"short": 64}
    assert said["experts_with_few_tokens"] == said["num_experts"] == 48
    assert said["layers"][0]["sensitivity"] == Calibration(tmp_path / "b").layer_sensitivity[0]
    (texts / "short.txt").write_text("Hardly a text.")
    code, _, error = moetier("calibrate", "mixtral-mini", tmp_path / "c", *arguments)
    assert code == 2
    assert "too few: a window needs 64 tokens of one text" in error
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("mixtral-mini", "OUT", "--tokens", 0), 2, "tokens: got 0, expected at least 1"),
        (("mixtral-mini", "OUT", "--window-tokens", 1), 2, "window_tokens: got 1"),
        (("mixtral-mini", "OUT", "--text", "/no/such/file"), 2, "/no/such/file does not exist"),
        (("mixtral-mini", ""), 2, "OUT: got an empty path"),
        (("no-such-model", "OUT"), 1, "no such folder"),
        (("EMPTY", "OUT"), 1, "no config.json"),
        (("mixtral-mini", "FULL"), 2, "is there already and not an empty folder"),
        (("mixtral-mini", "FULL/file"), 2, "is there already and not an empty folder"),
    ],
)
def test_a_wrong_argument_is_told_at_the_door(
    arguments: tuple[Any, ...], code: int, message: str, moetier: Run, tmp_path: Path
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "file").write_text("x")
    placed = [
        str(tmp_path / a) if str(a).split("/")[0] in ("OUT", "EMPTY", "FULL") else a
        for a in arguments
    ]
    found, out, error = moetier("calibrate", *placed)
    assert (found, out) == (code, "")
    assert message in error
    assert not (tmp_path / "OUT").exists()


def test_a_model_without_a_tokenizer_reads_no_text(moetier: Run, tmp_path: Path) -> None:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model")
    code, _, error = moetier("calibrate", model, tmp_path / "out")
    assert code == 2
    assert "has no tokenizer files" in error


def test_another_name_is_another_model(moetier: Run, tmp_path: Path, texts: Path) -> None:
    model = shutil.copytree(MIXTRAL_MINI, tmp_path / "renamed")
    out = tmp_path / "out"
    assert moetier("calibrate", model, out, "--text", texts, *LITTLE)[0] == 0
    with pytest.raises(ValueError, match="its name is renamed, expected mixtral-mini"):
        Calibration(out).check_model(Checkpoint(MIXTRAL_MINI).model_info)


def test_the_built_in_texts_share_nothing() -> None:
    """Calibrating on one and evaluating on the other is no cheating."""
    calibration, evaluation = built_in_calibration_text(), built_in_text()
    assert calibration.name == CALIBRATION_TEXT
    assert len(calibration.text) > 300_000
    ours, theirs = (_phrases(text.text) for text in (calibration, evaluation))
    assert not ours & theirs


def _phrases(text: str) -> set[tuple[str, ...]]:
    """All runs of 12 words."""
    words = text.split()
    return set(zip(*(words[i:] for i in range(12)), strict=False))


def test_shares_are_as_equal_as_the_texts_allow() -> None:
    assert allot([10, 10, 10], 9) == [3, 3, 3]
    assert allot([1, 10, 10], 9) == [1, 4, 4]
    assert allot([10, 0, 3], 100) == [10, 0, 3]
    assert sum(allot([5, 5, 5], 7)) == 7
    assert allot([5, 5], 1) in ([1, 0], [0, 1])
    assert CalibrationSettings().tokens == 16_384
