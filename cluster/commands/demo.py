"""`moetier demo`: the whole path once, on one of our models: compress, serve, ask, measure, end."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
from transformers.utils.logging import disable_progress_bar

from cluster.app import RunningCluster, start_local_cluster
from cluster.config import ClusterConfig
from cluster.door import check_port
from cluster.eval_rows import EvalRow
from cluster.eval_settings import EvalSettings
from cluster.eval_tables import as_cells, conditions
from cluster.evaluate import DEMO_SETTINGS, demo_rows
from cluster.models import ensure_smol, has_smol
from cluster.progress import store_progress
from cluster.settings import HttpSettings
from cluster.stores import BUNDLED, bundled_store, compressed_store, original_store
from cluster.table import format_table
from cluster.texts import BUILT_IN_NOTE
from expert_store.config import CompressionConfig
from expert_store.inspect import summarize
from models import MIXTRAL_MINI

HELP = """The whole path once, on this machine, with one of our models.

The model is smol-moe when `make smol` was run, else the bundled mixtral-mini; --model smol fetches
smol-moe first. Makes the model's store if there is none yet, starts a local Ray cluster (expert
store, NDP worker, GPU worker, on the CPU when there is no GPU, and the HTTP endpoint), asks it for
a streamed answer with the openai client, prints a small table of perplexity against expert bytes
moved per token, and shuts all of it down, also on Ctrl-C. `moetier serve` keeps a cluster up."""

COLUMNS = ("experts", "perplexity", "more nats", "expert KB/token", "near-data KB/token")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        choices=("mini", "smol"),
        help="smol: smol-moe, fetched (93 MB) and assembled if need be; mini: the bundled "
        "mixtral-mini (default: smol if it is there)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue, or for smol-moe a question (default: one that the model can do)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=48, metavar="N", help="tokens to ask for (default: 48)"
    )
    parser.add_argument(
        "--port", type=int, default=0, metavar="PORT", help="of the endpoint (default: a free one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is shown, and how."""

    model: Path
    prompt: str
    chats: bool  # whether it was trained on conversations, so that it is asked and not continued
    config: CompressionConfig
    settings: EvalSettings


@dataclass(frozen=True, slots=True)
class Stage:
    """Seconds that one part of the demo took."""

    name: str
    seconds: float


class Teller:
    """Tells what happens and how long it took: on stdout, or on stderr when stdout is for JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self.out = sys.stderr if as_json else sys.stdout
        self.stages: list[Stage] = []
        self._start_s = self._stage_s = time.perf_counter()

    def say(self, text: str = "", *, end: str = "\n") -> None:
        print(text, end=end, file=self.out, flush=True)

    def done(self, name: str) -> None:
        now_s = time.perf_counter()
        self.stages.append(Stage(name, now_s - self._stage_s))
        self._stage_s = now_s

    def total_s(self) -> float:
        return time.perf_counter() - self._start_s


def run(args: argparse.Namespace) -> int:
    """Do it all. Raises ValueError and StoreError, which the CLI turns into exit codes."""
    disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell that starts a command in the background lets it ignore Ctrl-C's signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Compressing takes long: a port that cannot be had is told before.
    http = replace(ClusterConfig().http, port=args.port)
    if http.port:
        check_port(http)
    teller = Teller(as_json=args.json)
    try:
        subject = choose(args.model, teller)
        store, original = prepare(subject, teller)
        teller.say("2. starting a local Ray cluster: store, NDP worker, GPU worker, HTTP ...")
        with start_local_cluster(config_for(store, http)) as cluster:
            teller.done("start the cluster")
            teller.say(f"   {cluster.address} is healthy after {teller.stages[-1].seconds:.0f} s\n")
            prompt = args.prompt or subject.prompt
            text = ask(cluster, subject, prompt, args.max_tokens, teller)
            rows = measure(subject, store, original, teller)
            say_where(cluster, prompt, teller)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is left running", file=sys.stderr)
        return 130
    teller.done("shut down")
    teller.say(f"all that was started is shut down; {teller.total_s():.0f} s in all")
    if args.json:
        print(json.dumps(report(cluster, text, rows, teller), indent=2))
    return 0


def choose(name: str | None, teller: Teller) -> Subject:
    """The model to show: smol-moe when it is there or asked for, else mixtral-mini."""
    if name == "mini" or (name is None and not has_smol()):
        return Subject(MIXTRAL_MINI, "The return statement", False, BUNDLED, DEMO_SETTINGS)
    folder = ensure_smol(teller.say)
    # Sixteen times the model, with real weights: fewer windows tell the variants apart as well.
    settings = replace(DEMO_SETTINGS, windows=8, decode_tokens=24)
    # At 2 bits these weights babble, at 3 they stammer; at 4 they answer in English.
    config = CompressionConfig(recipe="paper", bits=4)
    return Subject(folder, "What is the capital of France?", True, config, settings)


def prepare(subject: Subject, teller: Teller) -> tuple[Path, Path]:
    """The model's store, and one of its original experts for the comparison."""
    teller.say(
        f"1. the model, {subject.model.name}, as a store of {subject.config.resolve().bits}-bit "
        "experts and compensators ..."
    )
    with store_progress() as show:
        is_mini = subject.model == MIXTRAL_MINI
        store = (
            bundled_store(show)
            if is_mini
            else compressed_store(subject.model, subject.config, show)
        )
        original = original_store(subject.model, show)
    teller.done("compress")
    summary = summarize(store)
    teller.say(
        f"   {store}\n"
        f"   {len(summary.manifest.experts)} experts: codes {summary.codes_bytes / 1e6:.1f} MB, "
        f"compensators {summary.factors_bytes / 1e6:.1f} MB, bf16 they were "
        f"{summary.original_expert_bytes / 1e6:.1f} MB ({teller.stages[-1].seconds:.0f} s)\n"
    )
    return store, original


def config_for(store: Path, http: HttpSettings) -> ClusterConfig:
    """One store actor, one NDP worker, one GPU worker."""
    config = ClusterConfig()
    return replace(
        config,
        store=replace(config.store, path=str(store)),
        ndp=replace(config.ndp, enabled=True, num_threads=1),
        http=http,
    )


def ask(
    cluster: RunningCluster, subject: Subject, prompt: str, max_tokens: int, teller: Teller
) -> str:
    """A streamed completion or answer over HTTP, shown as it comes."""
    teller.say(f"3. asking it over HTTP with the openai client: {prompt!r}\n")
    client = openai.OpenAI(base_url=f"{cluster.address}/v1", api_key="none", max_retries=0)
    start_s = time.perf_counter()
    first_s, pieces = 0.0, [] if subject.chats else [prompt]
    teller.say("   " + "".join(pieces), end="")
    for piece in stream(client, cluster.model, subject, prompt, max_tokens):
        first_s = first_s or time.perf_counter() - start_s
        pieces.append(piece)
        teller.say(piece.replace("\n", "\n   "), end="")
    teller.done("answer")
    teller.say(
        f"\n\n   first text after {first_s:.2f} s, done after {teller.stages[-1].seconds:.2f} s"
    )
    return "".join(pieces)


def stream(
    client: openai.OpenAI, model: str, subject: Subject, prompt: str, max_tokens: int
) -> Iterator[str]:
    """The text as it comes, of the endpoint that suits the model."""
    if subject.chats:
        messages: Any = [{"role": "user", "content": prompt}]
        for event in client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
        ):
            yield from (choice.delta.content or "" for choice in event.choices)
        return
    for chunk in client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0.7, seed=1, stream=True
    ):
        yield from (choice.text for choice in chunk.choices)


def measure(subject: Subject, store: Path, original: Path, teller: Teller) -> list[EvalRow]:
    """The table of the README."""
    teller.say("\n4. perplexity against expert bytes moved per token (in this process) ...")
    rows = list(demo_rows(store, original, subject.settings))
    teller.done("measure")
    teller.say(format_table([as_cells(row) for row in rows], COLUMNS))
    teller.say(f"\n{conditions(subject.settings)}\n{BUILT_IN_NOTE}\n")
    return rows


def say_where(cluster: RunningCluster, prompt: str, teller: Teller) -> None:
    """The address, and how to get it again."""
    body = json.dumps({"model": cluster.model, "prompt": prompt, "max_tokens": 32})
    teller.say(
        f"5. the endpoint was {cluster.address}/v1. To keep one up: make serve, and then\n"
        f"   curl http://127.0.0.1:{ClusterConfig().http.port}/v1/completions "
        f"-H 'content-type: application/json' -d '{body}'\n"
    )


def report(
    cluster: RunningCluster, text: str, rows: list[EvalRow], teller: Teller
) -> dict[str, object]:
    """What the demo showed, as one object."""
    return {
        "endpoint": cluster.address,
        "model": cluster.model,
        "text": text,
        "seconds": {stage.name: round(stage.seconds, 2) for stage in teller.stages},
        "rows": [as_cells(row) for row in rows],
    }
