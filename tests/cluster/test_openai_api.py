"""Goal: a request means what OpenAI's reference says, and what we cannot do is refused by name.

Method: tables of bodies with the request they become, or the field and words they are refused
with; answers are checked against the official client's own types.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.openai_answers import DONE, AnswerHead, model_object
from cluster.openai_api import (
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    parse_request,
)
from cluster.openai_errors import ApiError
from gpu_worker.messages import ChatMessage, Finished, GenerateRequest, ModelDescription

COMPLETION: dict[str, Any] = {"model": "mini", "prompt": "The"}
CHAT: dict[str, Any] = {"model": "mini", "messages": [{"role": "user", "content": "Hi"}]}


def completion(**fields: Any) -> GenerateRequest:
    body = json.dumps({**COMPLETION, **fields}).encode()
    return parse_request(CompletionRequest, body).to_worker("r")


def chat(**fields: Any) -> GenerateRequest:
    return parse_request(ChatRequest, json.dumps({**CHAT, **fields}).encode()).to_worker("r")


def refused(kind: type[GenerationRequest], body: Any) -> ApiError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse_request(kind, raw).to_worker("r")  # type: ignore[attr-defined]
    assert caught.value.status == 400
    return caught.value


def test_a_completion_has_openais_defaults() -> None:
    request = completion()
    assert request.prompt == "The"
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p) == (16, 1.0, 1.0)
    assert (params.seed, params.stop, params.top_k) == (None, (), 0)


def test_every_supported_field_arrives() -> None:
    params = completion(
        max_tokens=3, temperature=0, top_p=0.5, top_k=4, seed=7, stop=["a", "b"],
        stop_token_ids=[5], ignore_eos=True, user="me",
    ).params  # fmt: skip
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (3, 0.0, 0.5, 4)
    assert (params.seed, params.stop, params.stop_token_ids) == (7, ("a", "b"), (5,))
    assert params.ignore_eos


@pytest.mark.parametrize(
    ("prompt", "meaning"), [("a", "a"), (["a"], "a"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2))]
)
def test_the_four_forms_of_a_prompt(prompt: Any, meaning: Any) -> None:
    assert completion(prompt=prompt).prompt == meaning


def test_a_chat_has_turns_and_no_limit() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
            {"role": "assistant", "content": "c", "refusal": None, "annotations": []},
        ]
    )
    assert request.messages == (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "ab"),
        ChatMessage("assistant", "c"),
    )
    assert request.params.max_tokens is None
    assert chat(max_completion_tokens=5).params.max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).params.max_tokens == 5


BAD_COMPLETIONS: dict[str, tuple[Any, str | None, str]] = {
    "not JSON": (b"{", None, "not valid JSON"),
    "not UTF-8": (b'{"model": "\xff"}', None, "not valid JSON"),
    "lone surrogate": (b'{"model": "mini", "prompt": "\\ud800"}', None, "not valid JSON"),
    "too deep": (b"[" * 100_000, None, "not valid JSON"),
    "a list": ([], None, "JSON object"),
    "no model": ({"prompt": "a"}, "model", "missing"),
    "no prompt": ({"model": "mini"}, "prompt", "missing"),
    "empty prompt": ({**COMPLETION, "prompt": ""}, "prompt", "empty"),
    "empty list": ({**COMPLETION, "prompt": []}, "prompt", "empty"),
    "list of empty": ({**COMPLETION, "prompt": [""]}, "prompt", "empty"),
    "two prompts": ({**COMPLETION, "prompt": ["a", "b"]}, "prompt", "one per request"),
    "mixed prompt": ({**COMPLETION, "prompt": ["a", 1]}, "prompt", "token ids"),
    "prompt type": ({**COMPLETION, "prompt": 3}, "prompt", "a string or a list"),
    "token id negative": ({**COMPLETION, "prompt": [-1]}, "prompt", "from 0 to"),
    "max_tokens text": ({**COMPLETION, "max_tokens": "5"}, "max_tokens", "5"),
    "max_tokens fraction": ({**COMPLETION, "max_tokens": 1.5}, "max_tokens", "1.5"),
    "max_tokens bool": ({**COMPLETION, "max_tokens": True}, "max_tokens", ""),
    "max_tokens zero": ({**COMPLETION, "max_tokens": 0}, "max_tokens", "at least 1"),
    "max_tokens negative": ({**COMPLETION, "max_tokens": -5}, "max_tokens", "-5"),
    "temperature": ({**COMPLETION, "temperature": 2.5}, "temperature", "0 to 2"),
    "temperature NaN": (b'{"model":"m","prompt":"a","temperature":NaN}', "temperature", "nan"),
    "top_p": ({**COMPLETION, "top_p": 0}, "top_p", "over 0"),
    "top_k": ({**COMPLETION, "top_k": -1}, "top_k", "at least 0"),
    "seed": ({**COMPLETION, "seed": 2**70}, "seed", ""),
    "stop type": ({**COMPLETION, "stop": [3]}, "stop", "list of strings, got [3]"),
    "stop empty": ({**COMPLETION, "stop": ""}, "stop", "1 to"),
    "too many stops": ({**COMPLETION, "stop": ["a"] * 17}, "stop", "at most 16"),
    "stream type": ({**COMPLETION, "stream": "yes"}, "stream", ""),
    "stream options": (
        {**COMPLETION, "stream_options": {"include_usage": True}},
        "stream_options",
        "stream true",
    ),
    "unknown field": ({**COMPLETION, "temprature": 1}, "temprature", "unknown field"),
    "n": ({**COMPLETION, "n": 2}, "n", "not supported"),
    "logprobs 0 asks for some": ({**COMPLETION, "logprobs": 0}, "logprobs", "not supported"),
    "logit_bias": ({**COMPLETION, "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    "echo": ({**COMPLETION, "echo": True}, "echo", "not supported"),
}

BAD_CHATS: dict[str, tuple[Any, str | None, str]] = {
    "no messages": ({"model": "mini"}, "messages", "missing"),
    "empty messages": ({**CHAT, "messages": []}, "messages", "empty"),
    "nothing said": (
        {**CHAT, "messages": [{"role": "user", "content": ""}]},
        "messages",
        "empty",
    ),
    "role": (
        {**CHAT, "messages": [{"role": "bard", "content": "x"}]},
        "messages[0].role",
        "'user'",
    ),
    "no role": ({**CHAT, "messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
    "no content": ({**CHAT, "messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    "no object": ({**CHAT, "messages": ["x"]}, "messages[0]", "got x"),
    "image": (
        {
            **CHAT,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        },
        "messages[0].content",
        "parts like",
    ),
    "tool calls": (
        {**CHAT, "messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
        "not supported",
    ),
    "tools": ({**CHAT, "tools": [{"type": "function"}]}, "tools", "not supported"),
    "json mode": (
        {**CHAT, "response_format": {"type": "json_object"}},
        "response_format",
        "not supported",
    ),
    "two limits": (
        {**CHAT, "max_tokens": 3, "max_completion_tokens": 4},
        "max_completion_tokens",
        "give one",
    ),
    "logprobs": ({**CHAT, "logprobs": True}, "logprobs", "not supported"),
}


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
def test_a_bad_completion_is_refused_by_name(case: str) -> None:
    body, param, words = BAD_COMPLETIONS[case]
    error = refused(CompletionRequest, body)
    assert (error.param, words in error.message) == (param, True), error.message


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_chat_is_refused_by_name(case: str) -> None:
    body, param, words = BAD_CHATS[case]
    error = refused(ChatRequest, body)
    assert (error.param, words in error.message) == (param, True), error.message


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_what_is_missing_is_told_in_the_clients_words(kind: type[GenerationRequest]) -> None:
    with pytest.raises(ApiError, match="^(prompt|messages): is missing$"):
        parse_request(kind, b'{"model": "mini"}')


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_asks_for_nothing_is_accepted(field: str) -> None:
    for value in (None, *UNSUPPORTED[field]):
        assert completion(**{field: value}) == completion()


def test_an_error_has_openais_shape() -> None:
    error = ApiError(429, "later", code="queue_full", retry_after_s=2)
    assert error.body("r-1") == {
        "error": {
            "message": "later",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        },
        "request_id": "r-1",
    }
    assert error.headers == {"retry-after": "2"}


FINISHED = Finished("length", 3, 2, False)


def test_whole_answers_are_the_clients_own_types() -> None:
    text = AnswerHead("completion", "cmpl-1", 5, "mini").whole("ab", FINISHED)
    parsed = Completion.model_validate(text)
    assert (parsed.choices[0].text, parsed.choices[0].finish_reason) == ("ab", "length")
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == 5
    said = ChatCompletion.model_validate(AnswerHead("chat", "c", 5, "mini").whole("ab", FINISHED))
    assert said.choices[0].message.content == "ab"


@pytest.mark.parametrize("include_usage", [False, True])
def test_chunks_are_the_clients_own_types(include_usage: bool) -> None:
    head = AnswerHead("chat", "c", 5, "mini", include_usage)
    opening = head.first_chunk()
    assert opening is not None
    stream = opening + head.text_chunk("ab") + head.last_chunks(FINISHED)
    assert stream.endswith(DONE)
    chunks = [
        ChatCompletionChunk.model_validate_json(part.removeprefix("data: "))
        for part in stream.removesuffix(DONE).split("\n\n")
        if part
    ]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "ab"
    assert chunks[0].choices[0].delta.role == "assistant"
    usages = [chunk.usage for chunk in chunks]
    assert (usages[-1] is not None) == include_usage
    assert usages[:-1] == [None] * (len(chunks) - 1)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_a_degraded_stream_says_so_at_its_end() -> None:
    head = AnswerHead("completion", "c", 5, "mini")
    chunks = head.last_chunks(Finished("stop", 1, 1, True))
    assert '"moetier":{"degraded":true,"quality":null}' in chunks
    assert "degraded" not in head.last_chunks(FINISHED)


def test_a_governed_stream_says_with_what_quality_at_its_end() -> None:
    head = AnswerHead("chat", "c", 5, "mini")
    governed = Finished("stop", 1, 1, False, "top_n=0; factor_share=0.25")
    told = '"moetier":{"degraded":false,"quality":"top_n=0; factor_share=0.25"}'
    assert told in head.last_chunks(governed)
    assert "quality" not in head.last_chunks(FINISHED)


def test_a_model_is_the_clients_own_type() -> None:
    model = model_object(ModelDescription("mini", "mixtral", 2048, 5))
    assert Model.model_validate(model).id == "mini"


def test_the_ingress_needs_neither_torch_nor_ray() -> None:
    """Their imports cost seconds at start-up, in every ingress replica."""
    code = (
        "import sys, cluster.routes; "
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
