"""llama.cpp on a GGUF file of the same weights, by the library inside llama-cpp-python.

`python -m benchmarks.offload_parts.rival_llama FILE` serves it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.offload_parts.rivals import serve

MAX_SEQUENCES = 8
CONTEXT_TOKENS = 512
"""Of one sequence."""


class LlamaRival:
    """The file in memory, on `num_threads` threads. Raises ValueError for what it cannot load."""

    bytes_per_step = 0

    def __init__(self, file: Path, num_threads: int = 1) -> None:
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)  # it tells the whole file on stderr
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise ValueError(f"{file}: llama.cpp {llama_cpp.__version__} cannot load it")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = MAX_SEQUENCES * CONTEXT_TOKENS
        settings.n_batch = settings.n_ubatch = CONTEXT_TOKENS
        settings.n_seq_max = MAX_SEQUENCES
        settings.n_threads = settings.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._batch = llama_cpp.llama_batch_init(CONTEXT_TOKENS, 0, 1)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._num_words = llama_cpp.llama_vocab_n_tokens(vocab)
        self._positions: list[int] = []

    def start(self, prompts: list[list[int]]) -> None:
        self._forget()
        self._positions = [len(prompt) for prompt in prompts]
        for sequence, prompt in enumerate(prompts):
            last = len(prompt) - 1
            self._compute([(t, i, sequence, i == last) for i, t in enumerate(prompt)])

    def step(self, tokens: list[int]) -> None:
        places = zip(tokens, self._positions, range(len(tokens)), strict=True)
        self._compute([(token, position, sequence, True) for token, position, sequence in places])
        self._positions = [position + 1 for position in self._positions]
        for row in range(len(tokens)):
            self._logits(row).argmax()

    def nats(self, window: list[int]) -> float:
        self._forget()
        self._compute([(token, i, 0, True) for i, token in enumerate(window[:-1])])
        losses = []
        for row, target in enumerate(window[1:]):
            logits_V = self._logits(row).astype(np.float64)
            losses.append(np.logaddexp.reduce(logits_V) - logits_V[target])
        return float(np.mean(losses))

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _compute(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Token, position, sequence, and whether its logits are wanted, of each row."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence, is_wanted) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = is_wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave status {status} for {len(rows)} tokens")

    def _logits(self, row: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self._num_words,))


if __name__ == "__main__":
    serve(LlamaRival(Path(sys.argv[1])))
