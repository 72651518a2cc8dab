"""Goal: perplexity is that of the plain model, the same by windows and token by token.

Method: against transformers' own loss on the trained mini model; windows cut from a counted list.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpu_worker.counters import StepCounters
from gpu_worker.model import ModelRunner, StepReport
from gpu_worker.scoring import Score, cut_windows, score_decode, score_windows
from tests.gpu_worker.plain_engine import OwnExperts, mini_model, mini_tokenizer


class CountedExperts(OwnExperts):
    """Says that every step moved 1000 bytes."""

    def end(self) -> StepReport:
        return StepReport(StepCounters(moved_bytes={("disk", "codes"): 1000}, sent_bytes=20), {})


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(mini_model(), CountedExperts())


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    text = (
        "The committee met on the first day of the month, and the chairman read the report. " * 20
    )
    return cut_windows(mini_tokenizer().encode(text), num_windows=5, window_tokens=24)


def plain_nats(model: Any, windows_WT: torch.Tensor) -> list[float]:
    """Per window, by transformers' own loss."""
    with torch.no_grad():
        return [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows_WT]


def test_both_ways_give_the_plain_models_loss(runner: ModelRunner, windows: torch.Tensor) -> None:
    expected = plain_nats(runner.model, windows)
    assert score_windows(runner, windows, batch=2).window_nats == pytest.approx(expected, rel=1e-4)
    assert score_decode(runner, windows).window_nats == pytest.approx(expected, rel=1e-4)


def test_bytes_are_those_of_the_counted_steps(runner: ModelRunner, windows: torch.Tensor) -> None:
    by_window = score_windows(runner, windows, batch=2)  # 3 passes of 24-token windows
    assert by_window.num_tokens == 5 * 24
    assert by_window.counters.total_moved_bytes == 3000
    decoded = score_decode(runner, windows, warm_up=4)  # 20 steps of 5 tokens are counted
    assert decoded.num_tokens == 100
    assert decoded.moved_bytes_per_token == 200
    assert decoded.near_data_bytes_per_token == 4


def test_score_arithmetic() -> None:
    score = Score((1.0, 2.0, 3.0), StepCounters(), 10)
    assert score.nats == 2
    assert score.perplexity == pytest.approx(math.e**2)
    assert score.standard_error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(Score((1.0,), StepCounters(), 1).standard_error)


def test_windows_are_spread_over_the_text_and_do_not_overlap() -> None:
    windows = cut_windows(list(range(100)), num_windows=4, window_tokens=9)
    assert windows.shape == (4, 10)
    assert windows[:, 0].tolist() == [0, 25, 50, 75]
    shifted = cut_windows(list(range(100)), num_windows=4, window_tokens=9, seed=1)
    again = cut_windows(list(range(100)), num_windows=4, window_tokens=9, seed=1)
    assert torch.equal(shifted, again)
    assert not torch.equal(shifted, windows)
    assert (shifted[:, 0] // 25).tolist() == (shifted[:, -1] // 25).tolist() == [0, 1, 2, 3]
    assert cut_windows(list(range(40)), num_windows=4, window_tokens=9).flatten().tolist() == list(
        range(40)
    )


def test_bad_requests(runner: ModelRunner, windows: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match="text: 39 tokens are too few for 4 windows of 10.*at most 3"
    ):
        cut_windows(list(range(39)), num_windows=4, window_tokens=9)
    with pytest.raises(ValueError, match="windows: got 0"):
        cut_windows(list(range(39)), num_windows=0, window_tokens=9)
    with pytest.raises(ValueError, match="windows: got shape"):
        score_windows(runner, windows[:, :1])
    with pytest.raises(ValueError, match="warm_up: got 24"):
        score_decode(runner, windows, warm_up=24)
    with pytest.raises(ValueError, match="batch"):
        score_windows(runner, windows, batch=0)
