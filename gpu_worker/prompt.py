"""Turns a request's prompt or conversation into token ids, by the model's tokenizer and template.

Knows no engine and no sampling.
"""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gpu_worker.messages import GenerateRequest


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None, request: GenerateRequest
) -> tuple[int, ...]:
    """Token ids, with the special tokens that the model's tokenizer or template adds.

    Raises ValueError, naming the request's field, for what this model cannot read.
    """
    if isinstance(request.prompt, tuple):
        return request.prompt
    if tokenizer is None:
        raise ValueError("prompt: this model has no tokenizer; give token ids")
    if request.prompt is not None:
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
    return _encode(tokenizer, text, add_special_tokens=False)


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool
) -> tuple[int, ...]:
    # Not verbose: a text longer than the context is refused by the engine, with its lengths.
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))
