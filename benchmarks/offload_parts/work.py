"""The text that every contestant walks: prompts and what is decoded after them, per repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from benchmarks.offload_parts.turn import Work
from cluster.texts import EvalText
from expert_store.types import Manifest


@dataclass(frozen=True, slots=True)
class WorkSizes:
    """How much one repetition does; all in tokens but `sequences` and `warm_up` (steps)."""

    prefill_tokens: int = 256
    prompt_tokens: int = 32
    sequences: int = 8
    warm_up: int = 2
    steps: int = 16
    batch_steps: int = 6

    @property
    def text_tokens(self) -> int:
        """Of a sequence: prompt, a step for each sequence that starts after it, and what counts."""
        decoded = self.sequences + self.warm_up + max(self.steps, self.batch_steps) + 1
        return self.prompt_tokens + decoded


LARGE_BYTES = 100_000_000
"""Of bfloat16 experts that a lone token moves: larger models get less work."""


def sizes_for(manifest: Manifest) -> WorkSizes:
    """Of the original's manifest: as much as its bytes allow in minutes."""
    model = manifest.model
    num_layers = len({key.layer for key in manifest.experts})
    expert_bytes = 2 * 3 * model.expert.hidden * model.expert.ffn
    if num_layers * model.top_k * expert_bytes <= LARGE_BYTES:
        return WorkSizes()
    return WorkSizes(prefill_tokens=64, prompt_tokens=16, warm_up=1, steps=4, batch_steps=2)


def works(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[EvalText],
    repetitions: int,
    sizes: WorkSizes,
) -> list[Work]:
    """One for each repetition, from other places of the texts each. Raises ValueError when the
    texts are too short."""
    ids = [tokenizer(t.text, add_special_tokens=False, verbose=False)["input_ids"] for t in texts]
    every = []
    for repetition in range(repetitions):
        cut = [
            _window(ids, texts, repetition * sizes.sequences + number, sizes.text_tokens)
            for number in range(sizes.sequences)
        ]
        every.append(
            Work(
                prefill=_window(ids, texts, repetition, sizes.prefill_tokens),
                texts=cut,
                prompt_tokens=sizes.prompt_tokens,
                warm_up=sizes.warm_up,
                steps=sizes.steps,
                batch_steps=sizes.batch_steps,
            )
        )
    return every


def _window(
    ids: Sequence[list[int]], texts: Sequence[EvalText], number: int, num_tokens: int
) -> list[int]:
    """The number-th piece, taken from the texts in turn."""
    which, place = number % len(ids), number // len(ids)
    start = place * num_tokens
    found = ids[which][start : start + num_tokens]
    if len(found) < num_tokens:
        raise ValueError(
            f"text {texts[which].name}: {len(ids[which])} tokens are too few, "
            f"{start + num_tokens} are needed; give a longer text or ask for fewer repetitions"
        )
    return found
