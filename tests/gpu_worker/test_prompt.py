"""Goal: a text that cannot fit is refused before it costs seconds, and one that may fit never is.

Method: the bundled tokenizer on any text (hypothesis); one that must not be asked to encode.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.messages import ChatMessage, GenerateRequest
from gpu_worker.prompt import PromptTooLongError, encode_prompt, longest_token_bytes
from gpu_worker.sequence import SamplingParams
from tests.gpu_worker.plain_engine import mini_tokenizer

TOKENIZER = mini_tokenizer()
LONGEST = longest_token_bytes(TOKENIZER)


class NeverEncodes:
    """Templates as the bundled tokenizer does, and fails when it should encode."""

    chat_template = TOKENIZER.chat_template

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        return TOKENIZER.apply_chat_template(*args, **options)


def completion(text: str) -> GenerateRequest:
    return GenerateRequest("r", SamplingParams(), prompt=text)


@given(st.text() | st.sampled_from(["─" * 99, " " * 99, "=" * 99]))
def test_no_text_has_more_bytes_than_its_tokens_can_hold(text: str) -> None:
    num_tokens = len(encode_prompt(TOKENIZER, completion(text)))
    assert len(text.encode()) <= num_tokens * LONGEST


def test_a_text_that_cannot_fit_is_not_tokenized() -> None:
    tokenizer: Any = NeverEncodes()
    with pytest.raises(PromptTooLongError, match="prompt: 11 bytes .* at most 10 bytes"):
        encode_prompt(tokenizer, completion("ä" * 5 + "b"), max_bytes=10)
    chat = GenerateRequest("r", SamplingParams(), messages=(ChatMessage("user", "x" * 999),))
    with pytest.raises(PromptTooLongError, match="messages: "):
        encode_prompt(tokenizer, chat, max_bytes=999)
    assert encode_prompt(TOKENIZER, completion("ä" * 5), max_bytes=10)


def test_without_a_tokenizer_there_is_no_text_to_measure() -> None:
    assert longest_token_bytes(None) == 1
