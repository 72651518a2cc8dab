"""OpenAI's answer objects: whole completions, stream chunks, model lists.

Built from plain values; knows no worker and no HTTP.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from gpu_worker.messages import Finished, ModelDescription

Kind = Literal["completion", "chat"]

DONE = "data: [DONE]\n\n"
"""The last event of every stream that did not fail."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every object of one answer repeats."""

    kind: Kind
    answer_id: str
    created: int  # seconds since 1970
    model: str
    include_usage: bool = False

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        """The answer in one object."""
        content: dict[str, Any] = {"text": text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _reason(finished)}
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._common(name), "choices": [choice], "usage": usage(finished)}

    def first_chunk(self) -> str | None:
        """What opens a stream: the role, for chat; nothing else."""
        return self._chunk({"role": "assistant", "content": ""}) if self.kind == "chat" else None

    def text_chunk(self, text: str) -> str:
        return self._chunk({"content": text} if self.kind == "chat" else {"text": text})

    def last_chunks(self, finished: Finished) -> str:
        """The finish reason, then the usage if asked for, then DONE.

        An answer that was degraded, at whichever token, or governed says so in the finish chunk, as
        "moetier": {"degraded": true or false, "quality": the governor's setting or null}: a
        stream's headers have left. The chunk of an answer of full quality has no such field.
        """
        delta: dict[str, Any] = {} if self.kind == "chat" else {"text": ""}
        more: dict[str, Any] = {}
        if finished.degraded or finished.quality is not None:
            more["moetier"] = {"degraded": finished.degraded, "quality": finished.quality}
        chunks = self._chunk(delta, finish_reason=_reason(finished), **more)
        if self.include_usage:
            chunks += event({**self._stream_common(), "choices": [], "usage": usage(finished)})
        return chunks + DONE

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        content = {"delta": delta} if self.kind == "chat" else delta
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._stream_common(), "choices": [choice], **more})

    def _stream_common(self) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        common = self._common(name)
        return {**common, "usage": None} if self.include_usage else common

    def _common(self, name: str) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }


def usage(finished: Finished) -> dict[str, int]:
    """Token counts of one answer."""
    return {
        "prompt_tokens": finished.num_prompt_tokens,
        "completion_tokens": finished.num_output_tokens,
        "total_tokens": finished.num_prompt_tokens + finished.num_output_tokens,
    }


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def model_object(model: ModelDescription) -> dict[str, Any]:
    """An entry of /v1/models; `max_model_len` is the context in tokens, as vLLM has it, and
    `version` the store's.
    """
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "moetier",
        "max_model_len": model.max_context,
        "version": model.version,
    }


def _reason(finished: Finished) -> str:
    return "length" if finished.finish_reason == "length" else "stop"
