"""One layer's random inputs, and experts that run them: shared by the tests of running experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu_worker.config import WorkerConfig
from gpu_worker.experts import StoreExperts

NUM_EXPERTS, TOP_K, HIDDEN = 6, 3, 64


class Step:
    """Random inputs of one layer."""

    def __init__(self, num_rows: int = 7, seed: int = 0, layer: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layer = layer
        self.hidden = torch.randn(num_rows, HIDDEN, generator=generator)
        scores = torch.rand(num_rows, NUM_EXPERTS, generator=generator)
        # sorted=False as some routers do: shuffle the columns.
        self.ids = scores.argsort(dim=1)[:, :TOP_K]
        self.weights = torch.rand(num_rows, TOP_K, generator=generator)

    def rows(self, rows: list[int]) -> Step:
        part = Step.__new__(Step)
        part.layer = self.layer
        part.hidden, part.ids = self.hidden[rows], self.ids[rows]
        part.weights = self.weights[rows]
        return part

    def run(self, experts: StoreExperts) -> torch.Tensor:
        return experts.run_layer(self.layer, self.hidden, self.ids, self.weights)


@contextmanager
def running(source: Any, near: Any = None, **config: Any) -> Iterator[StoreExperts]:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "top_n": 1, **config}
    resolved = WorkerConfig(**settings).resolve(source.manifest)
    experts = StoreExperts(source, resolved, near)
    experts.begin(None)
    try:
        yield experts
        experts.check_integrity()
    finally:
        experts.close()
