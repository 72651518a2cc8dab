"""`moetier tune`: finds autoscaling settings for a trace, in a simulated cluster."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import yaml
from transformers.utils.logging import disable_progress_bar

from cluster.autoscaling_rules import ServiceTimes, Worker
from cluster.config import ClusterConfig, load_config
from cluster.progress import store_progress
from cluster.stores import bundled_store, folder
from cluster.strict import build, parse_yaml
from cluster.tune.contest import Promise
from cluster.tune.fit import Fit, fit
from cluster.tune.generate import KINDS, Made, generate
from cluster.tune.measure import measure
from cluster.tune.page import as_json, as_text
from cluster.tune.simulate import Site
from cluster.tune.trace import Trace
from cluster.tune.trace_files import read_trace
from cluster.tune.tuning import Tuning, tune
from expert_store.segment import Segment
from gpu_worker.build import build_engine
from gpu_worker.config import WorkerConfig

HELP = f"""Find autoscaling settings that keep a promise to requests at the least replica-hours.

A discrete-event simulation of the cluster runs a trace under the policy's own code, with Serve's
own code around it, and searches its settings; beside it Serve's default policy, tuned as well.
TRACE is a file or folder recorded by our server (http.record_requests), Mooncake's JSONL or Azure's
LLM inference CSV; its first half is tuned on, the second half judges. Without TRACE requests are
made up: --kind {", ".join(KINDS)}.
What a step costs is fitted to real steps of an engine of this machine, or read with --service.
Prints settings to paste into a cluster config. A prediction, not a measurement:
benchmarks/results/tune.md says how far off it was where it could be checked."""

MADE_UP = 4
"""Traces made up to tune on, and as many that judge: what suits one or two burst is luck."""
HELD_OUT_SEED = 1000
"""Added to the seeds of made-up traces that judge."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    made, promise, site = Made("poisson"), Promise(), Site(ServiceTimes(1, 0, 0, 1, 1))
    parser.add_argument("--trace", type=Path, metavar="TRACE", help="a file, or a recorded folder")
    parser.add_argument("--rate-times", type=float, default=1.0, metavar="X", help="the trace's "
                        "requests come so many times as fast (default: 1)")  # fmt: skip
    group = parser.add_argument_group("requests that are made up")
    group.add_argument("--kind", choices=list(KINDS), default="diurnal", help="(default: diurnal)")
    _number(group, "--seconds", made.seconds, "of a trace")
    _number(group, "--rate-per-s", made.rate_per_s, "mean requests a second")
    _number(group, "--prompt-tokens", made.prompt_tokens, "mean tokens of a prompt")
    _number(group, "--answer-tokens", made.answer_tokens, "mean tokens of an answer")
    group = parser.add_argument_group("what is promised")
    _number(group, "--ttft-s", promise.ttft_s, "seconds until the first token")
    _number(group, "--per-token-s", promise.per_token_s, "mean seconds for each further token")
    _number(
        group,
        "--limit",
        promise.limit,
        "share of requests that may miss either, on any trace that is tuned on",
    )
    _number(group, "--settle-s", promise.settle_s, "first seconds of a trace that do not count")
    group = parser.add_argument_group("the cluster")
    group.add_argument("--config", type=Path, metavar="FILE", help="a cluster config, for the "
                       "worker's slots and chunks, queue lengths and bounds")  # fmt: skip
    _number(group, "--start-s", site.start_s, "seconds until an ordered worker serves")
    group.add_argument("--min-replicas", type=int, metavar="N", help="instead of the config's")
    group.add_argument("--max-replicas", type=int, metavar="N", help="likewise")
    group.add_argument("--service", type=Path, metavar="FILE", help="fitted times of steps, as "
                       "--fit writes them; else they are measured now")  # fmt: skip
    group.add_argument("--store", metavar="STORE", help="whose steps are measured (default: the "
                       "bundled mixtral-mini)")  # fmt: skip
    group.add_argument("--fit", type=Path, metavar="FILE", help="measure, write FILE and stop")
    group = parser.add_argument_group("search and output")
    _number(group, "--runs", 40, "settings that are tried of each policy")
    _number(group, "--seed", 0, "of what is drawn")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="write a page with plots there")
    group.add_argument("--json", action="store_true", help="print one JSON object")


def _number(group: argparse._ArgumentGroup, option: str, default: float, text: str) -> None:
    group.add_argument(
        option,
        type=type(default),
        default=default,
        metavar="N",
        help=f"{text} (default: {default})",
    )


def run(args: argparse.Namespace) -> int:
    """Tune and print; 0 also where the promise cannot be kept, which is said.

    Raises ValueError for what makes no sense, naming option or file and line.
    """
    if args.out is not None and find_spec("matplotlib") is None:
        raise ValueError("--out: needs matplotlib; run pip install 'moetier[report]'")
    if args.runs < 2:
        raise ValueError(f"--runs: got {args.runs}, expected 2 or more")
    disable_progress_bar()
    config = ClusterConfig() if args.config is None else load_config(args.config)
    promise = Promise(args.ttft_s, args.per_token_s, args.limit, args.settle_s)
    traces, held_out = _traces(args)
    fitted = _fitted(args, config.worker)
    if args.fit is not None:
        args.fit.write_text(yaml.safe_dump(asdict(fitted), sort_keys=False), encoding="utf-8")
        print(f"{args.fit}: {fitted}")
        return 0
    site = _site(args, config, fitted.service(1, 1))
    tuning = tune(
        traces, held_out, site, promise, runs=args.runs, seed=args.seed, progress=_progress
    )
    print(json.dumps(as_json(tuning), indent=2) if args.json else as_text(tuning))
    if args.out is not None:
        _write(tuning, args.out)
    return 0


def _write(tuning: Tuning, out: Path) -> None:
    # The one part that needs matplotlib, which is optional and large.
    from cluster.tune.figures import write

    for page in write(tuning, out):
        print(page, file=sys.stderr)


def _traces(args: argparse.Namespace) -> tuple[list[Trace], list[Trace]]:
    """Those to tune on and those that judge."""
    if args.trace is not None:
        whole = read_trace(args.trace).scaled(rate=args.rate_times)
        tuned_on, judging = whole.halves()
        return [tuned_on], [judging]
    made = Made(
        args.kind, args.seconds, args.rate_per_s, args.prompt_tokens, args.answer_tokens, args.seed
    )
    seeds = range(args.seed, args.seed + MADE_UP)
    return (
        [generate(replace(made, seed=seed)) for seed in seeds],
        [generate(replace(made, seed=seed + HELD_OUT_SEED)) for seed in seeds],
    )


def _fitted(args: argparse.Namespace, worker: WorkerConfig) -> Fit:
    if args.service is not None:
        text = args.service.read_text(encoding="utf-8")
        return build(Fit, parse_yaml(text, str(args.service)), file=str(args.service))
    with store_progress() as report:
        store = bundled_store(report) if args.store is None else folder(args.store)
    print(f"measuring steps of {store}", file=sys.stderr)
    with closing(Segment(store)) as source:
        near_data_off = replace(worker, near_data="off")
        with closing(build_engine(store, source, None, near_data_off)) as engine:
            steps = measure(engine, slots=worker.max_sequences, prefill_chunk=worker.prefill_chunk)
    fitted = fit(steps)
    print(
        f"fitted to {fitted.num_steps} steps, off by {fitted.error:.0%} (median): "
        f"{fitted.step_s:.3g} s a step, {fitted.sequence_s:.3g} s a sequence, "
        f"{fitted.prompt_token_s:.3g} s a prompt token",
        file=sys.stderr,
    )
    return fitted


def _site(args: argparse.Namespace, config: ClusterConfig, service: ServiceTimes) -> Site:
    scaling = config.replicas.autoscaling
    least, most = (1, 8) if scaling is None else (scaling.min_replicas, scaling.max_replicas)
    return Site(
        service,
        Worker(config.worker.max_sequences, config.worker.prefill_chunk),
        start_s=args.start_s,
        min_replicas=least if args.min_replicas is None else args.min_replicas,
        max_replicas=most if args.max_replicas is None else args.max_replicas,
        max_waiting=config.replicas.max_waiting,
        max_queued=config.http.max_queued,
    )


def _progress(name: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{name}: {done} of {total} settings", end=end, file=sys.stderr, flush=True)
