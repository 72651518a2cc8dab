"""Goal: compress, inspect and verify as a user meets them: output, exit codes, messages.

Method: the command's own entry, in this process, on tiny checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.stores import original_store
from expert_store.format import is_store, load_manifest
from expert_store.types import FORMAT_VERSION
from tests.hand_store import build_store
from tests.tiny_checkpoints import write_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_checkpoint("mixtral", folder, hidden=128, ffn=128)


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    arguments = ["--recipe", "paper", "--bits", "2", "--avg-rank", "8", "--top-n", "1"]
    assert main(["compress", str(model), str(folder), *arguments]) == 0
    return folder


def test_compress_prints_a_summary(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "paper", "--bits", "3", "--jobs", "1"]
    assert main(["compress", str(model), str(tmp_path / "s"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "paper, 3 bits, average rank 16, 3-bit factors, Top-1 restored" in out
    assert "3.5 bits per weight" in out
    assert "written in" in out


def test_compress_in_other_groups_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "static", "--group-size"]
    assert main(["compress", str(model), str(tmp_path / "s"), *arguments, "32"]) == 0
    out = capsys.readouterr().out
    assert "static, 2 bits, groups of 32, " in out
    assert "3 bits per weight" in out
    assert main(["verify", str(tmp_path / "s")]) == 0
    capsys.readouterr()
    assert main(["compress", str(model), str(tmp_path / "t"), *arguments, "96"]) == 2
    assert "groups of 96 need a multiple of 192" in capsys.readouterr().err


def test_compress_json_is_inspect_json(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "s")
    assert main(["compress", str(model), target, "--recipe", "static", "--json"]) == 0
    compressed = json.loads(capsys.readouterr().out)
    assert main(["inspect", target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == compressed
    assert compressed["recipe"]["name"] == "static"
    assert compressed["num_experts"] == 8
    assert compressed["factors_bytes"] == 0


def test_inspect_shows_sizes_ranks_and_bytes_per_token(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(store)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    # 8 experts of 3 x 8 x 2 tiles of 320 bytes; four have one rank block per projection.
    codes, factors = 3 * 8 * 2 * 320, 3 * 4 * 448
    per_token = 2 * (2 * codes) + factors * 4 // 4
    assert f"{per_token:,}" in next(line for line in lines if line.startswith("bytes per token"))
    assert rows["16"][1] == "4"
    assert set(rows["16"][2]) == {"#"}


def test_inspect_shows_how_each_layer_is_coded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_store(
        tmp_path,
        bits=(1, 2, 3),
        grids=("symmetric", "affine", "affine"),
        blocks="gUdD",
        factor_grid="symmetric",
    )
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    for layer in layers:
        assert layer["bits"] == 2
        assert layer["matrices"] == {"symmetric": 3, "affine": 6}
        assert layer["blocks"] == {"rank": 6, "plane": 6}
        assert (layer["error"], layer["restored_error"]) == pytest.approx((0.4, 0.2))
        assert layer["codes_bytes"] % 64 == layer["factors_bytes"] % 64 == 0
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "3 symmetric, 6 affine" in out
    assert "6 rank, 6 plane" in out


def test_a_store_of_version_1_is_refused_but_made_again_in_the_cache(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MOETIER_CACHE", str(tmp_path))
    store = original_store(model)
    path = store / "manifest.json"
    document = json.loads(path.read_text()) | {"format_version": 1}
    path.write_text(json.dumps(document))
    assert main(["inspect", str(store)]) == 1
    message = capsys.readouterr().err
    assert "format version 1, made by an older moetier" in message
    assert "compress the model again with --force" in message
    assert original_store(model) == store
    assert load_manifest(store).format_version == FORMAT_VERSION == 2


def test_verify_of_a_whole_and_of_a_damaged_store(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(store)]) == 0
    assert "whole: 12 records in 8 files" in capsys.readouterr().out
    path = store / "codes" / "layer-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert main(["verify", str(store)]) == 1
        out = capsys.readouterr().out
        assert f"{store}: damaged: codes/layer-00001.safetensors, layer 1 expert 3: expect" in out
        assert "1 damaged of" in out
        assert main(["verify", str(store), "--json"]) == 1
        (damage,) = json.loads(capsys.readouterr().out)["damage"]
        assert damage["key"] == {"layer": 1, "expert": 3}
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "1"], "bits: got 1, expected one of (2, 3, 4)"),
        (["--bits", "8"], "bits: got 8"),
        (["--group-size", "48"], "group_size: got 48, expected a multiple of 32 up to 4096"),
        (["--recipe", "finest"], "recipe: got 'finest', expected one of paper, static, mixed"),
        (
            ["--recipe", "paper", "--avg-rank", "1000"],
            "avg_rank: got 1000, over the rank of this model's experts",
        ),
        (["--avg-rank", "-1"], "avg_rank: got -1"),
        (["--top-n", "9"], "top_n: got 9, expected at most 2"),
        (["--jobs", "0"], "jobs: got 0"),
        (["--recipe", "original", "--bits", "2"], "bits: got 2, expected one of (16,)"),
    ],
)
def test_a_wrong_argument_is_exit_code_2(
    arguments: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compress", str(model), str(tmp_path / "s"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "", "s"], "model: got an empty name"),
        (["compress", "mixtral-mini", ""], "STORE: got an empty path"),
        (["inspect", ""], "STORE: got an empty path"),
        (["verify", ""], "STORE: got an empty path"),
        (["generate", "", "--prompt", "x"], "STORE: got an empty path"),
        (["eval", ""], "STORE: got an empty path"),
    ],
)
def test_an_empty_argument_is_not_the_current_folder(
    arguments: list[str],
    message: str,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(store)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_finished_store_needs_force(
    model: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(model), str(store)]) == 2
    assert "holds a finished store" in capsys.readouterr().err


def test_what_the_world_gets_wrong_is_exit_code_1(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "s")
    assert main(["compress", "no-such-model", target]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["compress", "moetier-test/no-such-model", target]) == 1
    assert "Hub cannot be reached" in capsys.readouterr().err
    for command in ("inspect", "verify"):
        assert main([command, str(model)]) == 1
        assert "not a finished store" in capsys.readouterr().err
    assert not is_store(tmp_path / "s")


@pytest.mark.parametrize("command", ["compress", "inspect", "verify"])
def test_help_is_complete(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "Exit code" in text
    assert "--json" in text
    options = [line for line in text.splitlines() if line.startswith("  --")]
    for line in options:
        assert len(line.split()) > 1, f"option without help: {line}"
