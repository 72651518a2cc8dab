"""Turns a request's prompt or conversation into token ids, by the model's tokenizer and template.

Knows no engine and no sampling.
"""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gpu_worker.messages import GenerateRequest


class PromptTooLongError(ValueError):
    """The prompt does not fit the context, whatever its tokens are."""


def longest_token_bytes(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """UTF-8 bytes that one token can stand for at most, by the vocabulary; 1 without a tokenizer.

    A vocabulary writes some bytes longer than they are, none shorter.
    """
    vocabulary = tokenizer.get_vocab() if tokenizer else {}
    return max((len(token.encode(errors="replace")) for token in vocabulary), default=1)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None,
    request: GenerateRequest,
    *,
    max_bytes: int | None = None,
) -> tuple[int, ...]:
    """Token ids, with the special tokens that the model's tokenizer or template adds.

    `max_bytes` is what the context's tokens can stand for at most: tokenizing more than that would
    take seconds, for nothing. Raises ValueError, naming the request's field, for what this model
    cannot read, and PromptTooLongError.
    """
    if isinstance(request.prompt, tuple):
        return request.prompt
    if tokenizer is None:
        raise ValueError("prompt: this model has no tokenizer; give token ids")
    if request.prompt is not None:
        _check_size("prompt", request.prompt, max_bytes)
        return _encode(tokenizer, request.prompt, add_special_tokens=True)
    if not tokenizer.chat_template:
        raise ValueError(
            "messages: this model has no chat template; use /v1/completions with a prompt"
        )
    turns = [{"role": turn.role, "content": turn.content} for turn in request.messages]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"messages: the model's chat template refuses them: {error}") from error
    assert isinstance(text, str), type(text)
    _check_size("messages", text, max_bytes)
    return _encode(tokenizer, text, add_special_tokens=False)


def _check_size(field: str, text: str, max_bytes: int | None) -> None:
    if max_bytes is not None and (size := len(text.encode(errors="replace"))) > max_bytes:
        raise PromptTooLongError(
            f"{field}: {size} bytes of text are more than the context's tokens can hold, at most "
            f"{max_bytes} bytes; shorten it"
        )


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool
) -> tuple[int, ...]:
    # Not verbose: a text longer than the context is refused by the engine, with its lengths.
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))
