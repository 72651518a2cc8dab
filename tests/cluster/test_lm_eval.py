"""Goal: lm_eval sees a store as it sees the model it was made of: likelihoods, rolling texts,
answers, and the scores of a task.

Method: the bundled model's own bf16 experts as a store, against lm_eval's own adapter for
transformers; a task of four questions in a folder, without network. Skipped where lm_eval, an
optional package, is not installed (`make lm-eval`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.commands import eval as eval_command
from cluster.eval_model import OpenVariant, opened
from cluster.eval_settings import Variant
from cluster.stores import original_store
from models import MIXTRAL_MINI

Run = Callable[..., tuple[int, str, str]]
PAIRS = [
    ("The committee met on the first day of the", " month"),
    ("The committee met on the first day of the", " zebra crossing of a long road"),
    ("", "The return statement"),
    ("A list is ", "a sequence of values."),
]
TEXTS = ["A short text.", "The chairman read the report of the year to the committee. " * 12]
PROMPTS = [
    ("The return statement", {"until": ["\n", "."], "max_gen_toks": 12}),
    ("In the year", {"until": "zzzz", "max_gen_toks": 5}),
]
ONLY = {"include_defaults": False}
TASK = """
task: tiny_questions
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    test: {folder}/questions.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def test_without_the_package_the_command_says_what_to_install(
    moetier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_command, "find_spec", lambda name: None)
    code, out, err = moetier("eval", "--tasks", "arc_easy")
    assert (code, out) == (2, "")
    assert "lm_eval is not installed; pip install 'moetier[lm-eval]'" in err


@pytest.mark.slow
class TestAdapter:
    """With lm_eval there."""

    @pytest.fixture(scope="class", autouse=True)
    def _needs_lm_eval(self) -> None:
        pytest.importorskip("lm_eval", reason="lm_eval is optional: make lm-eval installs it")

    @pytest.fixture(scope="class")
    def ready(self, mini_cache: Path) -> Iterator[OpenVariant]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOETIER_CACHE", str(mini_cache))
            with opened(Variant("original", original_store(MIXTRAL_MINI))) as made:
                yield made

    @pytest.fixture(scope="class")
    def both(self, ready: OpenVariant) -> tuple[Any, Any]:
        """Our model and lm_eval's own, of one checkpoint."""
        from lm_eval.models.huggingface import HFLM

        from cluster.lm_eval_model import StoreLM

        theirs = HFLM(
            pretrained=str(MIXTRAL_MINI), dtype="float32", device="cpu", max_length=64, batch_size=2
        )
        ours = StoreLM(ready)
        ours.max_length = 64
        return ours, theirs

    def test_likelihoods_are_those_of_lm_eval_s_own_model(self, both: tuple[Any, Any]) -> None:
        found, expected = (
            model.loglikelihood([SimpleNamespace(args=pair) for pair in PAIRS]) for model in both
        )
        for (ours, ours_greedy), (theirs, theirs_greedy) in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
            assert ours_greedy == theirs_greedy

    def test_rolling_texts_longer_than_the_context_too(self, both: tuple[Any, Any]) -> None:
        from lm_eval.api.instance import Instance

        asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
        found, expected = (model.loglikelihood_rolling(asked) for model in both)
        assert found == pytest.approx(expected, rel=1e-3)

    def test_answers_are_the_greedy_ones_up_to_their_stop(self, both: tuple[Any, Any]) -> None:
        from lm_eval.api.instance import Instance

        asked = [
            Instance("generate_until", {}, (text, {**options, "do_sample": False}), 0)
            for text, options in PROMPTS
        ]
        found, expected = (model.generate_until(asked) for model in both)
        assert found == expected
        assert all(found)

    def test_an_answer_that_fills_the_context_is_refused(self, both: tuple[Any, Any]) -> None:
        with pytest.raises(ValueError, match="max_gen_toks: got 64, expected less than the 64"):
            both[0]._request("0", "text", {"max_gen_toks": 64})

    def test_a_task_in_a_folder_is_scored_line_by_line(self, moetier: Run, tmp_path: Path) -> None:
        questions = [
            {"question": context, "choices": [right, wrong], "answer": 0}
            for context, right, wrong in (
                ("The committee met on the first day of the", " month", " zebra"),
                ("He read the", " report", " xylophone"),
                ("in the year of our", " Lord", " qqqq"),
                ("the House of", " zzzz", " Commons"),  # what is said to be right is not
            )
        ]
        (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
        (tmp_path / "tiny.yaml").write_text(TASK.format(folder=tmp_path))
        arguments = ("--tasks", "tiny_questions", "--task-folder", tmp_path)
        code, out, _ = moetier("eval", *arguments, "--top-n", 0, 1, "--json")
        assert code == 0
        scores = json.loads(out)["scores"]
        assert [score["experts"] for score in scores] == [
            "2-bit codes",
            "2-bit + compensators Top-1",
        ]
        for score in scores:
            assert (score["task"], score["metric"]) == ("tiny_questions", "acc")
            assert score["value"] == 0.75
            assert score["num_samples"] == 4
            assert score["error"] == pytest.approx(0.25)
        code, out, _ = moetier("eval", *arguments, "--limit", 2)
        assert code == 0
        assert "tiny_questions" in out

    def test_an_unknown_task_is_named(
        self, moetier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from cluster import lm_eval_model

        all_tasks = lm_eval_model.TaskManager
        monkeypatch.setattr(
            lm_eval_model, "TaskManager", lambda **kinds: all_tasks(**{**kinds, **ONLY})
        )
        code, _, err = moetier("eval", "--tasks", "no_such_task", "--task-folder", tmp_path)
        assert code == 2
        assert "lm_eval knows no task 'no_such_task'" in err
