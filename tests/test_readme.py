"""Goal: the README tells the truth of today. Method: compare what it names with what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.cli import COMMANDS
from expert_store.families import SUPPORTED_MODEL_TYPES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ROOMS = ("kernels", "expert_store", "ndp_worker", "gpu_worker", "cluster")


def tree_entries() -> set[str]:
    """room/file of every line of the README's tree."""
    tree = README.partition("<!-- tree:")[2].partition("```\n")[2].partition("```")[0]
    entries, room = set(), ""
    for line in tree.splitlines():
        if line.endswith("/") and not line.startswith(" "):
            room = line
        elif line.startswith("  "):
            entries.add(room + line.split()[0])
    return entries


@pytest.mark.parametrize("room", ROOMS)
def test_every_source_file_has_its_line(room: str) -> None:
    files = {
        str(path.relative_to(ROOT))
        for suffix in ("*.py", "*.cpp", "*.h")
        for path in (ROOT / room).rglob(suffix)
        if path.name != "__init__.py"
    }
    told = {entry for entry in tree_entries() if entry.startswith(f"{room}/")}
    assert told == files


def test_every_link_to_a_file_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_every_command_and_family_is_named() -> None:
    assert all(f"`moetier {name}" in README for name in COMMANDS)
    assert all(family in README for family in SUPPORTED_MODEL_TYPES)


def test_every_module_it_tells_to_run_exists() -> None:
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert modules
    paths = {module: ROOT / module.replace(".", "/") for module in modules}
    missing = [
        module
        for module, path in paths.items()
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists()
    ]
    assert not missing


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", README))
    missing = [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)]
    assert targets
    assert not missing
