"""Goal: a step asks near data at most once per MoE layer and worker, whatever it has for it; a
layer's experts are fetched in one request, and nobody is asked for what is resident.

Method: the engine over a real store, with a source and a near-data worker that count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.segment import Segment
from expert_store.types import ExpertOutputs, ExpertTokens
from gpu_worker.build import build_engine
from gpu_worker.config import WorkerConfig
from gpu_worker.sequence import SamplingParams
from gpu_worker.sequence import Sequence as Request
from tests.gpu_worker.sources import CountingSource, InProcessNearData
from tests.tiny_checkpoints import write_tiny_checkpoint

LAYERS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trips")
    model = write_tiny_checkpoint("mixtral", folder / "model", layers=LAYERS, experts=8)
    compress(model, folder / "store", CompressionConfig(recipe="paper", avg_rank=16), jobs=1)
    return folder / "store"


class CountingNearData(InProcessNearData):
    """Keeps the layer of every call."""

    def __init__(self, source: CountingSource) -> None:
        super().__init__(source)
        self.layers: Counter[int] = Counter()

    def submit(
        self, hidden_TH: torch.Tensor, work: Sequence[ExpertTokens]
    ) -> Future[ExpertOutputs]:
        self.layers.update({part.key.layer for part in work})
        return super().submit(hidden_TH, work)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("near_data", ["off", "low_bit"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_layer_is_one_request_and_what_is_resident_none(
    store: Path, cache_bytes: int, near_data: str, batch: int
) -> None:
    source = CountingSource(Segment(store))
    near = CountingNearData(CountingSource(Segment(store)))
    config = WorkerConfig(
        device="cpu",
        dtype="float32",
        cache_bytes=cache_bytes,
        near_data=near_data,  # type: ignore[arg-type]
        prefetch="never",
        max_sequences=batch,
    )
    engine = build_engine(store, source, near, config)
    for number in range(batch):
        params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        engine.add(Request(f"{number}", (5 + number, 9, 40 + number), params))
    for _ in range(batch + 20):  # prompts, and then enough steps to have met the experts
        engine.step()
    for _ in range(10):
        source.calls.clear()
        near.layers.clear()
        counters = engine.step().counters
        fetched = Counter(call[0].key.layer for call in source.calls)
        assert all(len({request.key.layer for request in call}) == 1 for call in source.calls)
        assert max(fetched.values(), default=0) <= 1
        assert sum(fetched.values()) == 0 or sum(counters.cache_misses.values()) > 0
        if near_data == "low_bit":
            assert set(near.layers.values()) == {1}
            assert len(near.layers) == LAYERS
        else:
            assert not near.layers
            assert cache_bytes == 0 or not source.calls
    engine.close()
