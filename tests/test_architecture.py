"""Goal: the rules of the house stay true. Method: read the source as AST.

No GPU, no Ray, no third-party import. Every rule is also tried on a small tree that breaks it.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "expert_store": {"kernels"},
    "ndp_worker": {"expert_store", "kernels"},
    "gpu_worker": {"expert_store", "kernels"},
    "cluster": {"gpu_worker", "ndp_worker", "expert_store", "kernels"},
}
ONLY_IN = {  # third-party name -> the modules that may import it
    "ray": (
        "*/actor.py",
        "cluster/app.py",
        "cluster/deploy/serve_schema.py",
        "cluster/deployments.py",
        "cluster/ingress.py",
        "cluster/ray_launcher.py",
        "cluster/rollout.py",
        "cluster/tune/serve_decision.py",  # Serve's decisions, in simulated time; starts no Ray
    ),
    "grpc": ("*/rpc.py",),
    "triton": ("kernels/triton_*.py",),
    "redis": ("expert_store/directory.py",),
}
ENVIRONMENT_FILE = "cluster/environment.py"
DISTRIBUTIONS = {
    "grpc": "grpcio",
    "yaml": "pyyaml",
    "celpy": "cel-python",
}  # where the import has another name
OPTIONAL = (
    "demo",
    "lm-eval",
    "report",
    "deploy",
)  # extras of pyproject.toml that our own code imports
UNDECLARED_BY_HQQ = {"termcolor", "einops"}  # hqq imports them and does not say so
IMPORTED_BY_NAME = {"cel-python"}  # only where it is installed
MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 70


def sources(root: Path) -> Iterator[tuple[Path, ast.Module, str]]:
    for room in MAY_IMPORT:
        for path in sorted((root / room).rglob("*.py")):
            text = path.read_text()
            yield path.relative_to(root), ast.parse(text), text


def imported_names(tree: ast.Module) -> Iterator[tuple[int, str, int]]:
    """(line, dotted name, relative level) of every import, wherever it hides in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}", node.level


def import_problems(path: Path, tree: ast.Module) -> Iterator[str]:
    room = path.parts[0]
    for line, name, level in imported_names(tree):
        top = name.split(".")[0]
        if level:
            yield f"{path}:{line}: use an absolute import"
        if top in MAY_IMPORT and top != room and top not in MAY_IMPORT[room]:
            yield f"{path}:{line}: {room}/ must not import {top}/ (got {name})"
        if top in ONLY_IN and not any(path.match(pattern) for pattern in ONLY_IN[top]):
            yield f"{path}:{line}: {top} may be imported only in {', '.join(ONLY_IN[top])}"


def shape_problems(path: Path, tree: ast.Module, text: str) -> Iterator[str]:
    if (num_lines := len(text.splitlines())) > MAX_MODULE_LINES:
        yield f"{path}: {num_lines} lines, at most {MAX_MODULE_LINES}; split it by noun"
    if text.strip() and ast.get_docstring(tree) is None:
        yield f"{path}:1: no docstring that says what the file owns"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield (
                    f"{path}:{node.lineno}: {node.name} has {num_lines} lines, "
                    f"at most {MAX_FUNCTION_LINES}"
                )
        if isinstance(node, ast.Global):
            yield f"{path}:{node.lineno}: no `global`; pass the value"
        reads_environment = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        if reads_environment and str(path) != ENVIRONMENT_FILE:
            yield f"{path}:{node.lineno}: environment variables are read in {ENVIRONMENT_FILE}"


def module_graph(root: Path) -> dict[str, set[str]]:
    trees = {str(path.with_suffix("")).replace("/", "."): tree for path, tree, _ in sources(root)}
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        names = {name for _, name, _ in imported_names(tree)}
        targets = names | {name.rpartition(".")[0] for name in names}
        graph[module] = {target for target in targets if target in trees and target != module}
    return graph


def cycle_problems(graph: dict[str, set[str]]) -> Iterator[str]:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> Iterator[str]:
        if module in trail:
            yield "import cycle: " + " -> ".join((*trail[trail.index(module) :], module))
            return
        if module in done:
            return
        for target in sorted(graph[module]):
            yield from visit(target, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        yield from visit(module, ())


def problems(root: Path) -> list[str]:
    found = []
    for path, tree, text in sources(root):
        found += [*import_problems(path, tree), *shape_problems(path, tree, text)]
    return found + list(cycle_problems(module_graph(root)))


def test_rooms_keep_their_rules() -> None:
    found = problems(ROOT)
    assert not found, "\n" + "\n".join(found)


BROKEN = {
    "upward import": ("kernels/a.py", '"""D."""\nimport expert_store.types\n', "must not import"),
    "sideways import": ("gpu_worker/a.py", '"""D."""\nimport ndp_worker.rpc\n', "must not import"),
    "import in function": (
        "kernels/a.py",
        '"""D."""\ndef f():\n    from cluster import cli\n',
        "must not import",
    ),
    "relative import": ("kernels/a.py", '"""D."""\nfrom . import b\n', "absolute import"),
    "ray outside": ("cluster/cli.py", '"""D."""\nimport ray\n', "ray may be imported only"),
    "triton outside": ("kernels/ops.py", '"""D."""\nimport triton\n', "triton may be imported"),
    "redis outside": ("cluster/a.py", '"""D."""\nimport redis\n', "redis may be imported"),
    "global": ("kernels/a.py", '"""D."""\ndef f():\n    global x\n    x = 1\n', "no `global`"),
    "environment": ("kernels/a.py", '"""D."""\nimport os\nos.environ["x"]\n', "environment"),
    "long module": ("kernels/a.py", '"""D."""\n' + "x = 1\n" * 300, "split it by noun"),
    "long function": ("kernels/a.py", '"""D."""\ndef f():\n' + "    x = 1\n" * 70, "has 71"),
    "no docstring": ("kernels/a.py", "x = 1\n", "no docstring"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_rule_catches_its_breach(case: str, tmp_path: Path) -> None:
    name, text, message = BROKEN[case]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert any(message in found for found in problems(tmp_path))


def test_cycles_are_caught(tmp_path: Path) -> None:
    room = tmp_path / "kernels"
    room.mkdir()
    (room / "a.py").write_text('"""D."""\nfrom kernels import b\n')
    (room / "b.py").write_text('"""D."""\nimport kernels.a\n')
    assert any("import cycle" in found for found in problems(tmp_path))


def distribution(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0]


def imported_distributions(root: Path) -> set[str]:
    ours = {*MAY_IMPORT, "models", *sys.stdlib_module_names}
    tops = {
        name.split(".")[0] for _, tree, _ in sources(root) for _, name, _ in imported_names(tree)
    }
    return {DISTRIBUTIONS.get(top, top.replace("_", "-")) for top in tops - ours}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {distribution(each) for each in project["dependencies"]}
    extras = {
        distribution(each) for extra in OPTIONAL for each in project["optional-dependencies"][extra]
    }
    imported = imported_distributions(ROOT)
    assert imported == (needed | extras) - UNDECLARED_BY_HQQ - IMPORTED_BY_NAME
    assert needed >= UNDECLARED_BY_HQQ
    assert not needed & extras


def test_an_undeclared_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    code = "import os\nimport grpc\nimport huggingface_hub.errors\nfrom kernels import ops\n"
    (tmp_path / "cluster" / "a.py").write_text(code)
    assert imported_distributions(tmp_path) == {"grpcio", "huggingface-hub"}
    assert distribution("ray[serve]>=2.60") == "ray"
