"""Goal: a request's tokens are those of the model alone, whoever else runs; requests end as they
should.

Method: the trained mini model and tiny models of several families, played through the engine
beside each other, against transformers' own `generate` and against themselves alone; slots poisoned
between requests; errors, cancels and bad input from outside.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gpu_worker.engine import Engine
from gpu_worker.sampler import BadLogitsError
from gpu_worker.scheduler import QueueFullError
from gpu_worker.sequence import SamplingParams, Sequence
from tests.gpu_worker.plain_engine import (
    mini_model,
    mini_tokenizer,
    plain_engine,
    play,
    text_of,
    tokens_of,
)
from tests.tiny_checkpoints import tiny_config, write_tiny_checkpoint

PROMPTS = [
    "The",
    "It was a dark and stormy night, and the captain of the ship said",
    "The return statement may only occur nested in a function definition. It leaves",
    "Fellow citizens of the Senate and of the House of Representatives: I have the honour",
    "A noun that means",
    "usage: grep [OPTION]... PATTERNS [FILE]...",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return mini_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return mini_tokenizer()


def requests(tokenizer: Any, **params: Any) -> list[Sequence]:
    """One request per prompt, with answers of differing lengths."""
    return [
        Sequence(
            f"r{i}",
            tuple(tokenizer.encode(prompt)),
            SamplingParams(max_tokens=5 + 3 * i, ignore_eos=True, seed=i, **params),
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def generated(model: Any, sequence: Sequence) -> list[int]:
    """transformers' own greedy continuation."""
    prompt = torch.tensor([sequence.prompt_ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=sequence.params.max_tokens,
        eos_token_id=10**6,  # never: the requests ignore theirs
        do_sample=False,
        temperature=None,
        top_p=None,
    )
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95}])
def test_tokens_are_the_same_alone_and_in_any_batch(
    model: Any, tokenizer: Any, sampling: dict[str, float]
) -> None:
    alone: dict[str, list[int]] = {}
    for sequence in requests(tokenizer, **sampling):
        alone[sequence.request_id] = tokens_of(
            play(plain_engine(model, prefill_chunk=64), {0: [sequence]})[sequence.request_id]
        )
    for seed in range(3):  # other arrival orders, chunk sizes and company
        rng = random.Random(seed)
        arrivals: dict[int, list[Sequence]] = {}
        for sequence in rng.sample(requests(tokenizer, **sampling), len(PROMPTS)):
            arrivals.setdefault(rng.randrange(20), []).append(sequence)
        leaver = Sequence("leaver", (5, 6, 7), SamplingParams(max_tokens=60))
        arrivals.setdefault(1, []).append(leaver)
        engine = plain_engine(model, prefill_chunk=rng.choice([3, 8]), max_sequences=3)
        events = play(engine, arrivals, cancels={9: "leaver"})
        assert {name: tokens_of(events[name]) for name in alone} == alone
    if sampling["temperature"] == 0:
        assert alone == {s.request_id: generated(model, s) for s in requests(tokenizer)}


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "deepseek_v2", "deepseek", "gpt_oss", "qwen2_moe", "granitemoe"]
)
def test_families_give_the_tokens_of_generate(family: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(family, tmp_path / family, layers=3)
    tiny = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(family)
    sequences = [
        Sequence(
            str(i),
            tuple(rng.randrange(3, 128) for _ in range(length)),
            SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
        )
        for i, length in enumerate([2, 21, 9, 40])  # past gpt-oss' window of 16
    ]
    events = play(
        plain_engine(tiny, max_sequences=3, prefill_chunk=7),
        {0: sequences[:2], 3: sequences[2:3], 6: sequences[3:]},
    )
    for sequence in sequences:
        assert tokens_of(events[sequence.request_id]) == generated(tiny, sequence), family


def test_sliding_window_models_give_the_tokens_of_generate() -> None:
    torch.manual_seed(1)
    tiny = AutoModelForCausalLM.from_config(tiny_config("mixtral", sliding_window=8)).eval()
    sequence = Sequence(
        "a", tuple(range(3, 33)), SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    )
    events = play(plain_engine(tiny, prefill_chunk=5), {0: [sequence]})
    assert tokens_of(events["a"]) == generated(tiny, sequence)


def test_text_stops_at_stop_strings_and_end_tokens(model: Any, tokenizer: Any) -> None:
    def run(**params: Any) -> Any:
        prompt = tuple(tokenizer.encode(PROMPTS[1]))
        asked = SamplingParams(temperature=0, max_tokens=24, **params)
        return play(plain_engine(model, tokenizer), {0: [Sequence("a", prompt, asked)]})["a"]

    whole = run(ignore_eos=True)
    text = text_of(whole)
    assert whole[-1].finish_reason == "length"
    assert whole[-1].num_output_tokens == 24
    assert text == tokenizer.decode(tokens_of(whole), skip_special_tokens=True)
    stop = text[20:23]
    cut = run(ignore_eos=True, stop=(stop,))
    assert cut[-1].finish_reason == "stop"
    assert text_of(cut) == text[: text.index(stop)]
    assert cut[-1].num_output_tokens < 24
    assert [e.finish_reason for e in cut[:-1]] == [None] * (len(cut) - 1)
    token = tokens_of(whole)[7]
    first = tokens_of(whole).index(token)
    ended = run(stop_token_ids=(token,))
    assert ended[-1].finish_reason == "stop"
    assert tokens_of(ended) == tokens_of(whole)[: first + 1]
    assert text_of(ended) == tokenizer.decode(tokens_of(whole)[:first], skip_special_tokens=True)


def test_max_tokens_none_runs_until_the_context_is_full(model: Any) -> None:
    sequence = Sequence("a", (5,) * 10, SamplingParams(max_tokens=None, ignore_eos=True, seed=0))
    events = play(plain_engine(model, max_context=32), {0: [sequence]})["a"]
    assert events[-1].finish_reason == "length"
    assert len(tokens_of(events)) == 22


def test_a_cancel_frees_the_slot_at_once(model: Any, tokenizer: Any) -> None:
    engine = plain_engine(model, tokenizer, max_sequences=1)
    engine.add(Sequence("first", (5, 6), SamplingParams(max_tokens=100, ignore_eos=True)))
    engine.add(Sequence("second", (5, 6), SamplingParams(max_tokens=2)))
    for _ in range(4):
        engine.step()
    event = engine.cancel("first")
    assert event is not None
    assert (event.finish_reason, event.num_output_tokens) == ("cancelled", 4)
    engine.check_integrity()
    assert [e.request_id for e in engine.step().events] == ["second"]
    waiting = Sequence("third", (5,))
    engine.add(waiting)
    assert engine.cancel("third") is not None
    assert engine.cancel("nobody") is None
    assert waiting.finish_reason == "cancelled"
    engine.check_integrity()


def test_freed_slots_do_not_leak_into_the_next_request(model: Any) -> None:
    def run(engine: Engine) -> list[int]:
        asked = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        return tokens_of(play(engine, {0: [Sequence("a", (9, 8, 7), asked)]})["a"])

    fresh = run(plain_engine(model, max_sequences=1))
    engine = plain_engine(model, max_sequences=1)
    play(engine, {0: [Sequence("old", (40,) * 60, SamplingParams(max_tokens=30, seed=1))]})
    for keys, values in engine._cache._layers.values():
        assert not keys.any()
        assert not values.any()
        with torch.inference_mode():
            keys.fill_(1e4)  # what is masked must not matter either
            values.fill_(-1e4)
    assert run(engine) == fresh


def test_nan_logits_end_only_the_request_they_belong_to(model: Any) -> None:
    asked = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    alone = play(plain_engine(model), {0: [Sequence("good", (5, 6, 7), asked)]})
    engine = plain_engine(model)
    bad = Sequence("bad", (11, 12), asked)
    forward = engine._runner.forward

    @torch.inference_mode()
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if bad.num_computed >= 3 and bad.slot is not None and args[0].shape[1] == 1:
            output.logits[bad.slot] = float("nan")
        return output

    engine._runner.forward = poisoned
    events = play(engine, {0: [bad, Sequence("good", (5, 6, 7), asked)]})
    assert events["bad"][-1].finish_reason == "error"
    assert isinstance(events["bad"][-1].error, BadLogitsError)
    assert tokens_of(events["good"]) == tokens_of(alone["good"])


def test_requests_that_can_never_run_are_refused(model: Any) -> None:
    engine = plain_engine(model, max_context=32, max_waiting=0, max_sequences=1)
    with pytest.raises(ValueError, match="prompt: 30 tokens and max_tokens 3 .* context of 32"):
        engine.add(Sequence("a", (5,) * 30, SamplingParams(max_tokens=3)))
    with pytest.raises(ValueError, match="prompt: 32 tokens"):
        engine.add(Sequence("a", (5,) * 32, SamplingParams(max_tokens=None)))
    with pytest.raises(ValueError, match="prompt: 1 tokens and max_tokens 1000000000"):
        engine.add(Sequence("a", (5,), SamplingParams(max_tokens=10**9)))
    with pytest.raises(ValueError, match="token id 8192 is outside"):
        engine.add(Sequence("a", (5, 8192)))
    with pytest.raises(ValueError, match="stop: this engine has no tokenizer"):
        engine.add(Sequence("a", (5,), SamplingParams(stop=("x",))))
    engine.add(Sequence("a", (5,) * 29, SamplingParams(max_tokens=3, ignore_eos=True)))
    with pytest.raises(QueueFullError):
        engine.add(Sequence("b", (5,)))
    engine.check_integrity()
    assert engine.has_work
    while engine.has_work:
        engine.step()
    assert engine.step().events == ()


def test_close_cancels_and_releases_once(model: Any) -> None:
    closed = []
    engine = plain_engine(model, on_close=lambda: closed.append(True))
    sequence = Sequence("a", (5,), SamplingParams(max_tokens=50))
    engine.add(sequence)
    engine.step()
    engine.close()
    assert sequence.finish_reason == "cancelled"
    assert closed == [True]
    engine.check_integrity()
