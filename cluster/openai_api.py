"""OpenAI's completion and chat requests: read strictly, turned into a GPU worker's request.

A field that would change the answer and is not supported is refused by name unless it says what is
done anyway; nothing is silently ignored. Knows no HTTP route and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.openai_errors import ApiError, invalid
from gpu_worker.messages import ChatMessage, GenerateRequest
from gpu_worker.sequence import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's /v1/completions gives when max_tokens is not said. Chat goes on to the end."""
MAX_MESSAGES = 4096

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's API that are not supported -> values that ask for nothing, besides null."""
WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that only label a request on OpenAI's side; accepted, since no answer depends on them."""
SEVERAL_FORMS: dict[str | int, str] = {
    "prompt": "a string or a list of token ids from 0 to 2147483647",
    "stop": "a string or a list of strings",
    "content": 'a string or a list of parts like {"type": "text", "text": "..."}',
}
"""Fields that may be written in more than one way -> what they may be."""

Request = TypeVar("Request", bound="GenerationRequest")
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(BaseModel):
    """`include_usage` asks for one more chunk with the token counts before the end."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(BaseModel):
    """What both kinds of request have in common. top_k, ignore_eos and stop_token_ids are ours."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int | None) -> SamplingParams:
        """The sampling asked for, OpenAI's defaults where nothing is said. Raises ApiError."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k or 0,
                seed=self.seed,
                stop=tuple(stop),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
            )
        except ValueError as error:
            raise invalid(str(error), param=str(error).partition(":")[0]) from error


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: one prompt, as text or token ids."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]

    def to_worker(self, request_id: str) -> GenerateRequest:
        """Raises ApiError for an empty prompt or more than one."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise invalid(
                    f"prompt: got {len(prompt)} prompts, expected one per request", param="prompt"
                )
            prompt = prompt[0]
        if not prompt:
            raise invalid("prompt: is empty, expected text or token ids", param="prompt")
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return GenerateRequest(
            request_id,
            self.sampling(max_tokens),
            prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        )


class TextPart(BaseModel):
    """One part of a message's content; text is the only kind."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. `developer` is OpenAI's newer word for system."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def to_worker(self, index: int) -> ChatMessage:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], ""):
                where = f"messages[{index}].{name}"
                raise invalid(f"{where}: is not supported; leave it out", param=where)
        parts = self.content if isinstance(self.content, list) else [self.content]
        text = "".join(part if isinstance(part, str) else part.text for part in parts)
        return ChatMessage("system" if self.role == "developer" else self.role, text)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions: a conversation."""

    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None

    def to_worker(self, request_id: str) -> GenerateRequest:
        """Raises ApiError for no messages, or nothing said in all of them."""
        turns = tuple(turn.to_worker(index) for index, turn in enumerate(self.messages))
        if not any(turn.content for turn in turns):
            raise invalid("messages: are empty, expected at least one with text", param="messages")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise invalid(
                f"max_completion_tokens: got {self.max_completion_tokens}, but max_tokens is "
                f"{self.max_tokens}; give one of them",
                param="max_completion_tokens",
            )
        max_tokens = limits.pop() if limits else None
        return GenerateRequest(request_id, self.sampling(max_tokens), messages=turns)


def parse_request(kind: type[Request], body: bytes) -> Request:
    """The request in a JSON body. Raises ApiError 400 naming the field that is wrong."""
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise invalid(f"the body must be a JSON object, got {type(data).__name__}")
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _as_api_error(error) from error
    for name, value in (request.model_extra or {}).items():
        _check_extra(name, value)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options: only allowed with stream true", param="stream_options")
    return request


def _check_extra(name: str, value: object) -> None:
    if name in WITHOUT_EFFECT or value is None:
        return
    if name not in UNSUPPORTED:
        raise invalid(f"{name}: unknown field; leave it out", param=name, code="unknown_field")
    # 0 == False in Python, but logprobs 0 asks for something and logprobs false does not.
    for harmless in UNSUPPORTED[name]:
        if value == harmless and isinstance(value, bool) == isinstance(harmless, bool):
            return
    raise invalid(
        f"{name}: is not supported, got {str(value)[:80]}; leave it out",
        param=name,
        code="unsupported_field",
    )


def _as_api_error(error: ValidationError) -> ApiError:
    """The first mistake, by the field's path as the client wrote it."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = _path(first["loc"])
    if first["type"] == "missing":
        return invalid(f"{param}: is missing", param=param)
    # Of several forms pydantic's first error names only the first.
    forms = next((SEVERAL_FORMS[part] for part in first["loc"] if part in SEVERAL_FORMS), None)
    told = first["msg"] if forms is None else f"expected {forms}"
    return invalid(f"{param}: {told}, got {str(first['input'])[:80]}", param=param)


def _path(where: Sequence[str | int]) -> str:
    """A place as the client wrote it, e.g. messages[0].content; not which form of it was tried."""
    path = ""
    for part in where:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        if part in SEVERAL_FORMS:
            break
    return path
