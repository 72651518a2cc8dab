"""Tokens to text as they come: whole characters only, and nothing that may belong to a stop string.

Knows no model and no sampling.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
CONTEXT_TOKENS = 6
"""Tokens before the new ones that are decoded with them: some tokenizers drop a leading space."""
MAX_PENDING_TOKENS = 16
"""A character has at most 4 bytes: more tokens than this without a whole one are not UTF-8."""


class Detokenizer:
    """Turns token ids into text piece by piece; the pieces joined are the decoded output."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: tuple[int, ...] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._num_emitted = len(self._ids)  # of _ids, those whose text is out
        self._emitted_text = self._decode(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this token completes, maybe none."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        pending = len(self._ids) - self._num_emitted
        if text.endswith(UNFINISHED) and pending < MAX_PENDING_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is left at the end; replacement characters for bytes that became no character."""
        return self._emit(self._decode(self._ids))

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted_text) :]
        self._ids = self._ids[self._num_emitted :][-CONTEXT_TOKENS:] or self._ids
        self._num_emitted = len(self._ids)
        self._emitted_text = self._decode(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class StopFilter:
    """Withholds text until it cannot be part of a stop string; ends at the first stop string.

    The match that is complete first wins, so that the cut does not depend on how the text was
    sliced; of those complete together, the longest.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may go out now. Nothing after a stop string, nor the string itself."""
        if self.stopped:
            return ""
        self._held += text
        matches = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if matches:
            self.stopped = True
            return self._take(min(matches)[1])
        return self._take(len(self._held) - self._num_suspect())

    def flush(self) -> str:
        """The rest, when the request ends otherwise."""
        return "" if self.stopped else self._take(len(self._held))

    def _num_suspect(self) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0

    def _take(self, size: int) -> str:
        out, self._held = self._held[:size], self._held[size:]
        return out


class TextStream:
    """The text of one request, token by token; without a tokenizer there is none."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_ids: tuple[int, ...],
        stop: tuple[str, ...],
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids) if tokenizer else None
        self._filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def push(self, token_id: int) -> str:
        """The text that may go out after this token."""
        return self._filter.push(self._detokenizer.push(token_id)) if self._detokenizer else ""

    def finish(self) -> str:
        """The rest of the text, once there are no more tokens."""
        last = self._filter.push(self._detokenizer.flush()) if self._detokenizer else ""
        return last + self._filter.flush()
