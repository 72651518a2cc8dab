"""One request's tokens, sampling and progress; and the sequences of one step.

Validated at the door. Knows no tensor, no text, no slot arithmetic: the scheduler moves the state.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from typing import Literal

State = Literal["waiting", "prefill", "running", "finished"]
FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    temperature 0 is greedy. top_k 0 and top_p 1 are off. `max_tokens` None means until the context
    is full. `seed` None draws one. Stop strings end the text and are not part of it;
    `stop_token_ids` end it as the model's own end tokens do. `ignore_eos` goes on past both kinds.

    Raises ValueError naming the field, what it got and what is allowed.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, None)
        _require_number("temperature", self.temperature, 0.0, 2.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ValueError("top_p: got 0, expected a number over 0 and at most 1")
        _require_int("top_k", self.top_k, 0, None)
        if self.seed is not None:
            _require_int("seed", self.seed, -MAX_SEED, MAX_SEED)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: got {self.ignore_eos!r}, expected true or false")
        self._check_stop()

    def _check_stop(self) -> None:
        if not isinstance(self.stop, tuple) or not isinstance(self.stop_token_ids, tuple):
            raise ValueError("stop: expected a tuple of strings, stop_token_ids one of integers")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(
                f"stop: got {len(self.stop)} strings, expected at most {MAX_STOP_STRINGS}"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise ValueError(
                    f"stop: got {str(text)[:40]!r}, expected strings of 1 to {MAX_STOP_CHARS} "
                    f"characters"
                )
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, 0, None)


def _require_int(name: str, value: object, low: int, high: int | None) -> None:
    allowed = f"an integer of at least {low}" + ("" if high is None else f" and at most {high}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: got {value!r}, expected {allowed}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: got {value}, expected {allowed}")


def _require_number(name: str, value: object, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise ValueError(f"{name}: got {value!r}, expected a number from {low:g} to {high:g}")


@dataclass(slots=True, eq=False)
class Sequence:
    """One request: what came in, what has come out, and how far it is.

    `num_computed` counts the positions whose keys and values are in the slot. `degraded` says that
    some token was answered with less than the store promises (codes where a compensator was due).
    `lowest_rung` is the largest rung of the governor that one of its tokens was computed on.

    Raises ValueError on an empty prompt or request id.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    output_ids: list[int] = field(default_factory=list)
    state: State = "waiting"
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    degraded: bool = False
    lowest_rung: int = 0
    slot: int | None = None
    num_computed: int = 0
    seed: int = 0  # the request's own, or drawn here

    def __post_init__(self) -> None:
        if not self.request_id:
            raise ValueError("request_id: got an empty string, expected a name for the request")
        self.prompt_ids = tuple(self.prompt_ids)
        if not self.prompt_ids:
            raise ValueError("prompt: got no tokens, expected at least one; send some text")
        self.seed = secrets.randbits(62) if self.params.seed is None else self.params.seed

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions [start, end) of prompt and output together."""
        num_prompt = len(self.prompt_ids)
        from_output = self.output_ids[max(0, start - num_prompt) : max(0, end - num_prompt)]
        return [*self.prompt_ids[start:end], *from_output]


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one step: each gives its next `num_tokens` tokens to the model.

    Either a chunk of one prompt, or one token of each running sequence.
    """

    sequences: tuple[Sequence, ...]
    num_tokens: int

    def __post_init__(self) -> None:
        assert self.sequences, "a batch without sequences"
        assert self.num_tokens == 1 or len(self.sequences) == 1, (
            f"ragged batch: {len(self.sequences)} sequences of {self.num_tokens} tokens"
        )

    @property
    def samples(self) -> bool:
        """Whether this step's last logits choose a token (false inside a longer prompt)."""
        first = self.sequences[0]
        return first.num_computed + self.num_tokens == first.num_tokens

    def without(self, sequences: set[Sequence]) -> Batch | None:
        """The batch of the others; None when there are none."""
        kept = tuple(s for s in self.sequences if s not in sequences)
        return Batch(kept, self.num_tokens) if kept else None
