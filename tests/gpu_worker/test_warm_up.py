"""Goal: a warm-up leaves an engine as it found it, and nothing that the world does stops it.

Method: the mini model's engine, and one whose experts are gone.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest

from expert_store.errors import ExpertUnavailableError
from gpu_worker.counters import StepCounters
from gpu_worker.experts import ExpertsFailed
from gpu_worker.sequence import SamplingParams, Sequence
from gpu_worker.warm_up import OUTPUT_TOKENS, PROMPT_TOKENS, warm_up
from tests.gpu_worker.plain_engine import mini_model, mini_tokenizer, plain_engine, play, tokens_of


@pytest.fixture(scope="module")
def model() -> Any:
    return mini_model()


def ask() -> Sequence:
    return Sequence("a", (5, 6, 7), SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))


def test_answers_are_the_same_after_it(model: Any) -> None:
    cold, warm = plain_engine(model), plain_engine(model, mini_tokenizer())
    warm_up(warm)
    assert not warm.has_work
    warm.check_integrity()
    found = [tokens_of(play(engine, {0: [ask()]})["a"]) for engine in (cold, warm)]
    assert found[0] == found[1]


def test_it_computes_a_prompt_and_decode_steps(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = plain_engine(model)
    computed: list[int] = []
    step = engine.step

    def counted() -> Any:
        output = step()
        computed.append(output.num_tokens)
        return output

    monkeypatch.setattr(engine, "step", counted)
    times = iter((10.0, 12.5))
    assert warm_up(engine, lambda: next(times)) == 2.5
    assert computed == [PROMPT_TOKENS, *[1] * (OUTPUT_TOKENS - 1)]


@pytest.mark.parametrize("max_context", [1, 3, 4, 128])
def test_it_fits_any_context(model: Any, max_context: int) -> None:
    engine = plain_engine(model, max_context=max_context)
    warm_up(engine)
    assert not engine.has_work


def test_experts_that_are_gone_are_logged(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = plain_engine(model)

    def lose(*_: Any) -> None:
        cause = ExpertUnavailableError("codes of layer 1 expert 2: no copy (test)")
        raise ExpertsFailed(1, {(1, 2): (0,)}, cause, StepCounters())  # type: ignore[dict-item]

    monkeypatch.setattr(engine, "_run", lose)
    with caplog.at_level(logging.WARNING, "gpu_worker.warm_up"):
        warm_up(engine)
    assert "no copy (test)" in caplog.text
    assert not engine.has_work
