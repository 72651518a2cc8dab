"""Runs a store's model to record where its tokens go: over given texts, or answering prompts.

Knows no command line and no file; the recorder is `gpu_worker/trace.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cluster.texts import EvalText
from expert_store.segment import Segment
from gpu_worker.build import OpenModel, open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.messages import GenerateRequest
from gpu_worker.prompt import encode_prompt
from gpu_worker.scoring import cut_windows, score_decode
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as Request
from gpu_worker.trace import StepTrace, TraceRecorder, traced

StepsDone = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """How much is run. Raises ValueError naming the field.

    - batch: sequences that decode side by side.
    - tokens: tokens that each of them decodes.
    - groups: batches over texts, one after another with the cache as they find it.
    - temperature, seed: of answers to prompts.
    """

    batch: int = 1
    tokens: int = 256
    groups: int = 4
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


def trace_texts(
    store: Path,
    texts: Sequence[EvalText],
    settings: TraceSettings,
    config: WorkerConfig | None = None,
    progress: StepsDone = lambda num_steps: None,
) -> StepTrace:
    """Decode windows of the texts, the next token always that of the text: a real text's routing,
    whatever the model would have said. Windows are taken from all texts in turn.

    Raises ValueError when the texts are too short.
    """
    with _opened(store, settings, config) as (source, model, recorder):
        windows_WT = _windows(model, texts, settings)
        for windows_BT in windows_WT.split(settings.batch):
            score_decode(model.runner, windows_BT)
            progress(settings.tokens)
        names = ", ".join(text.name for text in texts)
        return _finish(source, recorder, settings, f"texts {names}")


def trace_prompts(
    store: Path,
    prompts: Sequence[str],
    settings: TraceSettings,
    config: WorkerConfig | None = None,
    progress: StepsDone = lambda num_steps: None,
) -> StepTrace:
    """Answer the prompts with the engine that serves, `batch` at a time: their own steps too.

    Raises ValueError for a prompt that cannot run, and the cause when one fails.
    """
    with _opened(store, settings, config) as (source, model, recorder):
        assert model.config.max_context is not None, "resolved configs have a context"
        engine = Engine(
            model.runner,
            model.tokenizer,
            max_sequences=model.config.max_sequences,
            max_context=model.config.max_context,
            prefill_chunk=model.config.prefill_chunk,
            max_waiting=len(prompts),
        )
        params = SamplingParams(
            max_tokens=settings.tokens, temperature=settings.temperature, seed=settings.seed
        )
        for number, prompt in enumerate(prompts):
            request = GenerateRequest(str(number), params, prompt)
            prompt_ids = encode_prompt(engine.tokenizer, request)
            engine.add(Request(request.request_id, prompt_ids, params))
        with closing(engine):
            while engine.has_work:
                for event in engine.step().events:
                    if event.error is not None:
                        raise event.error
                progress(1)
        return _finish(source, recorder, settings, f"answers to {len(prompts)} prompts")


@contextmanager
def _opened(
    store: Path, settings: TraceSettings, config: WorkerConfig | None
) -> Iterator[tuple[Segment, OpenModel, TraceRecorder]]:
    config = replace(config or WorkerConfig(), max_sequences=settings.batch)
    with closing(Segment(store)) as source:
        model = open_model(store, source, None, config)
        try:
            pairs = model.config.pair_policy(source.manifest)
            with traced(model.runner, pairs) as recorder:
                yield source, model, recorder
        finally:
            model.close()


def _windows(model: OpenModel, texts: Sequence[EvalText], settings: TraceSettings) -> torch.Tensor:
    """[W, tokens + 1] with W of batch x groups, from one text after the other, round and round."""
    if model.tokenizer is None:
        raise ValueError("--text: the store has no tokenizer, so text cannot be read")
    wanted = settings.batch * settings.groups
    of_each = -(-wanted // len(texts))
    cut = []
    for text in texts:
        ids = model.tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
        cut.append(cut_windows(ids, num_windows=of_each, window_tokens=settings.tokens))
    return torch.stack(cut, dim=1).flatten(0, 1)[:wanted]


def _finish(
    source: Segment, recorder: TraceRecorder, settings: TraceSettings, what: str
) -> StepTrace:
    manifest = source.manifest
    origin = (
        f"{what}; {settings.batch} side by side, {settings.tokens} tokens each; "
        f"recipe {manifest.recipe.name}"
    )
    return recorder.trace(manifest.model, manifest.version, origin)
