"""Goal: the GPU check is sound before there is a GPU: whole, fault-proof, honest.

Method: a tiny run under Triton's interpreter with ray, hqq, redis and grpc forbidden, as on a bare
GPU machine; steps that crash, hang or lie; reports of red gates.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import gpu_check
from benchmarks.gpu import bandwidth, peers, report
from benchmarks.gpu.matrices import random_inputs, random_matrix, relative_rms
from benchmarks.gpu.recorder import Check, Recorder, Row, read_findings
from benchmarks.gpu.runner import STAGES, TOTAL_S, Result, Step, run_all, run_process
from benchmarks.gpu.store import INDEX, whole_store
from benchmarks.gpu.targets import TARGETS
from expert_store.assemble import write_dense
from expert_store.checkpoint import Checkpoint
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.files import Disk
from expert_store.staging import Staging, file_sha256
from kernels import reference
from models import MIXTRAL_MINI
from tests.tiny_checkpoints import write_tiny_checkpoint

ROOT = Path(gpu_check.__file__).parents[1]
TINY_RUN = """
import runpy, sys
for name in ("ray", "hqq", "redis", "grpc"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
sys.argv = ["gpu_check", "--tiny", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu_check", run_name="__main__", alter_sys=True)
"""
STEP = Step("one", "One", "no.module", 10.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint("mixtral", folder / "model")
    config = CompressionConfig(recipe="paper", avg_rank=16)
    compress(folder / "model", folder / "store", config, jobs=1)
    return folder / "store"


def test_a_tiny_run_is_whole_and_green_without_ray_hqq_redis_and_grpc(
    store: Path, tmp_path: Path
) -> None:
    out, device_out = tmp_path / "out", tmp_path / "device"
    device_out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TINY_RUN, "--store", str(store), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "OUT": str(device_out),
            "OMP_NUM_THREADS": "1",
        },
    )
    text = (out / "report.md").read_text() if (out / "report.md").is_file() else ""
    assert done.returncode == 0, text + done.stderr[-3000:]
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(path.name for path in device_out.iterdir())
    assert len(files) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)
    found = json.loads((out / "report.json").read_text())
    assert [step["name"] for step in found["steps"]] == [s.name for stage in STAGES for s in stage]
    groups = {check["group"] for step in found["steps"] for check in step["checks"]}
    names = [f"{bits} bits" for bits in (2, 3, 4)]
    names += [f"{bits} bits symmetric" for bits in (1, 2, 3, 4)]
    forms = {
        f"{kernel} {name}" for kernel in ("decode", "prefill", "mlp", "step") for name in names
    }
    others = {"system float32", "streaming tiny", "offload tiny", "steps tiny", "unit tests"}
    assert forms | others <= groups
    assert text.count("| not run on a GPU |") == len(TARGETS)
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert len(rows) > 10
    for row in rows:
        assert row["note"] == "interpreter: not a measurement", row
        assert not any(row[name] for name in ("p20", "p50", "p80", "rate", "share")), row


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # main() sets these for the process; other tests need the interpreter, so put them back.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_steps_fit_into_the_time() -> None:
    """A stage takes as long as its longest step; none is started in vain."""
    assert TOTAL_S < 9 * 60
    for stage in STAGES[:3]:
        assert max(step.budget_s for step in stage) < TOTAL_S / 3


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", ""),
        ("import os; os.abort()", "exit code -6"),
        ("raise ValueError('what broke')", "what broke"),
        ("import threading; threading.Event().wait()", "stopped after"),
    ],
)
def test_a_step_s_process_may_crash_or_hang(code: str, expected: str) -> None:
    limit_s = 1.0 if "stopped" in expected else 60.0
    failure = run_process([sys.executable, "-c", code], limit_s)
    assert failure == "" if expected == "" else expected in failure


def test_a_failed_step_keeps_what_it_found_and_the_next_one_runs(tmp_path: Path) -> None:
    def run_step(step: Step, path: Path, limit_s: float) -> str:
        Recorder(path, tiny=False).check("group", step.name, True)
        return "it broke" if step.name == "first" else ""

    steps = [Step(name, name, "", 10.0) for name in ("first", "second")]
    first, second = run_all([[step] for step in steps], run_step, tmp_path, say=lambda _: None)
    assert (first.status, second.status) == ("red", "green")
    assert [check.name for check in first.findings] == ["first"]


def test_no_step_is_started_when_the_time_is_over(tmp_path: Path) -> None:
    moments = iter(range(0, 100_000, 100))
    started = []

    def run_step(step: Step, path: Path, limit_s: float) -> str:
        started.append((step.name, limit_s))
        return ""

    stages = [[Step(str(i), "", "", 50.0)] for i in range(4)]
    results = run_all(
        stages, run_step, tmp_path, total_s=450, clock=lambda: next(moments), say=lambda _: None
    )
    assert started == [("0", 50.0), ("1", 50.0)]
    assert [result.status for result in results] == ["green", "green", "red", "red"]
    assert "not started" in results[-1].failure


def row(gate: str) -> Row:
    return Row("decode", "16 x 64", 1, (gate,), 1.0, 12345.0, 3.0, "us")


@pytest.mark.parametrize("how", ["green", "failed check", "unfinished gate", "no gate at all"])
def test_a_red_gate_prints_no_numbers(how: str, tmp_path: Path) -> None:
    checks = () if how == "no gate at all" else (Check("decode", "a", how != "failed check"),)
    failure = "stopped" if how == "unfinished gate" else ""
    gate = Result(STEP, "red" if how != "green" else "green", 1.0, checks, failure)
    speed = Result(STEP, "green", 1.0, (row("decode"),))
    run = report.Run([gate, speed], "a GPU", "abc", "2026-01-01", tiny=False)
    texts = [path.read_text() for path in report.write(run, tmp_path)]
    assert run.is_green == (how == "green")
    shown = [
        "12,345" in texts[0] or "1.23e+04" in texts[0],
        *("12345" in text for text in texts[1:]),
    ]
    assert shown == [how == "green"] * 3
    assert ("withheld" in texts[0]) == (how != "green")


@pytest.mark.parametrize(("share", "verdict"), [(0.76, "reached"), (0.74, "**missed**")])
def test_targets_stand_beside_what_was_measured(share: float, verdict: str) -> None:
    first = TARGETS[0]
    found = replace(row("decode"), what=first.what, shape=first.shape, share=share)
    green = Result(STEP, "green", 1.0, (Check("decode", "a", True), found))
    run = report.Run([green], "a GPU", "abc", "2026-01-01", tiny=False)
    text = report.render(run)
    assert f"| 0.75 | {share} | {verdict} |" in text
    assert text.count("not measured in this run") == len(TARGETS) - 1
    red = replace(green, findings=(Check("decode", "a", False), found))
    text = report.render(replace(run, results=[red]))
    assert str(share) not in text
    assert text.count("not measured in this run") == len(TARGETS)


def test_targets_name_rows_that_steps_write(tmp_path: Path) -> None:
    """The names of the decode step's rows and the peers' are the targets'."""
    recorder = Recorder(tmp_path / "found.jsonl", tiny=False)
    pool = [random_matrix(16, 64, 2, "cpu")]
    bandwidth._rows(recorder, {("copy", 0): [1.0], ("decode", 1): [1.0]}, pool, 1 << 20, "graph")
    peers._rows(recorder, {"gemlite": [1.0], "ours": [0.5]}, pool, 1)
    rows = [found for found in read_findings(tmp_path / "found.jsonl") if isinstance(found, Row)]
    for target in TARGETS[0], TARGETS[-4]:
        measured = replace(target, shape="16 x 64").measured(rows)
        assert measured == (2.0 if target.of == "value" else pytest.approx(0.0, abs=0.01))


class RecordingLinear:
    """What `GemLiteLinear` is given, multiplied as gemlite documents it: (codes - zero) * scale."""

    def __init__(self, bits: int, **sizes: object) -> None:
        self.group_size = sizes["group_size"]

    def pack(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bias: None
    ) -> None:
        assert codes.dtype == torch.uint8
        grouped = codes.view(*scale.shape, self.group_size).float()
        self.weight = ((grouped - zero[..., None]) * scale[..., None]).flatten(1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ self.weight.T


def test_gemlite_is_given_our_weight() -> None:
    matrix = random_matrix(16, 128, 4, "cpu")
    module = SimpleNamespace(DType=SimpleNamespace(FP16=None), GemLiteLinear=RecordingLinear)
    linear = peers.as_gemlite(module, matrix)  # type: ignore[arg-type]
    x = random_inputs(2, 128, "cpu")
    assert relative_rms(linear(x), reference.matmul(matrix, x)) < 1e-3


def test_nan_and_what_raises_are_red_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "found.jsonl", tiny=False)
    recorder.compare("group", "a NaN", float("nan"), 1.0)
    with recorder.section("group"):
        raise RuntimeError("it does not compile")
    with (tmp_path / "found.jsonl").open("a") as file:
        file.write('{"kind": "check", "gro')
    nan, raised = read_findings(tmp_path / "found.jsonl")
    assert not nan.passed
    assert not raised.passed
    assert "it does not compile" in raised.detail


def test_dense_files_that_were_left_out_are_put_back(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "made", "run", Disk())
    hashes = write_dense(staging, Checkpoint(MIXTRAL_MINI))
    store = tmp_path / "store"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    shutil.copy(staging.folder / INDEX, store / INDEX)
    put_back = whole_store(store)
    assert put_back != store
    assert {name: file_sha256(put_back / name) for name in hashes} == hashes
    (put_back_file,) = hashes
    with safe_open(MIXTRAL_MINI / "model.safetensors", framework="pt") as tensors:
        original = tensors.get_tensor("model.norm.weight")
    assert torch.equal(load_file(put_back / put_back_file)["model.norm.weight"], original)
    assert not (store / put_back_file).exists()


def test_a_missing_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--prepare"):
        whole_store(tmp_path)
