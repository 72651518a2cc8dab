"""How often the next layer's routing is guessed right, and what fetching by the guess is worth.

`python -m benchmarks.prefetch` taps the original models on held-out text (the bundled one, and
smol-moe where it is there), then decodes the bundled model's store behind a source of bounded speed
with and without prefetch, both engines in turn at every step. Gate: both choose the same tokens.

Legend: S token rows, K top-k.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.bounded_source import BoundedSource
from benchmarks.quality import HELD_OUT
from benchmarks.record import RESULTS, provenance, table
from cluster.models import has_smol, smol_folder
from cluster.stores import bundled_store
from cluster.texts import read_texts
from expert_store.families import experts_modules
from expert_store.segment import Segment
from gpu_worker.build import build_engine
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.engine import Engine
from gpu_worker.router_guess import RouterGuess
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as Request
from models import MIXTRAL_MINI

REPORT = RESULTS / "prefetch.md"
WINDOW_TOKENS = 256
LINKS_GBIT = (0.25, 1, 4)
CALL_S = 0.0005
WARM_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = [MIXTRAL_MINI, *([smol_folder()] if has_smol() else [])]
    hits = [hit_row(model) for model in models]
    gains = [gain_row(gbit, batch, arguments.steps) for gbit in LINKS_GBIT for batch in (1, 8)]
    text = page(hits, gains)
    REPORT.write_text(text)
    print(text)


def hit_row(folder: Path) -> list[str]:
    """Model, share of pairs guessed right, of first experts among the guesses, by chance."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    guess = RouterGuess.of(model, model.config.num_experts_per_tok)
    assert guess is not None, f"{folder}: its routers are no single matrix each"
    right, first, by_layer = [], [], []
    for text in read_texts([HELD_OUT] if HELD_OUT.is_dir() else []):
        ids = tokenizer.encode(text.text[:20_000])[:WINDOW_TOKENS]
        with tapped(model) as seen, torch.inference_mode():
            model(input_ids=torch.tensor([ids]))
        layers = sorted(seen)
        shares = []
        for layer in layers[:-1]:
            said = guess.guess(layer, seen[layer][0])
            assert said is not None, layer
            _, ids_SK, weights_SK = seen[said.layer]
            right_SK = (ids_SK[:, :, None] == said.topk_ids_SK[:, None, :]).any(dim=2)
            largest_S1 = weights_SK.argmax(dim=1, keepdim=True)
            shares.append(float(right_SK.float().mean()))
            first.append(float(right_SK.gather(1, largest_S1).float().mean()))
        right += shares
        by_layer.append(shares)
    lowest = min(statistics.mean(layer) for layer in zip(*by_layer, strict=True))
    num_experts = guess.num_experts
    return [
        folder.name,
        f"{100 * statistics.mean(right):.1f}",
        f"{100 * statistics.mean(first):.1f}",
        f"{100 * lowest:.1f}",
        f"{100 * model.config.num_experts_per_tok / num_experts:.1f}",
    ]


@contextmanager
def tapped(model: Any) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """What the experts of each layer are given in a pass: hidden states, choice, weights."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def tap(layer: int) -> Any:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, ids, weights = [*args, *kwargs.values()][:3]
            seen[layer] = (hidden.reshape(-1, hidden.shape[-1]), ids.long(), weights)

        return keep

    handles = [
        module.register_forward_pre_hook(tap(layer), with_kwargs=True)
        for layer, (_, module) in experts_modules(model).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gain_row(gbit: float, batch: int, num_steps: int) -> list[str]:
    """Times of decode steps with and without prefetch, in turn, nothing cached."""
    engines = {mode: _engine(gbit, batch, mode) for mode in ("never", "always")}
    seconds: dict[str, list[float]] = {mode: [] for mode in engines}
    totals = {mode: StepCounters() for mode in engines}
    tokens: dict[str, list[tuple[str, int | None]]] = {mode: [] for mode in engines}
    for number in range(WARM_STEPS + num_steps):
        for mode, engine in engines.items():
            started = time.perf_counter()
            output = engine.step()
            took = time.perf_counter() - started
            tokens[mode] += [(event.request_id, event.token_id) for event in output.events]
            if number >= WARM_STEPS:
                seconds[mode].append(took)
                totals[mode] += output.counters
    for engine in engines.values():
        engine.close()
    assert tokens["never"] == tokens["always"], "prefetch changed a token; no numbers"
    ratios = [a / b for a, b in zip(seconds["never"], seconds["always"], strict=True)]
    cuts, ahead = statistics.quantiles(ratios, n=10), totals["always"]
    more = ahead.total_moved_bytes / totals["never"].total_moved_bytes - 1
    return [
        f"{gbit:g}",
        str(batch),
        f"{1e3 * statistics.median(seconds['never']):.1f}",
        f"{1e3 * statistics.median(seconds['always']):.1f}",
        f"{cuts[4]:.2f} ({cuts[1]:.2f}-{cuts[7]:.2f})",
        f"{100 * ahead.right_pairs / ahead.guessed_pairs:.0f}",
        f"{100 * ahead.ahead_used_bytes / ahead.ahead_bytes:.0f}",
        f"{100 * more:+.0f}",
    ]


def _engine(gbit: float, batch: int, mode: Any) -> Engine:
    store = bundled_store()
    source = BoundedSource(Segment(store), bytes_per_s=gbit * 1e9 / 8, call_s=CALL_S)
    config = WorkerConfig(cache_bytes=0, max_sequences=batch, max_context=256, prefetch=mode)
    engine = build_engine(store, source, None, config)
    assert engine.tokenizer is not None, "the bundled store has a tokenizer"
    ids = engine.tokenizer.encode(read_texts([])[0].text[:5_000])
    for number in range(batch):
        params = SamplingParams(max_tokens=128, temperature=0, ignore_eos=True)
        engine.add(Request(f"request {number}", ids[9 * number : 9 * number + 16], params))
    while engine.scheduler.num_running < batch:
        engine.step()
    return engine


def page(hits: list[list[str]], gains: list[list[str]]) -> str:
    return "\n".join(
        [
            "# Guessing the next layer's experts",
            "",
            provenance() + " Not run on a GPU.",
            "",
            "The next layer's router is applied to this layer's input. Original models, held-out "
            f"text, {WINDOW_TOKENS} tokens of each: percent of (token, expert) pairs that were "
            "guessed, of tokens whose first expert was among the guessed, of pairs in the worst "
            "layer, and what chance would give.",
            "",
            table(["model", "pairs", "first experts", "worst layer", "chance"], hits),
            "",
            "mixtral-mini's store (paper, 2 bits, Top-1), nothing cached, greedy, one core; a "
            f"source that takes {1e3 * CALL_S:g} ms a call and as long as the bytes need. Medians "
            "of decode steps, both engines in turn; the ratio's 20th and 80th percentile in "
            "brackets.",
            "",
            table(
                [
                    "Gbit/s",
                    "batch",
                    "never, ms",
                    "always, ms",
                    "times as fast",
                    "pairs right, %",
                    "bytes ahead that were used, %",
                    "more bytes, %",
                ],
                gains,
            ),
            "",
        ]
    )


if __name__ == "__main__":
    main()
