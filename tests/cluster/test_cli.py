"""Goal: the command finds subcommands, helps, and maps errors to exit codes. Method: call
main()."""

from __future__ import annotations

import pytest

from cluster import cli
from expert_store.errors import CorruptRecordError


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_complete_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: moetier {name}" in text
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
