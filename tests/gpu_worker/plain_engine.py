"""An Engine over an unmodified transformers model, and a loop that plays requests through it.

What the engine tests share: the scheduler and the slots are judged without our experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_worker.counters import StepCounters
from gpu_worker.engine import Engine, TokenEvent
from gpu_worker.model import ModelRunner, StepReport
from gpu_worker.sequence import Sequence

MINI = Path(__file__).resolve().parents[2] / "models" / "mixtral-mini"


class OwnExperts:
    """The model keeps its own experts: nothing to begin, nothing to report."""

    def begin(self, valid_S: torch.Tensor | None, token_tags_S: Any = None) -> None:
        self.begun = True

    def run_layer(self, *args: Any) -> torch.Tensor:
        raise AssertionError("a plain model does not call this")

    def end(self) -> StepReport:
        return StepReport(StepCounters(), {})


def mini_model() -> Any:
    """mixtral-mini in float32, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32).eval()


def mini_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MINI)


def plain_engine(model: Any, tokenizer: Any = None, **sizes: Any) -> Engine:
    """An engine over `model`, 4 slots of 128 positions unless told otherwise."""
    defaults = {"max_sequences": 4, "max_context": 128, "prefill_chunk": 16, "max_waiting": 32}
    return Engine(ModelRunner(model, OwnExperts()), tokenizer, **{**defaults, **sizes})


def play(
    engine: Engine, arrivals: Mapping[int, list[Sequence]], cancels: Mapping[int, str] | None = None
) -> dict[str, list[TokenEvent]]:
    """Step until all is done; sequences arrive, and are cancelled, before the numbered steps."""
    events: dict[str, list[TokenEvent]] = {}
    step, last = 0, max([*arrivals, *(cancels or {})], default=0)
    while engine.has_work or step <= last:
        for sequence in arrivals.get(step, []):
            engine.add(sequence)
            events[sequence.request_id] = []
        if cancels and step in cancels and (event := engine.cancel(cancels[step])):
            events[event.request_id].append(event)
        for event in engine.step().events:
            events[event.request_id].append(event)
        engine.check_integrity()
        step += 1
        assert step < 10_000, "the engine does not come to an end"
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [e.token_id for e in events if e.token_id is not None]


def text_of(events: list[TokenEvent]) -> str:
    return "".join(e.text for e in events)
