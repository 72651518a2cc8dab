"""Goal: a continuation's likelihood is that of the plain model, whoever is scored beside it.

Method: mini model in float32 against transformers' own logits, one sequence at a time; lengths
mixed; a recorder of which rows were said to be padding.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from gpu_worker.continuations import Continuation, score_continuations
from gpu_worker.model import ModelRunner
from tests.gpu_worker.plain_engine import OwnExperts, mini_model


class SeenPadding(OwnExperts):
    """Keeps which rows were padding."""

    def __init__(self) -> None:
        self.valid: list[torch.Tensor] = []

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: Any = None) -> None:
        assert valid_S is not None
        self.valid.append(valid_S)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(mini_model(), SeenPadding())


def asked(number: int) -> list[Continuation]:
    draw = random.Random(number)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 8000) for _ in range(draw.randint(low, high)))

    return [Continuation(ids(1, 12), ids(1, 5)) for _ in range(number)]


def plain(model: Any, each: Continuation) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([[*each.context, *each.continuation]])).logits[0]
    log_probs = logits.log_softmax(dim=1)[len(each.context) - 1 : -1]
    targets = torch.tensor(each.continuation)
    total = float(log_probs.gather(1, targets[:, None]).sum())
    return total, bool((log_probs.argmax(dim=1) == targets).all())


@pytest.mark.parametrize("pass_tokens", [1, 24, 10_000])
def test_likelihoods_are_the_plain_model_s_in_any_company(
    runner: ModelRunner, pass_tokens: int
) -> None:
    continuations = asked(9)
    runner.experts.valid.clear()  # type: ignore[attr-defined]
    found = score_continuations(runner, continuations, pass_tokens=pass_tokens)
    for each, got in zip(continuations, found, strict=True):
        log_prob, is_greedy = plain(runner.model, each)
        assert got.log_prob == pytest.approx(log_prob, rel=1e-4)
        assert got.is_greedy is is_greedy
    seen = sum(int(valid.sum()) for valid in runner.experts.valid)  # type: ignore[attr-defined]
    assert seen == sum(len(each.inputs) for each in continuations), "no expert runs for padding"


def test_what_greedy_decoding_makes_is_greedy(runner: ModelRunner) -> None:
    context = (40, 41, 42, 43)
    made = runner.model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)
    continuation = tuple(made[0, 4:].tolist())
    (found,) = score_continuations(runner, [Continuation(context, continuation)])
    assert found.is_greedy
    other = (*continuation[:-1], (continuation[-1] + 1) % 8000)
    (found,) = score_continuations(runner, [Continuation(context, other)])
    assert not found.is_greedy


def test_a_long_context_loses_its_beginning_and_a_continuation_nothing() -> None:
    each = Continuation((1, 2, 3, 4, 5), (6, 7))
    assert each.inputs == (1, 2, 3, 4, 5, 6)
    assert each.cut(6) == each
    assert each.cut(4) == Continuation((3, 4, 5), (6, 7))
    assert each.cut(2) == Continuation((5,), (6, 7))
    with pytest.raises(ValueError, match="2 tokens are more than the context of 1"):
        each.cut(1)


def test_nothing_asked_gives_nothing_and_empty_parts_are_refused(runner: ModelRunner) -> None:
    assert score_continuations(runner, []) == []
    with pytest.raises(ValueError, match="context: got no token"):
        Continuation((), (1,))
    with pytest.raises(ValueError, match="continuation: got no token"):
        Continuation((1,), ())
