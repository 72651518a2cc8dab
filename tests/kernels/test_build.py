"""Goal: without a compiler everything works, slower, and says so. Method: run a copy of the package
that has no compiled library; build a wheel with compilers that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest

import kernels

ROOT = Path(kernels.__file__).parent.parent

WITHOUT_LIBRARY = textwrap.dedent("""
    import logging
    import sys
    from pathlib import Path

    import kernels
    from kernels import ops, reference
    from kernels.types import MlpCall

    assert Path(kernels.__file__).parent == Path.cwd() / "kernels"
    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    logging.getLogger("kernels.ops").addHandler(Keep())
    sys.path.append(sys.argv[1])
    from kernel_matrices import random_factors, random_inputs, random_mlp

    assert ops.native_isa() is None
    mlp, factors, x = random_mlp(64, 128, 3), random_factors(64, 128, 3, 1), random_inputs(5, 64)
    for backend in ("cpu_fp32", "cpu_int8"):
        got = ops.gated_mlp(x, mlp, factors, backend=backend)
        assert (got - reference.gated_mlp(x, mlp, factors)).norm() < 1e-5 * got.norm()
    many = ops.gated_mlp_many([MlpCall(x, mlp), MlpCall(x, mlp)], num_threads=2)
    assert all((y - reference.gated_mlp(x, mlp)).norm() < 1e-5 * y.norm() for y in many)
    assert len(messages) == 1, messages
    assert "C++ compiler" in messages[0]
    print("right")
""")


def copy_sources(target: Path, *, package_only: bool) -> None:
    """The package without compiled files; with package_only False also what a build needs."""
    no_builds = shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors")
    if package_only:
        shutil.copytree(ROOT / "kernels", target / "kernels", ignore=no_builds)
        return
    for name in ("kernels", "expert_store", "gpu_worker", "ndp_worker", "cluster", "models"):
        shutil.copytree(ROOT / name, target / name, ignore=no_builds)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)


def test_without_the_library_torch_answers_and_one_warning_says_so(tmp_path: Path) -> None:
    copy_sources(tmp_path, package_only=True)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout.strip() == "right", result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_portable_sources_build_and_have_no_x86_in_them(tmp_path: Path) -> None:
    """What a processor that is not x86 compiles, run here in place of the real library."""
    sources = sorted(str(p) for p in (ROOT / "kernels/native").glob("*.cpp"))
    copy_sources(tmp_path, package_only=True)
    library = tmp_path / "kernels/_native.abi3.so"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-DMOETIER_PORTABLE_ONLY"]
        + [f"-I{sysconfig.get_paths()['include']}", *sources, "-o", str(library)],
        check=True,
        timeout=240,
    )
    check = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from kernel_matrices import random_inputs, random_mlp\n"
        "from kernels import ops, reference\n"
        "mlp, x = random_mlp(64, 128, 3), random_inputs(5, 64)\n"
        "y = ops.gated_mlp(x, mlp, backend='cpu_int8')\n"
        "expected = reference.gated_mlp(x, mlp)\n"
        "assert 0 < (y - expected).norm() < 0.03 * expected.norm()\n"
        "print(ops.native_isa())"
    )
    result = subprocess.run(
        [sys.executable, "-c", check, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout.strip() == "scalar", result.stderr[-3000:]


@pytest.mark.slow
def test_a_broken_compiler_still_gives_a_wheel_and_a_notice(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    copy_sources(source, package_only=False)
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
        + ["-w", str(wheels), "."],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=source,
        env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false"},
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    assert "moetier: no working C++ compiler" in output
    (wheel,) = wheels.glob("moetier-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "kernels/ops.py" in names
    assert not [name for name in names if name.endswith(".so")]
