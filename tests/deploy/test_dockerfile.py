"""Goal: the Dockerfile builds what this repository is, as an image that may run restricted.

Method: there is no Docker engine here, so a few lint rules of our own over its instructions, each
also tried on a broken line; and (slow) its build steps, run in a clean folder with the same inputs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import environment

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "Dockerfile").read_text()
TARGETS = ("cpu", "gpu")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments): comments dropped, continued lines joined, ARG defaults put in."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    arguments = dict(a.split("=", 1) for name, a in found if name == "ARG" and "=" in a)
    return [
        (name, re.sub(r"\$\{(\w+)\}", lambda m: arguments.get(m[1], m[0]), rest))
        for name, rest in found
    ]


def stages(text: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name -> (its base, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for instruction, rest in instructions(text):
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, [])
        elif name:
            found[name][1].append((instruction, rest))
    return found


def copied_sources(text: str) -> list[str]:
    """What is copied from the context, not from another stage."""
    copies = [rest for name, rest in instructions(text) if name == "COPY" and "--from=" not in rest]
    return [source for rest in copies for source in rest.split()[:-1]]


def problems(text: str) -> Iterator[str]:
    known = stages(text)
    for stage, (base, steps) in known.items():
        tag = base.rpartition("/")[2].partition(":")[2]
        if base not in known and "@sha256:" not in base and tag in ("", "latest"):
            yield f"{stage}: base {base!r} has no fixed tag"
        for instruction, rest in steps:
            yield from (f"{stage}: {problem}" for problem in step_problems(instruction, rest))
    for target in TARGETS:
        users = [rest for name, rest in known[target][1] if name == "USER"]
        if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
            yield f"{target}: ends as root; runAsNonRoot needs a numeric USER"
        if any("g++" in rest for rest in image_steps(known, target)):
            yield f"{target}: a C++ compiler in the image that runs"
    for source in copied_sources(text):
        if not (ROOT / source).exists():
            yield f"COPY {source}: not in the repository"


def image_steps(known: dict[str, tuple[str, list[tuple[str, str]]]], target: str) -> list[str]:
    """Arguments of every step in the target and the stages below it."""
    base, steps = known[target]
    below = image_steps(known, base) if base in known else []
    return below + [rest for _, rest in steps]


def step_problems(instruction: str, rest: str) -> Iterator[str]:
    if instruction == "ADD":
        yield "ADD unpacks and downloads; use COPY"
    if instruction in ("ENV", "ARG") and re.search(r"(?i)(password|secret|token)\w*=", rest):
        yield f"{instruction} keeps a secret in the image's history"
    if instruction != "RUN":
        return
    for command in rest.split("&&"):
        if "apt-get install" in command and "--no-install-recommends" not in command:
            yield "apt-get install without --no-install-recommends"
        if re.search(r"\bpip (install|wheel)", command):
            if "--no-cache-dir" not in command:
                yield "pip without --no-cache-dir"
            if "pip install" in command and "-c /constraints.txt" not in command:
                yield "pip install without the constraints"
    if "apt-get update" in rest and "rm -rf /var/lib/apt/lists" not in rest:
        yield "apt lists stay in the image"
    if re.search(r"(curl|wget)[^|&]*\|\s*(ba)?sh", rest):
        yield "runs a download"


def test_nothing_is_found_wrong() -> None:
    assert list(problems(TEXT)) == []
    assert set(TARGETS) <= set(stages(TEXT))


BROKEN = {
    "untagged base": (
        "PYTHON_IMAGE=python:3.11.13-slim-bookworm",
        "PYTHON_IMAGE=python",
        "no fixed",
    ),
    "latest base": ("python:3.11.13-slim-bookworm", "python:latest", "no fixed tag"),
    "root": ("USER 1000:1000", "USER root", "ends as root"),
    "named user": ("USER 1000:1000", "USER moetier", "ends as root"),
    "missing source": ("COPY kernels kernels", "COPY kernel kernels", "COPY kernel: not in"),
    "recommends": (" --no-install-recommends gcc", " gcc", "without --no-install-recommends"),
    "apt lists": (" \\\n && rm -rf /var/lib/apt/lists/*", "", "apt lists stay"),
    "add": ("COPY models", "ADD models", "use COPY"),
    "unpinned": ("pip install --no-cache-dir -c /constraints.txt", "pip install", "constraints"),
    "pip cache": ("pip wheel --no-cache-dir", "pip wheel", "no-cache-dir"),
    "secret": ("PYTHONUNBUFFERED=1", "HF_TOKEN=abc", "keeps a secret"),
    "download": ('CMD ["moetier", "--help"]', "RUN curl https://x | sh", "runs a download"),
    "compiler": ("recommends gcc libc6-dev", "recommends g++", "a C++ compiler"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_rule_catches_its_breach(case: str) -> None:
    old, new, message = BROKEN[case]
    assert old in TEXT
    assert any(message in found for found in problems(TEXT.replace(old, new)))


def test_every_package_is_copied_and_may_enter_the_context() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    sources = set(copied_sources(TEXT))
    assert {name.split(".")[0] for name in packages} <= sources
    ignore = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*", "what is not named stays out"
    assert sources == {rule[1:] for rule in rules if rule.startswith("!")}


def test_python_and_cache_agree_with_the_code() -> None:
    (base, _) = stages(TEXT)["build"]
    minor = re.search(r"python:(3\.\d+)\.", base)
    assert minor is not None
    made_with = (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert f"Python {minor[1]}" in made_with
    variables = " ".join(rest for name, rest in stages(TEXT)["runtime"][1] if name == "ENV")
    assert "MOETIER_CACHE=/var/lib/moetier" in variables
    assert "MOETIER_CACHE" in (environment.__doc__ or "")


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_build_steps_give_a_working_command(tmp_path: Path) -> None:
    """The build stage's inputs and command in a clean folder, the wheel in a fresh environment.

    The wheel's dependencies are lent by this environment through a .pth file: installing them
    again takes minutes and is what `make demo` does in a clean clone.
    """
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler, which the build stage installs")
    context = tmp_path / "src"
    context.mkdir()
    for source in copied_sources(TEXT):
        origin, ignored = ROOT / source, shutil.ignore_patterns("__pycache__", "*.so")
        if origin.is_dir():
            shutil.copytree(origin, context / source, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(origin, context / source)
    (build,) = [rest for _, rest in stages(TEXT)["build"][1] if "pip wheel" in rest]
    arguments = build.split("&&")[0].replace("/wheels", str(tmp_path / "wheels")).split()[1:]
    subprocess.run([sys.executable, *arguments], cwd=context, check=True, timeout=600)
    (wheel,) = (tmp_path / "wheels").glob("moetier-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any(name.startswith("kernels/_native") for name in names), "no native kernels"
    assert any(name.endswith("mixtral-mini/model.safetensors") for name in names)

    fresh = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(fresh)], check=True, timeout=300)
    python = fresh / "bin" / "python"
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    lent = fresh / "lib" / minor / "site-packages" / "lent.pth"
    lent.write_text(sysconfig.get_paths()["purelib"] + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {**os.environ, "MOETIER_CACHE": str(tmp_path / "cache")}
    clean.pop("PYTHONPATH", None)

    def moetier(*words: str) -> str:
        command = [str(fresh / "bin" / "moetier"), *words]
        done = subprocess.run(
            command, cwd=elsewhere, env=clean, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "doctor" in moetier("--help")
    report = json.loads(moetier("doctor", "--json"))
    assert report["machine"]["native_isa"] is not None
    assert report["machine"]["bundled_model"].startswith(str(fresh))
    assert report["machine"]["cache"]["path"] == str(tmp_path / "cache")
