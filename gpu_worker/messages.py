"""What goes in and out of a GPU worker: plain values that need neither torch nor Ray to be read.

`gpu_worker/service.py` answers these; whoever asks (the HTTP ingress) imports only this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gpu_worker.sequence import FinishReason, SamplingParams

FailureKind = Literal["invalid", "context_length", "queue_full", "unavailable", "internal"]
"""Why a request ended without an answer.

- invalid: the request can never run; context_length is the one case of it that clients look for.
- queue_full: too many wait; the same request may succeed later.
- unavailable: an expert's codes could not be read from any tier.
- internal: a mistake of ours.
"""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A prompt (text or token ids) or a conversation, and how to go on from it.

    `request_id` is for logs; it need not be unique. Raises ValueError unless exactly one of prompt
    and messages is given.
    """

    request_id: str
    params: SamplingParams
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] = ()

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("prompt: expected either a prompt or messages, not both, not neither")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that was added to the answer, maybe of several tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer; the text of its last tokens came in pieces before."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    degraded: bool  # some token was answered with less than the store promises
    quality: str | None = None  # the governor's lowest setting while answering; None is full


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request without a whole answer. `field` is the request's own that is wrong."""

    kind: FailureKind
    message: str
    field: str | None = None


Event = Piece | Finished | Failed
"""What `generate` gives: pieces, then exactly one Finished or Failed."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The model a worker runs."""

    name: str
    model_type: str
    max_context: int
    created: int  # seconds since 1970: when this worker loaded it


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker's load now and what it did since its start.

    `counters` is `StepCounters.as_dict()` over all steps; `finished` counts requests by how they
    ended (a finish reason or a failure kind). `governed_tokens` were computed with less than full
    quality to keep a latency target; `knobs` are what the governor has set now, by name. `busy_s`
    is the time spent in steps.
    """

    replica: str
    running_sequences: int
    waiting_sequences: int
    waiting_tokens: int
    steps: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    counters: Mapping[str, Any] = field(default_factory=dict)
    finished: Mapping[str, int] = field(default_factory=dict)
    governed_tokens: int = 0
    knobs: Mapping[str, float] = field(default_factory=dict)
    busy_s: float = 0.0
