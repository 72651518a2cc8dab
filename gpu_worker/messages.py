"""What goes in and out of a GPU worker: plain values that need neither torch nor Ray to be read.

`gpu_worker/service.py` answers these; whoever asks (the HTTP ingress) imports only this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from gpu_worker.sequence import FinishReason, SamplingParams

FailureKind = Literal[
    "invalid", "context_length", "queue_full", "unavailable", "stopped", "internal"
]
"""Why a request ended without an answer.

- invalid: the request can never run; context_length is the one case of it that clients look for.
- queue_full: too many wait; the same request may succeed later.
- unavailable: an expert's codes could not be read from any tier; no other worker has them.
- stopped: this worker ends before the answer is whole; another one can give it.
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

    `request_id` is for logs; it need not be unique: a request that is sent to another worker keeps
    it and counts its `attempt`. Raises ValueError unless exactly one of prompt and messages is
    given.
    """

    request_id: str
    params: SamplingParams
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] = ()
    attempt: int = 1

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("prompt: expected either a prompt or messages, not both, not neither")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that was added to the answer, maybe of several tokens.

    `degraded`: some token so far was answered with less than the store promises. `version`: on an
    answer's first event, the version of the store that answers.
    """

    text: str
    degraded: bool = False
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer; the text of its last tokens came in pieces before."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    degraded: bool  # some token was answered with less than the store promises
    quality: str | None = None  # the governor's lowest setting while answering; None is full
    version: str | None = None  # as a Piece's, where the answer has no text


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
    version: str | None = None  # of the store: another one when any record differs


class ExpertUses(NamedTuple):
    """How often a worker has asked the memory tier for one expert, or to run it."""

    layer: int
    expert: int
    uses: int


@dataclass(frozen=True, slots=True)
class TierCalls:
    """How a worker's calls to the memory tier went since its start: counts by name.

    `fetches` are those of `ReadingStatistics`, `near_data` those of the near-data workers' calls;
    empty where there are no copies, or nobody near the data.
    """

    fetches: Mapping[str, int] = field(default_factory=dict)
    near_data: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker's load now and what it did since its start.

    `counters` is `StepCounters.as_dict()` over all steps; `finished` counts requests by how they
    ended (a finish reason or a failure kind), `degraded_requests` those answered to their end with
    less than the store promises. `version` is the store's. `governed_tokens` were computed with
    less than full quality to keep a latency target; `knobs` are what the governor has set now, by
    name. `busy_s` is the time spent in steps. `expert_uses` are what it asked most of the memory
    tier since they were told last; `tier_calls` say how that went.
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
    degraded_requests: int = 0
    version: str | None = None
    expert_uses: tuple[ExpertUses, ...] = ()
    busy_s: float = 0.0
    tier_calls: TierCalls = field(default_factory=TierCalls)
