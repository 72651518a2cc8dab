"""Goal: a trace says where the tokens of a real run went, and what its replay counts is what the
worker's cache really did.

Method: a tiny compressed Mixtral decodes and serves requests with a recorder in between; turns by
hand for what a step needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.build import OpenModel, open_model
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.eviction import CachePolicy, eviction_policy
from gpu_worker.expert_cache import CacheBudgets
from gpu_worker.experts import ExpertsFailed
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.restoring import PairPolicy, route
from gpu_worker.routing import expert_scores
from gpu_worker.scoring import score_decode, score_windows
from gpu_worker.trace import LayerRows, StepTrace, TracedModel, side_by_side, traced
from gpu_worker.trace_turns import check_same_model, replay_turns, turns_of
from tests.gpu_worker.sources import LossySource
from tests.tiny_checkpoints import write_tiny_checkpoint

# No fetch thread: the order in which records land, and so who is evicted first, is then fixed.
CONFIG = WorkerConfig(device="cpu", dtype="float32", fetch_threads=0, max_sequences=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    model = write_tiny_checkpoint("mixtral", folder / "model", hidden=128, ffn=128)
    compress(model, folder / "store", CompressionConfig(recipe="paper", avg_rank=16), jobs=1)
    return folder / "store"


@pytest.fixture
def source(store: Path) -> Iterator[Segment]:
    with closing(Segment(store)) as made:
        yield made


def windows(num_windows: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 120, (num_windows, num_tokens + 1), generator=generator)


def recorded(
    model: OpenModel, source: Segment, num_tokens: int = 14
) -> tuple[StepCounters, StepTrace]:
    manifest = source.manifest
    with traced(model.runner, model.config.pair_policy(manifest)) as recorder:
        counters = score_decode(model.runner, windows(3, num_tokens)).counters
    return counters, recorder.trace(manifest.model, manifest.version, "a test")


@pytest.mark.parametrize("share", [None, 0.2])
@pytest.mark.parametrize("policy", get_args(CachePolicy))
def test_a_replay_finds_what_the_real_run_found(
    store: Path, source: Segment, policy: CachePolicy, share: float | None
) -> None:
    sizes = RecordSizes.of(source.manifest)
    cache_bytes = int(0.4 * (sum(sizes.codes.values()) + sum(sizes.factors.values())))
    config: dict[str, Any] = {"cache_bytes": cache_bytes, "cache_policy": policy}
    model = open_model(
        store, source, None, replace(CONFIG, **config, factor_cache_share=share, skip_below=0.47)
    )
    counters, trace = recorded(model, source)
    model.close()
    found = replay_turns(
        turns_of(trace, sizes), CacheBudgets(cache_bytes, share), eviction_policy(policy)
    )
    assert found.hits == counters.cache_hits
    misses = {kind: found.asked[kind] - found.hits[kind] for kind in found.asked}
    assert misses == counters.cache_misses
    for kind in ("codes", "factors"):
        assert found.asked_bytes[kind] - found.hit_bytes[kind] == counters.moved_by_kind(kind)
    assert counters.skipped_pairs > 0


def test_a_trace_has_a_row_of_every_token_of_every_step(store: Path, source: Segment) -> None:
    model = open_model(store, source, None, CONFIG)
    _, trace = recorded(model, source, num_tokens=5)
    assert trace.rows_per_step == (3,) * 5
    assert (trace.num_steps, trace.num_rows) == (5, 15)
    assert trace.model == TracedModel(
        "model", "mixtral", 2, dict(source.manifest.model.num_experts)
    )
    rows = trace.layers[0]
    assert bool((rows.restore_SK.sum(dim=1) == 1).all()), "the store says Top-1"
    assert bool(rows.run_SK.all())
    with traced(model.runner, model.config.pair_policy(source.manifest)) as recorder:
        plain = score_windows(model.runner, windows(2, 9)).window_nats
    assert score_windows(model.runner, windows(2, 9)).window_nats == plain
    assert recorder.trace(source.manifest.model, "v", "").rows_per_step == (18,)
    model.close()


def test_padding_leaves_no_row(store: Path, source: Segment) -> None:
    model = open_model(store, source, None, CONFIG)
    ids = windows(2, 3)
    valid = torch.tensor([[True] * 4, [True, False, False, False]])
    positions = torch.arange(4).expand(2, -1)
    with traced(model.runner, model.config.pair_policy(source.manifest)) as recorder:
        with pytest.raises(ValueError, match="nothing was run"):
            recorder.trace(source.manifest.model, "v", "")
        model.runner.forward(ids, positions, None, None, valid_BT=valid)
        model.runner.forward(ids, positions, None, None, valid_BT=torch.zeros_like(valid))
    assert recorder.trace(source.manifest.model, "v", "").rows_per_step == (5,)
    model.close()


def test_a_step_that_failed_is_not_in_the_trace(store: Path) -> None:
    source = LossySource(Segment(store), [])
    model = open_model(store, source, None, replace(CONFIG, cache_bytes=0))
    ids, positions = windows(1, 3), torch.arange(4)[None]
    with closing(source), traced(model.runner, PairPolicy(top_n=1)) as recorder:
        source.lost = {RecordRequest(key, "codes") for key in source.manifest.experts if key.layer}
        with pytest.raises(ExpertsFailed):
            model.runner.forward(ids, positions, None, None)
        source.lost = set()
        model.runner.forward(ids, positions, None, None)
        assert recorder.trace(source.manifest.model, "v", "").rows_per_step == (4,)
    model.close()


def hand_trace(**changes: Any) -> StepTrace:
    """Two steps, of two rows and one, in one layer of three experts."""
    rows = LayerRows(
        topk_ids_SK=torch.tensor([[2, 0], [2, 1], [1, 0]], dtype=torch.int16),
        topk_weights_SK=torch.tensor([[0.75, 0.25], [0.5, 0.5], [3.0, 1.0]]),
        run_SK=torch.tensor([[True, True], [True, False], [True, True]]),
        restore_SK=torch.tensor([[True, False], [True, False], [True, False]]),
    )
    model = TracedModel("hand", "mixtral", 2, {4: 3})
    fields = {"model": model, "store_version": "0" * 64, "origin": "by hand"}
    return StepTrace(**{**fields, "rows_per_step": (2, 1), "layers": {4: rows}, **changes})


def test_a_turn_needs_codes_of_what_runs_and_factors_of_what_is_restored() -> None:
    keys = [ExpertKey(4, expert) for expert in range(3)]
    sizes = RecordSizes(
        codes=dict.fromkeys(keys, 10), factors={keys[2]: 4}, num_blocks={keys[2]: 1}
    )
    first, second = turns_of(hand_trace(), sizes)
    told = [(need.request, need.num_bytes) for need in first.needs]
    assert told == [
        (RecordRequest(keys[0], "codes"), 10),
        (RecordRequest(keys[2], "codes"), 10),
        (RecordRequest(keys[2], "factors", 1), 4),
    ]
    assert first.scores == pytest.approx({0: 0.25, 2: 1.25})
    # Expert 1 is restored, but the store has no factors of it.
    assert [need.request for need in second.needs] == [
        RecordRequest(keys[0], "codes"),
        RecordRequest(keys[1], "codes"),
    ]
    assert second.scores == pytest.approx({0: 0.25, 1: 0.75})


def test_scores_are_those_the_worker_tells_its_cache() -> None:
    generator = torch.Generator().manual_seed(3)
    weights_SK = torch.rand(6, 2, generator=generator)
    ids_SK = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(6)])
    policy = PairPolicy(top_n=1, skip_below=0.3)
    routing = route(4, ids_SK, weights_SK, policy=policy)
    assert routing.num_skipped
    rows = LayerRows(ids_SK.to(torch.int16), weights_SK, routing.run_TK, routing.restore_TK)
    sizes = RecordSizes({ExpertKey(4, expert): 1 for expert in range(3)}, {})
    (turn,) = turns_of(hand_trace(rows_per_step=(6,), layers={4: rows}), sizes)
    assert turn.scores == pytest.approx(expert_scores(routing))


def test_a_trace_of_another_model_is_refused(source: Segment) -> None:
    model = source.manifest.model
    ours = TracedModel.of(model)
    trace = hand_trace()
    check_same_model(
        replace(
            trace,
            model=replace(ours, name="renamed"),
            layers=dict.fromkeys(ours.num_experts, trace.layers[4]),
        ),
        model,
    )
    with pytest.raises(ValueError, match="num_experts {4: 3}, the store of model has {0: "):
        check_same_model(trace, model)


def test_sequences_are_taken_apart(store: Path, source: Segment) -> None:
    """One at a time they go where they went side by side, in the order of their windows."""
    model = open_model(store, source, None, CONFIG)
    _, trace = recorded(model, source, num_tokens=6)
    alone = side_by_side(trace, 1)
    assert alone.rows_per_step == (1,) * 18
    with traced(model.runner, model.config.pair_policy(source.manifest)) as recorder:
        for window_1T in windows(3, 6).split(1):
            score_decode(model.runner, window_1T)
    by_hand = recorder.trace(source.manifest.model, source.manifest.version, "alone")
    model.close()
    for layer, rows in alone.layers.items():
        expected = by_hand.layers[layer]
        assert torch.equal(rows.topk_ids_SK, expected.topk_ids_SK)
        assert torch.allclose(rows.topk_weights_SK, expected.topk_weights_SK, atol=1e-5)
        assert torch.equal(rows.restore_SK, expected.restore_SK)
    pairs = side_by_side(trace, 2)
    assert pairs.rows_per_step == (2,) * 6
    assert torch.equal(
        pairs.layers[0].topk_ids_SK,
        trace.layers[0].topk_ids_SK.reshape(6, 3, 2)[:, :2].flatten(0, 1),
    )
    whole = side_by_side(trace, 3)
    assert torch.equal(whole.layers[1].topk_weights_SK, trace.layers[1].topk_weights_SK)


@pytest.mark.parametrize(
    ("batch", "num_groups", "message"),
    [
        (4, None, "got 0 times 4 sequences, the trace has 2"),
        (0, None, "got 0 times 0 sequences"),
        (1, 3, "got 3 times 1 sequences, the trace has 2"),
    ],
)
def test_too_few_sequences_are_refused(batch: int, num_groups: int | None, message: str) -> None:
    rows = hand_trace().layers[4]
    even = LayerRows(*(getattr(rows, name)[:2] for name in rows.__slots__))
    trace = hand_trace(rows_per_step=(2,), layers={4: even})
    with pytest.raises(ValueError, match=message):
        side_by_side(trace, batch, num_groups)
    with pytest.raises(ValueError, match="steps have 1 to 2 rows; only a trace of texts"):
        side_by_side(hand_trace(), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {}}, r"has layers \[\], the model's MoE layers are \[4\]"),
        ({"rows_per_step": (3, 0)}, "a step has no token row"),
        ({"rows_per_step": (2, 2)}, r"layer 4: topk_ids_SK: expected shape \(4, 2\), got \(3, 2\)"),
        ({"model": TracedModel("hand", "mixtral", 2, {4: 2})}, "experts 0 to 2, expected 0 to 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hand_trace(**changes)
