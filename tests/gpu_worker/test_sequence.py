"""Goal: a request that makes no sense is refused at the door by field, value and what is allowed.

Method: one bad value per field; positions across the border of prompt and output; seeds.
"""

from __future__ import annotations

import pytest

from gpu_worker.sequence import Batch, SamplingParams, Sequence


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", -0.2),
        ("top_k", -1),
        ("top_k", 1.5),
        ("seed", 2**63),
        ("seed", "x"),
        ("stop", ("",)),
        ("stop", ("x" * 1025,)),
        ("stop", ("x",) * 17),
        ("stop", (3,)),
        ("stop", "not a tuple"),
        ("stop_token_ids", (-1,)),
        ("ignore_eos", 1),
    ],
)
def test_bad_sampling_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}.*expected"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_bounds_themselves_are_allowed() -> None:
    params = SamplingParams(max_tokens=None, temperature=0, top_p=1, top_k=0, seed=2**63 - 1)
    assert params.seed == 2**63 - 1
    stops = ("x" * 1024,) * 16
    params = SamplingParams(max_tokens=1, temperature=2.0, top_p=1e-6, seed=-5, stop=stops)
    assert params.stop == stops


def test_empty_prompt_and_empty_id_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt: got no tokens"):
        Sequence("a", ())
    with pytest.raises(ValueError, match="request_id"):
        Sequence("", (1,))


def test_seed_is_the_requests_own_or_drawn() -> None:
    assert Sequence("a", (1,), SamplingParams(seed=7)).seed == 7
    assert Sequence("a", (1,)).seed != Sequence("b", (1,)).seed


def test_tokens_cross_the_border_of_prompt_and_output() -> None:
    sequence = Sequence("a", (1, 2, 3))
    sequence.output_ids += [4, 5]
    everything = [1, 2, 3, 4, 5]
    for start in range(6):
        for end in range(start, 6):
            assert sequence.tokens(start, end) == everything[start:end]
    assert sequence.num_tokens == 5


def test_batch_samples_only_at_the_end_of_a_prompt() -> None:
    sequence = Sequence("a", (1, 2, 3))
    assert not Batch((sequence,), 2).samples
    assert Batch((sequence,), 3).samples
    other = Sequence("b", (1,))
    assert Batch((sequence, other), 1).without({sequence}) == Batch((other,), 1)
    assert Batch((other,), 1).without({other}) is None
