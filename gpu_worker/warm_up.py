"""A short request of our own before the first one from outside, which else pays for every start.

On the mini model a first request took 278 ms where later ones took 48: imports, thread pools and
the first masks. Moves some expert bytes; knows no requests and no queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from gpu_worker.engine import Engine
from gpu_worker.sequence import SamplingParams, Sequence

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 8
OUTPUT_TOKENS = 3
"""A chunk of prompt, then decode steps: the shapes that all later steps have, by their kind."""
TEXT = "The first words warm the tokenizer."


def warm_up(engine: Engine, clock: Callable[[], float] = time.monotonic) -> float:
    """Run a prompt and some decode steps; the seconds that took.

    Leaves the engine without work. What the world does to it (no copy of an expert, no near-data
    worker) is logged and not raised: whether the worker can answer is for its requests to find.
    """
    start_s = clock()
    if engine.tokenizer is not None:
        engine.tokenizer(TEXT)
    num_prompt = min(PROMPT_TOKENS, engine.max_context - OUTPUT_TOKENS)
    if num_prompt < 1:
        return 0.0
    # Token ids from 0 on are in every vocabulary, and as good as others for this.
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    engine.add(Sequence("warm-up", tuple(range(num_prompt)), params))
    while engine.has_work:
        for event in engine.step().events:
            if event.error is not None:
                logger.warning("the warm-up did not come through: %s", event.error)
    elapsed_s = clock() - start_s
    logger.info("warmed up in %.3f s", elapsed_s)
    return elapsed_s
