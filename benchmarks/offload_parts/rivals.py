"""What a user would pick today on one machine: how each is run for the same work as our engines.

A rival holds the model in its own way, all of it on this machine: nothing crosses the link. Knows
no rival's library; they are `rival_transformers.py` and `rival_llama.py`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Protocol

from benchmarks.offload_parts.turn import Phase, Work


class Rival(Protocol):
    """A model that decodes several texts side by side."""

    @property
    def bytes_per_step(self) -> int:
        """Expert bytes that it loads in each forward, however many tokens that has; 0 when all
        stays in memory."""
        ...

    def start(self, prompts: list[list[int]]) -> None:
        """Forget all and compute these prompts, which are of one length."""
        ...

    def step(self, tokens: list[int]) -> None:
        """Compute the next token of each text."""
        ...

    def nats(self, window: list[int]) -> float:
        """Mean loss per token that is predicted from those before it."""
        ...


def run(rival: Rival, work: Work) -> dict[str, object]:
    """The phases as `Turn.run` gives them."""
    started = time.perf_counter()
    rival.start([work.prefill])
    prefill = _phase(rival, time.perf_counter() - started, len(work.prefill), 1)
    started = time.perf_counter()
    _start(rival, work.texts[:1], work)
    first_token_s = time.perf_counter() - started
    one = _decode(rival, work.texts[:1], work, work.steps)
    _start(rival, work.texts, work)
    many = _decode(rival, work.texts, work, work.batch_steps)
    phases = {"prefill": prefill, "one": one, "many": many}
    return {name: asdict(phase) for name, phase in phases.items()} | {
        "first_token_s": first_token_s
    }


def serve(rival: Rival) -> None:
    """Answer lines of JSON on the input, as `hosts.Node` asks them."""
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "turn":
            answer: object = run(rival, Work(**question["work"]))
        else:
            answer = [rival.nats(window) for window in question["windows"]]
        print(json.dumps(answer), flush=True)


def _start(rival: Rival, texts: list[list[int]], work: Work) -> None:
    rival.start([text[: work.prompt_tokens] for text in texts])


def _decode(rival: Rival, texts: list[list[int]], work: Work, steps: int) -> Phase:
    first = work.prompt_tokens
    for place in range(first, first + work.warm_up):
        rival.step([text[place] for text in texts])
    first += work.warm_up
    started = time.perf_counter()
    for place in range(first, first + steps):
        rival.step([text[place] for text in texts])
    return _phase(rival, time.perf_counter() - started, steps * len(texts), steps)


def _phase(rival: Rival, seconds: float, tokens: int, steps: int) -> Phase:
    moved = rival.bytes_per_step * steps
    return Phase(
        seconds=seconds,
        tokens=tokens,
        wait_s=0.0,
        codes_bytes=moved,
        factors_bytes=0,
        activation_bytes=0,
        wire_bytes=0,
        planned_bytes=moved,
        vain_bytes=0,
        near_data_pairs=0,
        restored_pairs=0,
        degraded_pairs=0,
    )
