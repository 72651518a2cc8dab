"""`moetier generate`: continues a prompt in this process, text as it comes, without Ray."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass

from transformers.utils.logging import disable_progress_bar

from cluster.progress import store_progress
from cluster.stores import bundled_store, folder
from expert_store.segment import Segment
from gpu_worker.build import build_engine
from gpu_worker.config import MEBIBYTE, WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.engine import Engine, TokenEvent
from gpu_worker.messages import GenerateRequest
from gpu_worker.prompt import encode_prompt
from gpu_worker.sequence import SamplingParams, Sequence

HELP = """Continue a prompt in this process: no cluster, no Ray, experts read from STORE as needed.

Without STORE, the bundled model's (made on first use). The text goes to stdout as it comes, a line
of figures to stderr. Exit code 1 when an expert cannot be read, 2 for a wrong argument."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder of a store")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="tokens at most (default: 64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="1 is off (default: 0.95)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default: 0)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    parser.add_argument(
        "--top-n",
        type=int,
        metavar="N",
        help="experts per token that get their compensator (default: what the store says)",
    )
    parser.add_argument(
        "--cache-mb",
        type=float,
        default=512,
        metavar="MB",
        help="MiB of device memory for experts (default: 512)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Generate and print. Raises ValueError and StoreError, which the CLI turns into exit codes."""
    disable_progress_bar()
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    if not args.prompt:
        raise ValueError("--prompt: got an empty text, expected something to continue")
    for option, text in (("--prompt", args.prompt), *(("--stop", stop) for stop in args.stop)):
        check_unicode(option, text)
    if not 0 <= args.cache_mb < float("inf"):
        raise ValueError(f"--cache-mb: got {args.cache_mb}, expected 0 or more")
    config = WorkerConfig(
        top_n=args.top_n, cache_bytes=int(args.cache_mb * MEBIBYTE), max_sequences=1
    )
    with store_progress() as report:
        store = bundled_store(report) if args.store is None else folder(args.store)
    source = Segment(store)
    try:
        engine = build_engine(store, source, None, config)
        try:
            answer = _generate(engine, args.prompt, params, stream=not args.json)
        finally:
            engine.close()
    finally:
        source.close()
    _report(answer, as_json=args.json)
    if answer.last.error is not None:
        print(f"moetier: error: {answer.last.error}", file=sys.stderr)
        return 1
    return 0


def check_unicode(option: str, text: str) -> None:
    """Python lets an argument's bytes that are no UTF-8 through as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{option}: is not UTF-8 text (character {error.start}); convert it first"
        ) from error


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    num_prompt_tokens: int
    last: TokenEvent
    counters: StepCounters
    seconds: float


def _generate(engine: Engine, prompt: str, params: SamplingParams, *, stream: bool) -> _Answer:
    prompt_ids = encode_prompt(engine.tokenizer, GenerateRequest("generate", params, prompt))
    sequence = Sequence("generate", prompt_ids, params)
    engine.add(sequence)
    start_s = time.perf_counter()
    pieces: list[str] = []
    counters = StepCounters()
    last: TokenEvent | None = None
    while engine.has_work:
        output = engine.step()
        counters += output.counters
        for last in output.events:
            pieces.append(last.text)
            if stream:
                print(last.text, end="", flush=True)
    if stream:
        print()
    assert last is not None, "a request ends with an event"
    seconds = time.perf_counter() - start_s
    return _Answer("".join(pieces), len(sequence.prompt_ids), last, counters, seconds)


def _report(answer: _Answer, *, as_json: bool) -> None:
    last, counters = answer.last, answer.counters
    num_tokens = last.num_output_tokens
    if as_json:
        report = {
            "text": answer.text,
            "finish_reason": last.finish_reason,
            "error": None if last.error is None else str(last.error),
            "prompt_tokens": answer.num_prompt_tokens,
            "output_tokens": num_tokens,
            "degraded": last.degraded,
            "quality": last.quality,
            "seconds": round(answer.seconds, 3),
            "moved_bytes": counters.total_moved_bytes,
            "counters": counters.as_dict(),
        }
        print(json.dumps(report, indent=2))
        return
    degraded = f", {counters.degraded_pairs} pairs degraded" if last.degraded else ""
    governed = f", down to {last.quality}" if last.quality is not None else ""
    print(
        f"[{num_tokens} tokens in {answer.seconds:.2f} s, end: {last.finish_reason}; "
        f"{counters.total_moved_bytes / 1e6:.1f} MB of experts moved to the device"
        f"{degraded}{governed}]",
        file=sys.stderr,
    )
