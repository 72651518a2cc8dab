"""From `moetier serve` to ready, to the first token, and what HTTP and Serve add to each token.

`python -m benchmarks.startup` starts the cluster for the bundled model some times, and asks it for
streams of one client at a time. After every start the same engine runs the same request in this
process: what HTTP, Serve and the actor add is the difference. Needs no other Ray on this machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import torch

from benchmarks.record import RESULTS, provenance, table
from cluster.stores import bundled_store
from expert_store.segment import Segment
from gpu_worker.build import build_engine
from gpu_worker.config import WorkerConfig
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as Request

REPORT = RESULTS / "startup-mixtral-mini.md"
PROMPT = "The return statement leaves the current function call with the expression list"
MAX_TOKENS = 64
STREAMS = 4


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the cluster, and the engine alone beside it; seconds."""

    ready_s: float
    first_request_s: float  # from ready to the first token of the first request
    later_s: float  # to the first token of a later request, median
    token_s: float  # from token to token over HTTP, median
    alone_first_s: float  # to the first token in this process, median
    alone_token_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=3)
    arguments = parser.parse_args()
    bundled_store()
    starts = [measure() for _ in range(arguments.starts)]
    text = page(starts)
    REPORT.write_text(text)
    print(text)


def measure() -> Start:
    """Start, ask, stop."""
    command = [str(Path(sys.executable).with_name("moetier")), "serve", "--port", "0"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            greeting = server.stdout.readline()
            ready_s = time.perf_counter() - started
            found = re.search(r"serving (\S+) at http://([^/]+)/v1", greeting)
            if found is None:
                raise RuntimeError(f"moetier serve did not start: {greeting!r}")
            model, address = found.groups()
            first, _ = stream(address, model)
            later = [stream(address, model) for _ in range(STREAMS)]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
    alone = [alone_in_process() for _ in range(2)][-1]
    gaps = [gap for _, gaps in later for gap in gaps]
    return Start(
        ready_s,
        first,
        statistics.median(first_s for first_s, _ in later),
        statistics.median(gaps),
        alone[0],
        statistics.median(alone[1]),
    )


def stream(address: str, model: str) -> tuple[float, list[float]]:
    """Seconds to the first piece of a streamed completion, and between the pieces after it."""
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
    }
    with closing(http.client.HTTPConnection(address, timeout=120)) as connection:
        started = time.perf_counter()
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read()[:500]!r}")
        times = []
        while line := answer.readline():
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return times[0] - started, gaps


def alone_in_process() -> tuple[float, list[float]]:
    """The same request through the engine, without Ray and HTTP, on as many threads as a worker."""
    torch.set_num_threads(1)
    store = bundled_store()
    with closing(Segment(store)) as segment:
        engine = build_engine(store, segment, None, WorkerConfig())
        with closing(engine):
            assert engine.tokenizer is not None
            firsts, gaps = [], []
            for number in range(STREAMS):
                params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
                ids = engine.tokenizer.encode(PROMPT)
                started = time.perf_counter()
                engine.add(Request(f"request {number}", ids, params))
                times = []
                while engine.has_work:
                    times += [time.perf_counter() for event in engine.step().events if event.text]
                firsts.append(times[0] - started)
                gaps += [b - a for a, b in zip(times, times[1:], strict=False)]
    return statistics.median(firsts), gaps


def page(starts: Sequence[Start]) -> str:
    """Medians over the starts, with the lowest and the highest."""

    def cell(values: Sequence[float], scale: float = 1e3) -> str:
        low, high = min(values) * scale, max(values) * scale
        return f"{statistics.median(values) * scale:.1f} ({low:.1f}-{high:.1f})"

    rows = [
        ["`moetier serve` to ready, s", cell([s.ready_s for s in starts], 1), "-"],
        ["ready to the first token of the first request, ms",
         cell([s.first_request_s for s in starts]), "-"],
        ["to the first token of a later request, ms", cell([s.later_s for s in starts]),
         cell([s.alone_first_s for s in starts])],
        ["token to token, one client, ms", cell([s.token_s for s in starts]),
         cell([s.alone_token_s for s in starts])],
    ]  # fmt: skip
    added = [1e3 * (s.token_s - s.alone_token_s) for s in starts]
    return "\n".join(
        [
            "# mixtral-mini: starting, and what HTTP and Serve add",
            "",
            provenance() + " Not run on a GPU.",
            "",
            f"{len(starts)} starts of a whole local cluster (head, store, worker, ingress) on "
            "these cores; medians, lowest and highest in brackets. The store is mapped, not read: "
            "its bytes come when an expert is first used.",
            "",
            table(["what", "over HTTP", "the engine alone, in one process"], rows),
            "",
            f"HTTP, Serve and the actor together add {statistics.median(added):.1f} ms a token.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
