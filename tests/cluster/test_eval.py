"""Goal: `moetier eval` tells perplexity and bytes moved per token truly, for every kind of experts.

Method: the command on the bundled model's store; the original's perplexity against transformers'
own, bytes against what the manifest and a cache of everything or nothing leave no choice about.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.eval_rows import EvalRow, as_plain
from cluster.eval_settings import EvalSettings, Variant
from cluster.eval_tables import as_cells
from cluster.evaluate import demo_rows, evaluate
from cluster.progress import store_progress
from cluster.references import References
from cluster.stores import bundled_store, original_store
from cluster.texts import EvalText, built_in_text, read_texts
from expert_store.compress import Progress
from expert_store.format import load_manifest
from gpu_worker.reference import LOG_PROBS
from gpu_worker.scoring import cut_windows
from models import MIXTRAL_MINI

Run = Callable[..., tuple[int, str, str]]
FEW = EvalSettings(
    windows=3, window_tokens=64, decode_tokens=8, warm_up=0, batch=(1,), cache_percent=(0.0,)
)
TINY = ("--windows", 2, "--window-tokens", 64, "--decode-tokens", 6, "--batch", 1)
SMALL = (
    "--windows",
    4,
    "--window-tokens",
    64,
    "--decode-tokens",
    12,
    "--warm-up",
    4,
    "--batch",
    2,
    "--cache-percent",
    25,
)


@pytest.fixture(scope="module")
def rows(mini_cache: Path) -> list[dict[str, Any]]:
    """The four rows of the demo's table, small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOETIER_CACHE", str(mini_cache))
        original = original_store(MIXTRAL_MINI)
        settings = EvalSettings(
            windows=6,
            window_tokens=128,
            decode_tokens=16,
            warm_up=8,
            batch=(2,),
            cache_percent=(0.0,),
        )
        found = list(demo_rows(bundled_store(), original, settings))
    assert all(as_cells(row) for row in found)
    return [as_plain(row) | as_plain(row)["traffic"][0] for row in found]


def test_the_original_row_is_the_plain_models_perplexity(rows: list[dict[str, Any]]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(MIXTRAL_MINI, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MIXTRAL_MINI)
    ids = tokenizer(built_in_text().text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = cut_windows(ids, num_windows=6, window_tokens=128)
    with torch.no_grad():
        nats = [float(plain(input_ids=w[None], labels=w[None]).loss) for w in windows]
    assert rows[0]["nats"] == pytest.approx(sum(nats) / 6, rel=1e-4)
    assert rows[0]["perplexity"] == pytest.approx(math.exp(sum(nats) / 6), rel=1e-3)


def test_the_four_rows_are_ordered_as_the_method_promises(rows: list[dict[str, Any]]) -> None:
    original, static, compensated, near = rows
    assert original["more_nats"] is None
    assert static["more_nats"] > 0
    assert compensated["more_nats"] < static["more_nats"]
    # int8 activations near data change the loss by far less than a compensator does.
    assert near["more_nats"] == pytest.approx(compensated["more_nats"], abs=0.003)
    assert static["more_nats_error"] < static["nats_error"]
    assert static["moved_bytes"] < original["moved_bytes"] / 6
    assert static["factors_bytes"] == 0 < compensated["factors_bytes"]
    assert near["moved_bytes"] < compensated["moved_bytes"]
    assert near["near_data_bytes"] > 0 == compensated["near_data_bytes"]
    for row in rows:
        assert row["moved_bytes"] == row["planned_bytes"] > 0
        assert row["moved_bytes"] == pytest.approx(row["codes_bytes"] + row["factors_bytes"])
        assert row["degraded_pairs"] == 0


def test_bytes_without_a_cache_are_those_of_the_experts_used(
    rows: list[dict[str, Any]], mini_cache: Path
) -> None:
    manifest = load_manifest(mini_cache / "stores" / "mixtral-mini")
    (codes,) = {info.codes.num_bytes for info in manifest.experts.values()}
    # Two sequences in six layers use two to four experts a layer: six to twelve a token.
    assert 6 * codes <= rows[1]["moved_bytes"] <= 12 * codes
    assert rows[0]["moved_bytes"] / rows[1]["moved_bytes"] == pytest.approx(
        3 * 384 * 320 * 2 / codes, rel=0.25
    )


def test_command_with_text_files(moetier: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"A sentence about the number {name}. " * 100)
    (tmp_path / "ignored.md").write_text("x")
    code, out, _ = moetier("eval", "--text", tmp_path, *SMALL, "--top-n", 0, "--top-n", 1, "--json")
    assert code == 0
    report = json.loads(out)
    assert [(row["experts"], row["text"]) for row in report["rows"]] == [
        ("2-bit codes", "one"),
        ("2-bit codes", "two"),
        ("2-bit + compensators Top-1", "one"),
        ("2-bit + compensators Top-1", "two"),
    ]
    assert report["settings"]["windows"] == 4
    assert all(row["perplexity"] > 1 for row in report["rows"])


def test_table_says_what_it_was_measured_with(moetier: Run) -> None:
    code, out, _ = moetier("eval", *SMALL, "--cache-percent", 200, "--near-data", "--seed", 5)
    assert code == 0
    header = out.splitlines()[0]
    assert all(name in header for name in ("perplexity", "expert KB/token", "near-data KB/token"))
    assert "4 windows of 64 tokens" in out
    assert "cache 200 %" in out
    assert "seen text of that kind" in out
    assert "Top-1, near data" in out


def test_command_against_the_original(moetier: Run) -> None:
    one = ("--windows", 1, "--window-tokens", 64, "--decode-tokens", 4, "--warm-up", 0)
    code, out, _ = moetier("eval", *one, "--compare-original", "--json")
    assert code == 0
    original, ours = json.loads(out, parse_constant=pytest.fail)["rows"]
    assert original["experts"] == "original bf16"
    assert original["more_nats"] is None
    assert ours["more_nats"] is not None
    assert ours["nats_error"] is None, "one window has no spread"
    assert (original["kl"], original["agreement"]) == (0, 1)
    assert 0 < ours["kl"] < 1
    assert 0.5 < ours["agreement"] < 1
    assert original["bits_per_weight_moved"] == 16
    assert 2.5 < ours["bits_per_weight_moved"] < 4


def test_the_original_is_run_once_and_found_again(
    mini_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOETIER_CACHE", str(mini_cache))
    original, store = original_store(MIXTRAL_MINI), bundled_store()
    texts = [EvalText("reports", "The committee met in May and read the report. " * 60)]
    references = References(tmp_path / "references")

    def rows(*variants: Variant) -> list[EvalRow]:
        return list(evaluate(variants, texts, FEW, original=original, references=references))

    (alone,) = rows(Variant("2-bit", store))
    (kept,) = (tmp_path / "references").iterdir()
    made_ns = (kept / LOG_PROBS).stat().st_mtime_ns
    again, itself = rows(Variant("2-bit", store), Variant("original", original))
    assert [path.name for path in (tmp_path / "references").iterdir()] == [kept.name]
    assert (kept / LOG_PROBS).stat().st_mtime_ns == made_ns
    assert (again.window_kl, again.window_agreement) == (alone.window_kl, alone.window_agreement)
    assert again.window_nats == alone.window_nats
    assert max(itself.window_kl) < 1e-6
    assert itself.window_agreement == (1.0,) * FEW.windows
    assert alone.kl is not None
    assert alone.kl > 1e-3
    assert alone.kl_error is not None


def test_policies_make_a_line_each(moetier: Run) -> None:
    code, out, _ = moetier(
        "eval", *TINY, "--restore", "top_n", "all", "random", "mass", "benefit", "--top-n", 0, 2,
        "--restore-mass", 0, 1, "--restore-benefit", 0.05, "--json",
    )  # fmt: skip
    assert code == 0
    rows = {row["experts"]: row for row in json.loads(out)["rows"]}
    assert len(rows) == 8
    none, every = rows["2-bit codes"], rows["2-bit + compensators Top-2"]
    for name, twin in {
        "all": every,
        "random 2": every,
        "mass 1": every,
        "random 0": none,
        "mass 0": none,
    }.items():
        row = rows[f"2-bit + compensators {name}"]
        assert row["window_nats"] == twin["window_nats"], name
        assert row["traffic"] == twin["traffic"], name
    # Some experts have no compensator; their pairs are low-bit whatever the rule says.
    assert 0.5 < every["restored_share"] < 1
    assert none["restored_share"] == none["skipped_share"] == 0
    benefit = rows["2-bit + compensators benefit 0.05"]["restored_share"]
    assert 0 < benefit < every["restored_share"]


def test_a_share_of_the_factors_lies_between_none_and_all(moetier: Run) -> None:
    out = moetier("eval", *TINY, "--top-n", 1, "--factor-share", 0, 0.5, 1, "--json")[1]
    none, half, whole = json.loads(out)["rows"]
    assert half["experts"] == "2-bit + 50% of compensators Top-1"
    assert none["restored_share"] == none["traffic"][0]["factors_bytes"] == 0
    bits = [row["bits_per_weight_moved"] for row in (none, half, whole)]
    assert bits == sorted(set(bits))


def test_skipping_moves_less_by_what_is_skipped(moetier: Run) -> None:
    out = moetier("eval", *TINY, "--top-n", 0, "--skip-below", 0, 0.3, "--json")[1]
    none, skipping = json.loads(out)["rows"]
    assert skipping["experts"] == "2-bit codes, skip < 0.3"
    assert 0.1 < skipping["skipped_share"] < 0.5
    share = skipping["bits_per_weight_moved"] / none["bits_per_weight_moved"]
    assert share == pytest.approx(1 - skipping["skipped_share"])


def test_rows_that_were_kept_are_not_measured_again(moetier: Run, tmp_path: Path) -> None:
    kept = tmp_path / "rows.jsonl"

    def rows(*more: object) -> list[dict[str, Any]]:
        code, out, _ = moetier("eval", *SMALL, "--rows", kept, "--json", *more)
        assert code == 0
        return list(json.loads(out)["rows"])

    first = rows("--top-n", 0)
    again = rows("--top-n", 0, 1)
    assert again[0] == first[0], "the seconds it took, too"
    assert again[1]["more_nats"] is not None
    assert len(kept.read_text().splitlines()) == 2
    other = rows("--top-n", 0, "--decode-tokens", 11)
    assert other[0]["seconds"] != first[0]["seconds"]
    assert len(kept.read_text().splitlines()) == 3


def test_everything_cached_moves_less_than_nothing_cached(moetier: Run) -> None:
    def moved(percent: int) -> float:
        out = moetier("eval", *SMALL, "--cache-percent", percent, "--json")[1]
        return float(json.loads(out)["rows"][0]["traffic"][0]["moved_bytes"])

    assert moved(300) < moved(0) / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "/no/such/file"), "/no/such/file does not exist"),
        (("--windows", "0"), "windows: got 0"),
        (("--windows", "100000"), "too few for 100000 windows"),
        (("--window-tokens", "4096"), "2048 positions"),
        (("--warm-up", "40"), "warm_up: got 40"),
        (("--cache-percent", "-1"), "cache_percent: got -1"),
        (("--cache-percent", "nan"), "cache_percent: got nan"),
        (("--batch", "0"), "batch: got 0"),
        (("--batch", "1", "1"), "batch: got [1, 1], expected one or more, all different"),
        (("--batch", "33"), "batch: got 33, expected 1 to the 32 windows"),
        (("--decode-tokens", "300"), "decode_tokens: got 300, expected at most the 256"),
        (("--restore", "mass"), "--restore mass: give --restore-mass too"),
        (("--restore", "mass", "--restore-mass", "2"), "restore_mass: got 2.0"),
        (("--skip-below", "-1"), "skip_below: got -1"),
        (("--top-n", "3"), "--top-n: got 3"),
    ],
)
def test_bad_input_is_the_callers_mistake(
    moetier: Run, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = moetier("eval", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_progress_is_silent_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with store_progress() as report:
        for stage in ("scan", "compress"):
            for done in range(1, 4):
                report(Progress(stage, done, 3))  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*.txt"):
        read_texts([tmp_path])
    (tmp_path / "bytes.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="not UTF-8 text .byte 3"):
        read_texts([tmp_path])


def test_a_folder_of_wikitext_is_one_text(tmp_path: Path) -> None:
    folder = tmp_path / "wikitext-2-raw"
    folder.mkdir()
    for part in ("train", "valid", "test"):
        (folder / f"wiki.{part}.raw").write_text(f" = {part} = \n")
    assert read_texts([folder]) == [EvalText("wikitext-2-raw", " = test = \n")]


def test_an_original_store_is_made_once_and_again_when_the_model_changes(
    mini_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETIER_CACHE", str(tmp_path / "cache"))
    model = Path(shutil.copytree(MIXTRAL_MINI, tmp_path / "model"))
    first = original_store(model)
    made = (first / "manifest.json").stat().st_mtime_ns
    assert load_manifest(first).recipe.bits == 16
    assert original_store(model) == first
    assert (first / "manifest.json").stat().st_mtime_ns == made
    (model / "training.json").write_text("{}")
    assert original_store(model) != first
