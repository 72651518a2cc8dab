"""Goal: `moetier generate` continues a prompt from the bundled store, and refuses bad input.

Method: the command in this process over the bundled model's store, made once in a temporary cache.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from expert_store.format import load_manifest

Run = Callable[..., tuple[int, str, str]]
PROMPT = "The return statement"


def test_text_goes_to_stdout_and_figures_to_stderr(moetier: Run) -> None:
    code, out, err = moetier("generate", "--prompt", PROMPT, "--max-tokens", 12, "--seed", 1)
    assert code == 0
    assert out.strip()
    assert "12 tokens in" in err
    assert "end: length" in err
    assert "MB of experts moved" in err
    again = moetier("generate", "--prompt", PROMPT, "--max-tokens", 12, "--seed", 1)[1]
    other = moetier("generate", "--prompt", PROMPT, "--max-tokens", 12, "--seed", 2)[1]
    assert again == out
    assert other != out


def test_json_counts_tokens_and_bytes(moetier: Run, mini_cache: Path) -> None:
    asked = ("generate", "--prompt", PROMPT, "--max-tokens", 6, "--temperature", 0, "--json")
    code, out, _ = moetier(*asked, "--top-n", 0, "--cache-mb", 0)
    report = json.loads(out)
    assert code == 0
    assert (report["output_tokens"], report["finish_reason"], report["degraded"]) == (
        6,
        "length",
        False,
    )
    store = mini_cache / "stores" / "mixtral-mini"
    prompt_ids = AutoTokenizer.from_pretrained(store).encode(PROMPT)
    assert report["prompt_tokens"] == len(prompt_ids)
    # Without a cache five single-token steps move two experts in each of six layers; the prompt
    # at least those and at most two of every token.
    (expert_bytes,) = {e.codes.num_bytes for e in load_manifest(store).experts.values()}
    moved = report["moved_bytes"]
    assert moved == report["counters"]["moved_bytes"]["disk/codes"]
    assert moved % expert_bytes == 0
    assert 5 * 12 + 12 <= moved // expert_bytes <= 5 * 12 + 12 * len(prompt_ids)
    cached = json.loads(moetier(*asked, "--top-n", 0, "--cache-mb", 64)[1])
    assert cached["text"] == report["text"]
    assert cached["moved_bytes"] < moved


def test_stop_ends_before_the_text(moetier: Run) -> None:
    asked = ("generate", "--prompt", PROMPT, "--max-tokens", 20, "--temperature", 0, "--json")
    whole = json.loads(moetier(*asked)[1])["text"]
    stop = whole[12:15]
    cut = json.loads(moetier(*asked, "--stop", "never there", "--stop", stop)[1])
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "--prompt: got an empty text"),
        (("--prompt", "\udcff"), "--prompt: is not UTF-8 text (character 0)"),
        (("--prompt", "x", "--stop", "a\udcff"), "--stop: is not UTF-8 text (character 1)"),
        (("--prompt", "x", "--max-tokens", "-1"), "max_tokens: got -1"),
        (("--prompt", "x", "--max-tokens", "5000"), "context of 2048 tokens"),
        (("--prompt", "word " * 2100), "context of 2048 tokens"),
        (("--prompt", "x", "--top-n", "3"), "top_n: got 3"),
        (("--prompt", "x", "--temperature", "nan"), "temperature: got nan"),
        (("--prompt", "x", "--top-p", "0"), "top_p: got 0"),
        (("--prompt", "x", "--cache-mb", "-1"), "--cache-mb: got -1"),
        (("--prompt", "x", "--cache-mb", "inf"), "--cache-mb: got inf"),
    ],
)
def test_bad_input_is_the_callers_mistake(
    moetier: Run, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = moetier("generate", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert "[transformers]" not in err


def test_a_folder_that_is_no_store(moetier: Run, tmp_path: Path) -> None:
    code, _, err = moetier("generate", tmp_path, "--prompt", "x")
    assert code == 1
    assert "not a finished store" in err


@pytest.mark.parametrize("tokenizer", ["{", None])
def test_a_damaged_tokenizer_is_the_stores_fault(
    moetier: Run, mini_cache: Path, tmp_path: Path, tokenizer: str | None
) -> None:
    store = tmp_path / "store"
    shutil.copytree(mini_cache / "stores" / "mixtral-mini", store)
    if tokenizer is None:
        (store / "tokenizer.json").unlink()
    else:
        (store / "tokenizer.json").write_text(tokenizer)
    code, _, err = moetier("generate", store, "--prompt", "x")
    assert code == 1
    assert f"{store}: tokenizer.json: expected sha256" in err
    assert "--force" in err


def test_a_damaged_expert_is_exit_code_1_with_its_name(
    moetier: Run, mini_cache: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(mini_cache / "stores" / "mixtral-mini", tmp_path / "store"))
    for record in (store / "codes").iterdir():
        data = bytearray(record.read_bytes())
        data[-1000] ^= 255  # in the last expert of each layer
        record.write_bytes(data)
    code, _, err = moetier("generate", store, "--prompt", PROMPT, "--max-tokens", 200, "--seed", 1)
    assert code == 1
    assert "expert 7" in err
    assert "checksum" in err or "sha256" in err
