"""What all runs of a process share: a tiny store with a tokenizer, two loaded models, the prompts
and what a healthy engine answers to them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.format import load_manifest
from expert_store.segment import Segment
from expert_store.types import Manifest
from gpu_worker.build import load_tokenizer
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.experts import StoreExperts
from gpu_worker.model import ModelRunner, load_model
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as TokenSequence
from tests.sim.fault_plan import GPU_HOSTS
from tests.tiny_checkpoints import write_tiny_checkpoint

MAX_CONTEXT = 48
VOCAB = 128


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a client may ask, as the HTTP body's fields."""

    ids: tuple[int, ...]
    max_tokens: int
    temperature: float

    def body(self, model: str, *, stream: bool) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(self.ids),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": 7,
            "ignore_eos": True,
            "stream": stream,
        }


PROMPTS = (
    Prompt((5, 6), 3, 0.0),
    Prompt((90, 17, 33, 4, 8, 71, 20), 2, 0.0),
    Prompt((12, 12, 12, 40, 41), 4, 1.0),
    Prompt((99,), 4, 0.7),
    Prompt((64, 3, 120, 55, 9, 9, 31, 88, 14, 2, 77), 2, 0.0),
    Prompt((30, 101, 7), 5, 1.0),
)


@dataclass(frozen=True, slots=True)
class Assets:
    """The store, and what is loaded from it once."""

    store: Path
    manifest: Manifest
    tokenizer: Any
    models: Mapping[str, Any]  # by GPU host
    answers: Sequence[str]  # of PROMPTS


@cache
def make_assets(folder: Path) -> Assets:
    """Compress the tiny model into `folder`, or take what is there."""
    store = folder / "store"
    if not (store / "manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        model = write_tiny_checkpoint("mixtral", folder / "model", hidden=128, ffn=128, vocab=VOCAB)
        _word_tokenizer().save_pretrained(model)
        compress(model, store, CompressionConfig(recipe="paper", avg_rank=16), jobs=1)
    manifest = load_manifest(store)
    config = WorkerConfig(device="cpu", dtype="float32", prefetch="never").resolve(manifest)
    models = {}
    for host in GPU_HOSTS:
        experts = StoreExperts(Segment(store), config)
        models[host] = load_model(store, manifest, config, experts).model
        experts.close()
    tokenizer = load_tokenizer(store)
    answers = [_answer(store, models["gpu-0"], tokenizer, prompt) for prompt in PROMPTS]
    return Assets(store, manifest, tokenizer, models, answers)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """One word for each token, so that a text says which tokens it is of."""
    words = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _answer(store: Path, model: Any, tokenizer: Any, prompt: Prompt) -> str:
    """What one engine alone, with the store on its own disk, makes of a prompt."""
    manifest = load_manifest(store)
    config = WorkerConfig(device="cpu", dtype="float32", prefetch="never").resolve(manifest)
    experts = StoreExperts(Segment(store), config)
    for _, module in _moe_modules(model):
        module.moetier_experts = experts
    engine = Engine(
        ModelRunner(model, experts),
        tokenizer,
        max_sequences=1,
        max_context=MAX_CONTEXT,
        prefill_chunk=64,
        max_waiting=1,
        on_close=experts.close,
    )
    params = SamplingParams(
        max_tokens=prompt.max_tokens, temperature=prompt.temperature, seed=7, ignore_eos=True
    )
    engine.add(TokenSequence("reference", prompt.ids, params))
    text = ""
    while engine.has_work:
        text += "".join(event.text for event in engine.step().events)
    engine.close()
    return text


def _moe_modules(model: Any) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "moetier_layer")]
