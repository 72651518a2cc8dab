"""Goal: a replay of recorded routings counts exactly what the real decode counts, for every policy,
cache and batch, and computes nothing.

Method: a tiny compressed Mixtral decodes for real with a recorder in between; its counters against
the replay's, hits, misses and pairs included. Then the shortcut without steps against the replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.segment import Segment
from gpu_worker.build import OpenModel, open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.replay import (
    RoutingTrace,
    recorded,
    replay_decode,
    uncached_bytes,
    weights_per_token,
)
from gpu_worker.scoring import score_decode, score_windows
from tests.gpu_worker.sources import CountingSource, InProcessNearData
from tests.tiny_checkpoints import write_tiny_checkpoint

# No fetch thread: the order in which records land, and so who is evicted first, is then fixed.
CONFIG = WorkerConfig(device="cpu", dtype="float32", fetch_threads=0, max_sequences=3)
POLICIES: dict[str, dict[str, Any]] = {
    "static": {"top_n": 0},
    "top 1": {"top_n": 1},
    "all": {"restore": "all"},
    "random": {"restore": "random", "top_n": 1, "restore_seed": 5},
    "mass": {"restore": "mass", "restore_mass": 0.55},
    "benefit": {"restore": "benefit", "restore_benefit": 0.05},
    "skip": {"top_n": 1, "skip_below": 0.48},
}
STEPS, SEQUENCES = 14, 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    model = write_tiny_checkpoint("mixtral", folder / "model", hidden=128, ffn=128)
    compress(model, folder / "store", CompressionConfig(recipe="paper", avg_rank=16), jobs=1)
    return folder / "store"


@pytest.fixture
def source(store: Path) -> Iterator[CountingSource]:
    made = CountingSource(Segment(store))
    yield made
    made.close()


def windows(num_windows: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 120, (num_windows, num_tokens + 1), generator=generator)


def opened(store: Path, source: Any, near: Any = None, **config: Any) -> OpenModel:
    return open_model(store, source, near, replace(CONFIG, **config))


def decoded(model: OpenModel, windows_BT: torch.Tensor) -> tuple[StepCounters, RoutingTrace]:
    """Really decode, and say where the tokens went."""
    with recorded(model.runner) as recorder:
        counters = score_decode(model.runner, windows_BT).counters
    by_step = recorder.trace(windows_BT.shape[0])  # passes of one token of each sequence
    layers = {
        layer: replace(
            seen,
            topk_ids_WTK=seen.topk_ids_WTK.transpose(0, 1),
            topk_weights_WTK=seen.topk_weights_WTK.transpose(0, 1),
        )
        for layer, seen in by_step.layers.items()
    }
    tags_WT = by_step.token_tags_WT.transpose(0, 1)
    return counters, replace(by_step, layers=layers, token_tags_WT=tags_WT)


def counts(counters: StepCounters) -> dict[str, Any]:
    return {
        name: value for name, value in counters.as_dict().items() if not name.endswith("wait_s")
    }


@pytest.mark.parametrize("cache_share", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_counts_what_the_real_decode_counts(
    store: Path, source: CountingSource, policy: str, cache_share: float
) -> None:
    codes = sum(info.codes.num_bytes for info in source.manifest.experts.values())
    config = {**POLICIES[policy], "cache_bytes": int(codes * cache_share)}
    model = opened(store, source, **config)
    expected, trace = decoded(model, windows(SEQUENCES, STEPS))
    model.close()
    source.bytes.clear()
    found, num_tokens = replay_decode(trace, source, model.config, batch=SEQUENCES, num_steps=STEPS)
    assert counts(found) == counts(expected)
    assert num_tokens == SEQUENCES * STEPS
    assert found.total_moved_bytes == source.bytes.total() > 0
    if policy == "skip":
        assert found.skipped_pairs > 0
    if cache_share > 1:
        assert found.cache_hits["codes"] > 0


def test_near_data_is_called_with_as_many_bytes(store: Path, source: CountingSource) -> None:
    near = InProcessNearData(Segment(store))
    model = opened(store, source, near, near_data="low_bit", cache_bytes=0)
    expected, trace = decoded(model, windows(SEQUENCES, STEPS))
    model.close()
    found, _ = replay_decode(trace, source, model.config, near, batch=SEQUENCES, num_steps=STEPS)
    assert counts(found) == counts(expected)
    assert found.sent_bytes > 0 < found.near_data_pairs


@pytest.fixture
def scored(store: Path, source: CountingSource) -> tuple[OpenModel, RoutingTrace]:
    """Six windows in two passes, as an evaluation scores them."""
    model = opened(store, source)
    with recorded(model.runner) as recorder:
        score_windows(model.runner, windows(6, 20), batch=4)
    model.close()
    return model, recorder.trace(20)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_cache_a_lone_sequence_moves_what_the_shortcut_says(
    scored: tuple[OpenModel, RoutingTrace], source: CountingSource, policy: str
) -> None:
    _, trace = scored
    config = replace(CONFIG, cache_bytes=0, **POLICIES[policy]).resolve(source.manifest)
    found, num_tokens = replay_decode(trace, source, config, batch=1, num_steps=20, num_groups=6)
    sizes = RecordSizes.of(source.manifest)
    per_token = uncached_bytes(trace, config.pair_policy(source.manifest), sizes)
    assert per_token == pytest.approx(found.total_moved_bytes / num_tokens)
    assert num_tokens == 6 * 20


def test_a_trace_of_windows_routes_as_decoding_them_does(
    store: Path, scored: tuple[OpenModel, RoutingTrace], source: CountingSource
) -> None:
    """Windows in one pass and token by token differ by rounding alone: nearly all pairs agree."""
    model = opened(store, source)
    _, by_token = decoded(model, windows(6, 20))
    model.close()
    _, by_window = scored
    assert torch.equal(by_window.token_tags_WT, by_token.token_tags_WT)
    for layer, seen in by_window.layers.items():
        same = seen.topk_ids_WTK == by_token.layers[layer].topk_ids_WTK
        assert same.double().mean() > 0.98


def test_more_cache_moves_less_and_a_batch_shares_what_it_moves(
    scored: tuple[OpenModel, RoutingTrace], source: CountingSource
) -> None:
    _, trace = scored
    codes = sum(info.codes.num_bytes for info in source.manifest.experts.values())

    def moved(share: float, batch: int) -> float:
        config = replace(CONFIG, cache_bytes=int(codes * share)).resolve(source.manifest)
        found, num_tokens = replay_decode(
            trace, source, config, batch=batch, num_groups=6 // batch, num_steps=20
        )
        return found.total_moved_bytes / num_tokens

    for batch in (1, 3, 6):
        by_cache = [moved(share, batch) for share in (0.0, 0.25, 0.5, 1.5)]
        assert by_cache == sorted(by_cache, reverse=True)
        assert by_cache[0] > by_cache[-1]
    by_batch = [moved(0.0, batch) for batch in (1, 3, 6)]
    assert by_batch == sorted(by_batch, reverse=True)
    assert by_batch[0] > by_batch[-1]
    assert moved(0.25, 3) == moved(0.25, 3), "deterministic"


def test_warm_up_is_not_counted_and_only_once(
    scored: tuple[OpenModel, RoutingTrace], source: CountingSource
) -> None:
    _, trace = scored
    config = replace(CONFIG, cache_bytes=1 << 30).resolve(source.manifest)
    whole, tokens = replay_decode(trace, source, config, batch=2, num_groups=3, num_steps=20)
    part, fewer = replay_decode(
        trace, source, config, batch=2, num_groups=3, num_steps=20, warm_up=15
    )
    assert (tokens, fewer) == (120, 90)
    assert part.total_moved_bytes < whole.total_moved_bytes


def test_experts_are_bound_again_and_recording_changes_no_bit(
    store: Path, source: CountingSource
) -> None:
    model = opened(store, source)
    inner = model.runner.experts
    plain = score_windows(model.runner, windows(2, 9)).window_nats
    with recorded(model.runner):
        assert score_windows(model.runner, windows(2, 9)).window_nats == plain
        assert model.runner.experts is not inner
    assert model.runner.experts is inner
    assert score_windows(model.runner, windows(2, 9)).window_nats == plain
    model.close()


def test_bits_are_held_against_the_weights_a_token_uses(source: CountingSource) -> None:
    manifest = source.manifest
    assert weights_per_token(manifest) == len(manifest.model.moe_layers) * 2 * 3 * 128 * 128


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 7, "num_steps": 20}, "got 1 times 7 sequences of 20 tokens, but there are 6"),
        ({"batch": 3, "num_groups": 3, "num_steps": 20}, "3 times 3 sequences"),
        ({"batch": 1, "num_steps": 21}, "windows of 20 tokens"),
        ({"batch": 1, "num_steps": 5, "warm_up": 5}, "warm_up: got 5, expected 0 to 4"),
    ],
)
def test_a_trace_that_is_too_small_is_refused(
    scored: tuple[OpenModel, RoutingTrace],
    source: CountingSource,
    sizes: dict[str, int],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        replay_decode(scored[1], source, CONFIG.resolve(source.manifest), **sizes)  # type: ignore[arg-type]
