"""The GPU node: one engine per contestant over the link; tells what a turn took and moved.

`python -m benchmarks.offload_parts.gpu_node` answers each line of JSON on its input with one. It
computes on one CPU core: there is no GPU in this.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.offload_parts.turn import Turn, Work
from benchmarks.offload_parts.wire_speed import pour
from cluster.eval_model import cache_bytes
from expert_store.format import load_manifest
from expert_store.listing import Listing
from expert_store.rpc import GrpcSource
from expert_store.segment import Segment
from expert_store.types import Manifest
from gpu_worker.build import build_engine, open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.protocols import ExpertSource, NearData
from gpu_worker.scoring import score_windows
from ndp_worker.group import Member, NearDataGroup
from ndp_worker.rpc import NdpClient

MAX_SEQUENCES = 8
DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Opened:
    """What a contestant runs with."""

    store: Path
    source: ExpertSource
    near_data: NearData | None
    config: WorkerConfig
    engine: Engine


class GpuNode:
    """Holds the engines that are open. `ask` is one line's question, by the name of its method."""

    def __init__(self) -> None:
        self._opened: dict[str, Opened] = {}
        self._stack = ExitStack()

    def ask(self, question: dict[str, Any]) -> Any:
        return getattr(self, question.pop("do"))(**question)

    def pour(self, host: str, port: int, num_bytes: int) -> float:
        return pour(host, port, num_bytes)

    def open(
        self, contestant: dict[str, Any], store: str, cache_store: str, endpoints: dict[str, str]
    ) -> dict[str, Any]:
        """An engine of a contestant: its expert records and its near data are over the link.

        Without endpoints its experts are read from this node's own files.
        """
        folder = Path(store)
        manifest = load_manifest(folder)
        reach = _source(manifest, endpoints["records"]) if endpoints else Segment(folder)
        source = self._stack.enter_context(closing(reach))
        near_data = None
        if contestant["near_data"] != "off":
            near_data = self._stack.enter_context(
                closing(_near_data(manifest, endpoints["near_data"]))
            )
        config = WorkerConfig(
            top_n=contestant["top_n"],
            near_data=contestant["near_data"],
            cache_bytes=cache_bytes(load_manifest(Path(cache_store)), contestant["cache_percent"]),
            max_sequences=MAX_SEQUENCES,
            **contestant["settings"],
        )
        engine = build_engine(folder, source, near_data, config)
        self._stack.callback(engine.close)
        self._opened[contestant["key"]] = Opened(folder, source, near_data, config, engine)
        return {"cache_bytes": config.cache_bytes}

    def near_data_error(self, key: str, windows: list[list[int]]) -> float:
        """Relative RMS between log-probabilities with near data, over the link, and without."""
        opened = self._opened[key]
        windows_BT = torch.tensor(windows)
        with closing(Segment(opened.store)) as segment:
            plain = replace(opened.config, near_data="off", cache_bytes=1 << 40)
            truth = _log_probs(opened.store, segment, None, plain, windows_BT)
        got = _log_probs(opened.store, opened.source, opened.near_data, opened.config, windows_BT)
        return float((got - truth).norm() / truth.norm())

    def nats(self, store: str, windows: list[list[int]]) -> list[float]:
        """Loss of each window by a store whose experts are all on this node."""
        with closing(Segment(Path(store))) as segment:
            model = open_model(Path(store), segment, None, WorkerConfig(cache_bytes=1 << 40))
            try:
                return list(score_windows(model.runner, torch.tensor(windows)).window_nats)
            finally:
                model.close()

    def greedy(self, key: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """The likeliest tokens of an open contestant, all prompts side by side."""
        return Turn(self._opened[key].engine).greedy(prompts, num_tokens)

    def greedy_resident(
        self, store: str, top_n: int | None, prompts: list[list[int]], num_tokens: int
    ) -> list[list[int]]:
        """The same of a store whose experts are all on this node, without any link."""
        with closing(Segment(Path(store))) as segment:
            config = WorkerConfig(top_n=top_n, max_sequences=MAX_SEQUENCES, cache_bytes=1 << 40)
            with closing(build_engine(Path(store), segment, None, config)) as engine:
                return Turn(engine).greedy(prompts, num_tokens)

    def turn(self, key: str, work: dict[str, Any]) -> dict[str, Any]:
        """One repetition of one contestant."""
        return Turn(self._opened[key].engine).run(Work(**work))

    def close_all(self) -> None:
        """Close every engine, for instance because the link changes."""
        self._opened.clear()
        self._stack.close()
        self._stack = ExitStack()


class _Kept:
    """Keeps the log-probabilities [T, V] of each window that is scored."""

    def __init__(self) -> None:
        self.windows: list[torch.Tensor] = []

    def see(self, window: int, log_probs_TV: torch.Tensor) -> None:
        self.windows.append(log_probs_TV)


def _log_probs(
    store: Path,
    source: ExpertSource,
    near_data: NearData | None,
    config: WorkerConfig,
    windows_BT: torch.Tensor,
) -> torch.Tensor:
    """Of all positions of the windows, one after the other."""
    model = open_model(store, source, near_data, config)
    try:
        kept = _Kept()
        score_windows(model.runner, windows_BT, observers=[kept])
        return torch.cat(kept.windows)
    finally:
        model.close()


def _source(manifest: Manifest, address: str) -> GrpcSource:
    listing = Listing("memory node", "records", manifest.version, "memory", (address,))
    return GrpcSource(manifest, lambda: [listing], deadline_s=DEADLINE_S)


def _near_data(manifest: Manifest, address: str) -> NearDataGroup:
    client = NdpClient((address,), version=manifest.version, deadline_s=DEADLINE_S)
    return NearDataGroup([Member(client)])


def main() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    node = GpuNode()
    try:
        for line in sys.stdin:
            print(json.dumps(node.ask(json.loads(line))), flush=True)
    finally:
        node.close_all()


if __name__ == "__main__":
    main()
