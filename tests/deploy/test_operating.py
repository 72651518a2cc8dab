"""Goal: what deploy/OPERATING.md tells an operator exists.

Method: every moetier command of the page is parsed by the command itself, every metric, field,
port, overlay and file is compared with the code's. What a cluster does is not tested here.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from cluster.cli import COMMANDS
from cluster.config import ClusterConfig
from cluster.deploy.checks import metric_names
from cluster.deploy.kustomize import DEFAULT_FOLDER, overlays
from cluster.deploy.network_rules import Flow, Pod, passes
from cluster.deploy.sizes import HEADROOM_BYTES
from cluster.deploy.values import parse_settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "deploy" / "OPERATING.md").read_text()
ONCE = "moetier.io/once"
COMMAND = re.compile(r"^moetier (?:[^\n]*\\\n)*[^\n]*|`(moetier [^`]+)`", re.MULTILINE)
RAY = Pod("ray", {"moetier.io/ray": "true", "moetier.io/component": "head"})


def commands() -> list[list[str]]:
    found = [match[1] or match[0] for match in COMMAND.finditer(PAGE)]
    return [shlex.split(text.replace("\\\n", " ").replace("\n", " ")) for text in found]


def test_every_command_is_understood() -> None:
    seen = commands()
    assert len(seen) >= 4
    for words in seen:
        assert words[1] in COMMANDS, words
        module = import_module(f"cluster.commands.{words[1]}")
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        if "--help" in words:
            continue
        args = parser.parse_args(words[2:])
        if words[1] == "deploy" and args.action == "render":
            parse_settings(args.settings)
            assert args.overlay is None or args.overlay in overlays(DEFAULT_FOLDER)


def test_every_key_of_set_is_one() -> None:
    found = re.findall(r"--set (\w+=\w+)", PAGE)
    assert found
    for text in found:
        assert parse_settings([text])


def test_every_metric_is_told() -> None:
    named = set(re.findall(r"moetier_[a-z_]+", PAGE))
    assert len(named) > 10
    assert named <= metric_names()


def test_every_field_is_one_of_the_config() -> None:
    sections = {f.name: getattr(ClusterConfig(), f.name) for f in dataclasses.fields(ClusterConfig)}
    found = re.findall(r"`(store|ndp|worker|replicas|http|directory)\.(\w+)`", PAGE)
    assert len(found) >= 6
    for section, name in found:
        assert name in {f.name for f in dataclasses.fields(sections[section])}, (section, name)


def test_every_overlay_and_file_is_there() -> None:
    table = re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE)
    assert {*table, "base"} == set(overlays(DEFAULT_FOLDER))
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "deploy" / link).exists(), link
    for path in re.findall(r"`(components/[^`]+|benchmarks/[^`]+)`", PAGE):
        assert (ROOT / path).exists() or (ROOT / "deploy" / path).exists(), path
    assert f"plus {HEADROOM_BYTES >> 30} GiB" in PAGE


def test_an_upgrade_leaves_out_the_job_alone(documents) -> None:
    once = [d["kind"] for d in documents if (d["metadata"].get("labels") or {}).get(ONCE) == "true"]
    assert once == ["Job"]
    assert PAGE.count(f"{ONCE}!=true") == 2


@pytest.mark.parametrize("number", ["first", "last"])
def test_ports_that_ray_pods_use_are_let_by(documents, number: str) -> None:
    """The table's ports, on the head, against the policies."""
    policies = [each for each in documents if each["kind"] == "NetworkPolicy"]
    table = PAGE[PAGE.index("## Ports") :]
    rows = re.findall(r"^\| ([-0-9, ]+) \| [^|]+ \| ([^|]+) \|", table, re.MULTILINE)
    assert len(rows) >= 7
    for ports, who in (row for row in rows if "Ray pods" in row[1]):
        for span in ports.split(", "):
            first, _, last = span.partition("-")
            port = int(first if number == "first" else last or first)
            assert passes(Flow(RAY, RAY, port, who), policies), (port, who)
