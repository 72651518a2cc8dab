"""A store as a model of lm-evaluation-harness (`lm_eval`), and its tasks run over variants.

Imported only where tasks are asked for: the package is optional (`pip install moetier[lm-eval]`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from cluster.eval_model import OpenVariant, opened
from cluster.eval_settings import Variant
from gpu_worker.continuations import Continuation, score_continuations
from gpu_worker.engine import Engine, end_token_ids
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as Request

MAX_GENERATED = 256
"""Tokens of an answer when a task does not say."""
BOOTSTRAPS = 1000
"""Draws behind the standard errors that lm_eval has no formula for."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task for one variant; `error` is lm_eval's standard error, None if none."""

    experts: str
    task: str
    metric: str
    value: float
    error: float | None
    num_samples: int


def evaluate_tasks(
    variants: Iterable[Variant],
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> Iterator[TaskScore]:
    """lm_eval's own scores of every variant, task by task and metric by metric.

    `folder` holds task files (YAML) beside those of lm_eval; `limit` is a number of samples of each
    task. Raises ValueError for a task that lm_eval does not know.
    """
    manager = _task_manager(tasks, folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"--tasks: lm_eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, "
            "--task-folder adds your own"
        )
    for variant in variants:
        with opened(variant) as ready:
            found = simple_evaluate(
                model=StoreLM(ready),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                log_samples=False,
                bootstrap_iters=BOOTSTRAPS,
            )
        yield from _scores(variant.label, found)


def _task_manager(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """Reading lm_eval's own ten thousand task files takes a while: only when one is asked for."""
    if folder is None:
        return TaskManager()
    own = TaskManager(include_path=str(folder), include_defaults=False)
    if all(own.match_tasks([task]) for task in tasks):
        return own
    return TaskManager(include_path=str(folder))


class StoreLM(TemplateLM):
    """An open variant as lm_eval's model: likelihoods by our runner, answers by our engine.

    Raises ValueError for a store without a tokenizer.
    """

    def __init__(self, ready: OpenVariant) -> None:
        super().__init__()
        if ready.model.tokenizer is None:
            raise ValueError("this store has no tokenizer, so lm_eval cannot ask it anything")
        assert ready.model.config.max_context is not None, "resolved configs have a context"
        self.tokenizer = ready.model.tokenizer
        self._runner = ready.model.runner
        self._config = ready.model.config
        self.max_length = ready.model.config.max_context

    @property
    def eot_token_id(self) -> int:
        return end_token_ids(self._runner)[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; with what the tokenizer itself adds, unless told, or it is there already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        # verbose: a text that is longer than the context is cut into windows; no reason to warn.
        encoded = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded["input_ids"])

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [
            Continuation(tuple(context), tuple(continuation)).cut(self.max_length)
            for _, context, continuation in requests
        ]
        found = score_continuations(self._runner, asked)
        return [(each.log_prob, each.is_greedy) for each in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, in windows as long as the context, every token predicted once."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            asked = [
                Continuation(tuple(inputs[: len(inputs) - len(scored) + 1]), tuple(scored))
                for inputs, scored in windows
            ]
            parts = score_continuations(self._runner, asked)
            found.append(sum(part.log_prob for part in parts))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, greedy unless the task says otherwise, as many side by side as slots."""
        engine = Engine(
            self._runner,
            self.tokenizer,
            max_sequences=self._config.max_sequences,
            max_context=self.max_length,
            prefill_chunk=self._config.prefill_chunk,
            max_waiting=len(requests),
        )
        texts = {str(number): "" for number in range(len(requests))}
        for number, request in enumerate(requests):
            engine.add(self._request(str(number), *request.args))
        while engine.has_work:
            for event in engine.step().events:
                if event.error is not None:
                    raise event.error
                texts[event.request_id] += event.text
        return list(texts.values())

    def _request(self, name: str, context: str, options: dict[str, Any]) -> Request:
        """One request of a task; a context that is too long loses its beginning."""
        max_tokens = int(options.get("max_gen_toks") or MAX_GENERATED)
        room = self.max_length - max_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks: got {max_tokens}, expected less than the {self.max_length} tokens "
                "of the context"
            )
        until = options.get("until") or ()
        warmth = options.get("temperature") if options.get("do_sample") else 0.0
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=float(warmth or 0.0),
            top_p=float(options.get("top_p") or 1.0),
            seed=0,
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return Request(name, tuple(ids[-room:]), params)


def _scores(label: str, found: Any) -> Iterator[TaskScore]:
    """lm_eval's dictionary, {"metric,filter": value}, as rows."""
    for task, metrics in found["results"].items():
        num_samples = found["n-samples"].get(task, {}).get("effective", 0)
        for name, value in metrics.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            shown = metric if chosen == "none" else f"{metric} ({chosen})"
            plain = float(error) if isinstance(error, int | float) else None
            yield TaskScore(label, task, shown, float(value), plain, num_samples)
