"""Goal: the command finds subcommands, helps, and maps errors to exit codes. Method: call
main()."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import cli
from expert_store.errors import CorruptRecordError


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


ACTIONS = {"deploy": ("render", "validate")}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_complete_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: moetier {name}" in text
    for action in ACTIONS.get(name, ()):
        with pytest.raises(SystemExit):
            cli.main([name, action, "--help"])
        text = capsys.readouterr().out
        assert f"usage: moetier {name} {action}" in text
    module_help = [line for line in text.splitlines() if line.strip().startswith("--")]
    assert module_help, f"{name} documents no option"


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compres"]) == 2
    assert "did you mean 'compress'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("bits: got 5"), 2), (CorruptRecordError("layer 1"), 1), (OSError("disk"), 1)],
)
def test_errors_become_exit_codes(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(name: str, arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "run_command", fail)
    assert cli.main(["inspect"]) == code
    assert str(error) in capsys.readouterr().err


def test_a_mistake_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, arguments: list[str]) -> int:
        raise AssertionError("free + used != total")

    monkeypatch.setattr(cli, "run_command", fail)
    with pytest.raises(AssertionError):
        cli.main(["inspect"])


@pytest.mark.parametrize(
    ("calls", "slow"),
    [
        ("from cluster import cli; cli.main(['--help'])", "torch"),
        ("import cluster.commands.inspect, cluster.commands.verify", "transformers"),
    ],
)
def test_quick_commands_do_not_wait_for_slow_imports(calls: str, slow: str) -> None:
    code = f"import sys; {calls}; sys.exit({slow!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_a_command_of_an_extra_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "cluster.commands.demo", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert cli.main(["demo", "--help"]) == 2
    told = capsys.readouterr().err
    assert "needs the package openai" in told
    assert "pip install 'moetier[demo]'" in told


def test_another_missing_package_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cluster.commands.verify", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError, match="tqdm"):
        cli.main(["verify", "--help"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect"], "mixtral-mini (mixtral)"),
        (["verify"], "whole: "),
        (["generate", "--prompt", "The", "--max-tokens", "1"], "1 tokens in"),
        (["eval", "--windows", "2", "--window-tokens", "8", "--batch", "1"], "python-reference"),
    ],
)
def test_without_a_store_a_command_uses_the_bundled_model(
    moetier: Callable[..., tuple[int, str, str]], arguments: list[str], told: str
) -> None:
    code, out, err = moetier(*arguments)
    assert code == 0
    assert told in out + err


def test_without_a_model_compress_takes_the_bundled_one(
    moetier: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, _ = moetier("compress", tmp_path / "store", "--recipe", "original", "--jobs", "1")
    assert code == 0
    assert "mixtral-mini (mixtral)" in out
