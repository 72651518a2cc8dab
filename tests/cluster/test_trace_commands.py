"""Goal: `moetier trace` records a real run and `moetier replay` plays it; both refuse bad input.

Method: the commands in this process, over the bundled model's store in a temporary cache and a
tiny one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import cli
from cluster.cache_replay import BOUND, POLICIES, WHOLE
from expert_store.format import load_manifest
from gpu_worker.trace_file import load_trace
from tests.hand_store import build_store

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("The return statement leaves the current function call. " * 40)
    return path


@pytest.fixture(scope="module")
def trace(mini_cache: Path, text: Path) -> Path:
    path = text.with_name("run.trace")
    asked = ["--text", str(text), "--batch", "2", "--tokens", "20", "--groups", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOETIER_CACHE", str(mini_cache))
        assert cli.main(["trace", "--out", str(path), *asked]) == 0
    return path


def test_a_trace_of_texts_has_every_step(moetier: Run, trace: Path, mini_cache: Path) -> None:
    found = load_trace(trace)
    manifest = load_manifest(mini_cache / "stores" / "mixtral-mini")
    assert found.rows_per_step == (2,) * 60
    assert found.store_version == manifest.version
    assert found.model.num_experts == manifest.model.num_experts
    assert found.origin == "texts text; 2 side by side, 20 tokens each; recipe paper"
    assert bool((found.layers[0].restore_SK.sum(dim=1) == 1).all())


def test_a_trace_of_answers_has_the_prompts_too(moetier: Run, tmp_path: Path) -> None:
    path = tmp_path / "answers.trace"
    asked = ("--prompt", "The return statement", "--prompt", "A list", "--temperature", 0)
    code, out, _ = moetier(
        "trace", "--out", path, *asked, "--batch", 2, "--tokens", 6, "--top-n", 0, "--json"
    )
    told = json.loads(out)
    trace = load_trace(path)
    assert code == 0
    assert told["origin"].startswith("answers to 2 prompts; 2 side by side, 6 tokens each")
    assert (told["steps"], told["rows"]) == (trace.num_steps, trace.num_rows)
    assert told["bytes"] == path.stat().st_size
    assert trace.rows_per_step[0] > 1, "the first step is a prompt's"
    assert 2 in trace.rows_per_step[2:], "both answer side by side"
    assert not any(bool(rows.restore_SK.any()) for rows in trace.layers.values())


def test_replay_prints_a_row_per_policy_and_budget(moetier: Run, trace: Path) -> None:
    code, out, _ = moetier("replay", trace, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row["policy"] for row in rows] == list(POLICIES) * 3
    assert [round(100 * row["cache_share"], 1) for row in rows[:: len(POLICIES)]] == [12.5, 25, 50]
    for row in rows:
        assert 0 <= row["of_bound"] <= 1
        assert row["factor_share"] is None
    lfu = [row["found"] for row in rows if row["policy"] == "lfu"]
    assert 0 < lfu[0] < lfu[1] < lfu[2]
    assert moetier("replay", trace, "--json")[1] == out, "the same trace gives the same table"
    whole = next(row for row in rows if row["policy"] == WHOLE)
    assert whole["found"] > lfu[0]


def test_everything_is_found_but_the_first_time_where_all_fits(moetier: Run, trace: Path) -> None:
    _, out, _ = moetier("replay", trace, "--cache-percent", 100, "--json")
    rows = json.loads(out)["rows"]
    assert len({row["misses"] for row in rows}) == len({row["found"] for row in rows}) == 1
    _, out, _ = moetier("replay", trace, "--cache-bytes", 0, "--json")
    assert {row["found"] for row in json.loads(out)["rows"]} == {0.0}


def test_replay_takes_budgets_apart_and_shows_a_table(moetier: Run, trace: Path) -> None:
    asked = ("--cache-bytes", 500_000, "--factor-cache-share", 0, 0.5, "--policies", "lfu", BOUND)
    code, out, _ = moetier("replay", trace, *asked)
    assert code == 0
    lines = out.splitlines()
    assert "mixtral-mini, 60 steps, 120 tokens: texts text; 2 side by side" in lines[0]
    assert "factors found %" in lines[2]
    assert len(lines) == 4 + 4
    cells = lines[4].split()
    assert (cells[0], cells[2], cells[3], cells[5]) == ("0.50", "0", "lfu", "0.0")


def test_sequences_are_played_one_at_a_time(moetier: Run, trace: Path) -> None:
    asked = ("--cache-bytes", 500_000, "--policies", "lfu", "--json")
    together = json.loads(moetier("replay", trace, *asked)[1])
    alone = json.loads(moetier("replay", trace, *asked, "--batch", 1)[1])
    assert alone["origin"].endswith("replayed 1 side by side")
    assert alone["rows"][0]["moved_bytes_per_token"] > together["rows"][0]["moved_bytes_per_token"]


def test_a_store_of_another_model_is_refused(moetier: Run, trace: Path, tmp_path: Path) -> None:
    build_store(tmp_path / "other")
    code, _, err = moetier("replay", trace, "--store", tmp_path / "other")
    assert code == 2
    assert "trace: is of mixtral-mini with num_experts" in err


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [
        (("replay", "{trace}", "--factor-cache-share", 2), 2, "factor_share: got 2.0, expected 0"),
        (("replay", "{trace}", "--factor-share", -1), 2, "--factor-share: got -1.0"),
        (("replay", "{trace}", "--cache-percent", 120), 2, "--cache-percent: got 120.0"),
        (("replay", "{trace}", "--cache-bytes", -1), 2, "total_bytes: got -1"),
        (("replay", "{trace}", "--batch", 3), 2, "batch: got 0 times 3 sequences"),
        (("replay", "{text}"), 1, "not a whole safetensors file"),
        (("replay", "none.trace"), 1, "none.trace"),
        (("trace", "--out", "{folder}/x", "--batch", 0), 2, "batch: got 0, expected at least 1"),
        (
            ("trace", "--out", "{folder}/x", "--text", "{text}", "--tokens", 9999),
            2,
            "tokens are too few",
        ),
        (("trace", "--out", "{folder}/x", "--text", "none.txt"), 2, "none.txt does not exist"),
        (("trace", "--out", "{folder}/x", "--prompt", ""), 2, "--prompt: got an empty text"),
        (("trace", "--out", "{text}/x", "--tokens", 1, "--groups", 1), 1, "cannot be written"),
        (("trace", "--out", "{folder}"), 2, "is a folder, expected a file to write"),
    ],
)
def test_mistakes_are_named(
    moetier: Run,
    trace: Path,
    text: Path,
    tmp_path: Path,
    asked: tuple[object, ...],
    code: int,
    message: str,
) -> None:
    places = {"trace": trace, "text": text, "folder": tmp_path}
    told = [one.format(**places) if isinstance(one, str) else one for one in asked]
    found, _, err = moetier(*told)
    assert (found, message in err) == (code, True), err
