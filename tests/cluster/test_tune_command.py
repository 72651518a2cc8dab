"""Goal: `moetier tune` from a trace to a config that the cluster accepts, and its refusals.

Method: the command in this process with few and short runs; what it prints is read back by the
config's own loader and by Serve's own class.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from ray.serve.config import AutoscalingConfig

from cluster.autoscaling import GpuWorkerPolicy
from cluster.config import config_from_mapping

SERVICE = "{step_s: 0.03, sequence_s: 0.004, prompt_token_s: 0.0015}"
QUICK = ("--seconds", 300, "--rate-per-s", 1, "--runs", 4, "--answer-tokens", 32)


@pytest.fixture
def service(tmp_path: Path) -> Path:
    path = tmp_path / "service.yaml"
    path.write_text(SERVICE)
    return path


def test_from_made_up_requests_to_a_config(moetier, service: Path) -> None:
    code, out, _ = moetier("tune", *QUICK, "--service", service, "--kind", "bursts")
    assert code == 0
    ours, serves = out.split("# for the cluster config")[1].split("# the same as Serve's own")
    config = config_from_mapping(yaml.safe_load(ours.partition("\n")[2]), source="tune")
    scaling = config.replicas.autoscaling
    assert scaling is not None
    assert scaling.service is not None
    assert scaling.service.step_s == 0.03
    options = yaml.safe_load(serves.partition("\n")[2])["autoscaling_config"]
    assert options == scaling.serve_config(slots=8, prefill_chunk=256)
    assert AutoscalingConfig(**options).max_replicas == 8
    assert GpuWorkerPolicy(**options["policy"]["policy_kwargs"]).settings.targets == scaling.targets
    for name in ("moetier", "Serve's default, target tuned", "Serve's default, all tuned"):
        assert name in out


def test_a_recorded_trace_is_split_in_halves_and_a_page_is_written(
    moetier, service: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    trace = tmp_path / "requests-1.jsonl"
    lines = [{"arrival_s": 1e9 + n, "prompt_tokens": 50, "answer_tokens": 20} for n in range(120)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    page = tmp_path / "page"
    code, out, _ = moetier(
        "tune", "--trace", trace, "--rate-times", 2, "--service", service, "--runs", 3, "--json",
        "--out", page,
    )  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found["tuned_on"] == ["requests-1.jsonl, first half"]
    assert found["held_out"] == ["requests-1.jsonl, second half"]
    assert len(found["results"]) == 3
    for name in ("tune.md", "tune.html", "tune/trace-front.svg", "tune/trace-time.svg"):
        assert (page / name).stat().st_size > 500
    loaded = yaml.safe_load((page / "tune.yaml").read_text())
    assert loaded["replicas"]["autoscaling"] == found["config"]


def test_a_promise_that_nobody_can_keep_is_said(moetier, service: Path) -> None:
    code, out, _ = moetier("tune", *QUICK, "--service", service, "--ttft-s", 0.001)
    assert code == 0
    assert "No setting kept 99.0% of requests within 0.001 s" in out
    assert "the best missed 100.0%" in out
    assert "replicas:\n  autoscaling:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs", 1), "--runs: got 1"),
        (("--ttft-s", 0), "ttft_s: got 0"),
        (("--limit", 1), "limit: got 1.0"),
        (("--seconds", -5), "seconds: got -5"),
        (("--start-s", -5), "start_s: got -5"),
        (("--min-replicas", 9), "limits: got 9 to 8"),
        (("--service", "{step_s: 1}"), "prompt_token_s"),
        (("--service", "{step_s: -1, sequence_s: 0, prompt_token_s: 0}"), "step_s: got -1"),
        (("--trace", "nothing here"), "unknown format"),
    ],
)
def test_nonsense_is_the_callers_mistake(
    moetier, service: Path, tmp_path: Path, arguments, message: str
) -> None:
    option, value = arguments
    if option in ("--service", "--trace"):
        path = tmp_path / "given"
        path.write_text(value)
        value = path
    code, _, err = moetier("tune", *QUICK, "--service", service, option, value)
    assert code == 2
    assert message in err


def test_steps_of_a_real_engine_are_fitted(moetier, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{worker: {max_sequences: 3, prefill_chunk: 32}}")
    path = tmp_path / "fit.yaml"
    code, out, err = moetier("tune", "--fit", path, "--config", config)
    assert (code, "Loading weights" in err) == (0, False)
    assert str(path) in out
    fitted = yaml.safe_load(path.read_text())
    assert 0 < fitted["step_s"] < 10
    assert fitted["num_steps"] > 50
