"""Goal: draws follow the distribution that the parameters describe, are reproducible, and never
fail on odd numbers.

Method: exact cuts against a plain definition of top-k and top-p; counts over many seeds; the same
row in different batches; NaN, infinities and extreme temperatures.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.sampler import BadLogitsError, draw, sample, uniform_draw
from gpu_worker.sequence import SamplingParams, Sequence


def sequence(name: str = "a", drawn: int = 0, **params: object) -> Sequence:
    made = Sequence(name, (1,), SamplingParams(**params))  # type: ignore[arg-type]
    made.output_ids += [0] * drawn
    return made


def allowed(logits: list[float], params: SamplingParams) -> set[int]:
    """The tokens that may be drawn, by definition: most likely first, top_k, then top_p."""
    scaled = torch.tensor(logits, dtype=torch.float64) / params.temperature
    order = sorted(range(len(logits)), key=lambda i: (-float(scaled[i]), i))
    order = order[: params.top_k] if params.top_k else order
    probabilities = torch.softmax(scaled[order], dim=0).tolist()
    kept, mass = set(), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if mass >= params.top_p and params.top_p < 1:
            break
        kept.add(token)
        mass += probability
    return kept


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(
        st.integers(-60, 60).map(lambda i: i / 8), min_size=1, max_size=12, unique=True
    ),
    temperature=st.floats(0.05, 2),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.05, 1),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_draws_stay_inside_the_cut(
    logits: list[float], temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    token = draw(torch.tensor(logits), params, uniform)
    slack = SamplingParams(temperature=temperature, top_k=top_k, top_p=min(1.0, top_p + 1e-9))
    assert token in allowed(logits, slack)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_finds_its_tokens_in_a_large_vocabulary(spread: float) -> None:
    logits = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * spread
    ordered = torch.softmax(logits.double(), dim=0).sort(descending=True)
    for top_p in (0.1, 0.9, 0.999):
        num_kept = int((ordered.values.cumsum(0) < top_p).sum()) + 1
        kept = set(ordered.indices[:num_kept].tolist())
        params = SamplingParams(top_p=top_p)
        drawn = {draw(logits, params, uniform) for uniform in (0.0, 0.3, 0.7, 1 - 1e-12)}
        assert drawn <= kept
        assert draw(logits, params, 0.0) == int(logits.argmax())
        assert draw(logits, params, 1 - 1e-12) == int(ordered.indices[num_kept - 1])


def test_frequencies_are_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    params = SamplingParams(temperature=0.7)
    num_draws = 20_000
    counts = torch.zeros(4)
    for seed in range(num_draws):
        counts[draw(logits, params, uniform_draw(seed, 3))] += 1
    expected = torch.softmax(logits / 0.7, dim=0)
    # Standard error of a share is at most 0.5/sqrt(20000) = 0.0035; five of them.
    assert (counts / num_draws - expected).abs().max() < 0.018


def test_uniforms_are_even_and_differ_by_seed_and_index() -> None:
    rows = [[uniform_draw(seed, i) for i in range(100)] for seed in range(100)]
    drawn = torch.tensor(rows, dtype=torch.float64)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.unique().numel() == drawn.numel()
    assert abs(float(drawn.mean()) - 0.5) < 0.015
    assert drawn.mean(0).std() < 0.06
    assert drawn.mean(1).std() < 0.06
    assert uniform_draw(-1, 0) != uniform_draw(1, 0)


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    rows = tuple(sequence(str(i), drawn=i, seed=i, top_p=0.9, top_k=20) for i in range(6))
    together = [s.token_id for s in sample(logits, rows)]
    alone = [sample(logits[i : i + 1], (rows[i],))[0].token_id for i in range(6)]
    backwards = [s.token_id for s in sample(logits.flip(0), rows[::-1])][::-1]
    assert together == alone == backwards


def test_the_next_token_uses_another_draw() -> None:
    logits = torch.zeros(1, 1000)
    tokens = {sample(logits, (sequence(seed=1, drawn=i),))[0].token_id for i in range(20)}
    assert len(tokens) > 15


def test_greedy_takes_the_largest_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    greedy = (sequence(temperature=0), sequence("b", temperature=0.0))
    assert [s.token_id for s in sample(logits, greedy)] == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_an_error_of_that_sequence_only(temperature: float, bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0], [float("-inf")] * 3])
    rows = tuple(sequence(name, temperature=temperature, seed=0) for name in "abc")
    good, broken, empty = sample(logits, rows)
    assert good.token_id is not None
    assert good.error is None
    for got in (broken, empty):
        assert got.token_id is None
        assert isinstance(got.error, BadLogitsError)
    assert "request b" in str(broken.error)


def test_extreme_numbers_do_not_break_a_draw() -> None:
    huge = torch.tensor([1e30, -1e30, float("-inf"), 3.0])
    for temperature in (1e-300, 1e-6, 2.0):
        assert draw(huge, SamplingParams(temperature=temperature), 0.999999999) == 0
    flat = torch.zeros(5)
    assert len({draw(flat, SamplingParams(top_p=1e-9), u / 10) for u in range(10)}) == 1
    assert draw(flat, SamplingParams(top_k=100), 0.99) == 4
    assert draw(flat.bfloat16(), SamplingParams(), 0.0) == 0
