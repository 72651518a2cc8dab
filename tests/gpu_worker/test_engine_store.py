"""Goal: over a real store the engine keeps its promises: the same tokens in any company, an expert
that is gone ends only the requests that need it, a lost compensator is degraded and said so.

Method: a compressed tiny Mixtral with four experts a layer, read through sources that count and
lose records; token ids only.
"""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.errors import CorruptRecordError, StoreError, StoreFormatError
from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.build import build_engine, load_tokenizer, open_model, usable_context
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import StepCounters
from gpu_worker.engine import Engine
from gpu_worker.experts import ExpertsFailed
from gpu_worker.sequence import SamplingParams, Sequence
from tests.gpu_worker.plain_engine import play, tokens_of
from tests.gpu_worker.sources import CountingSource, InProcessNearData, LossySource
from tests.tiny_checkpoints import tiny_config, write_tiny_checkpoint

CONFIG = WorkerConfig(device="cpu", dtype="float32", cache_bytes=100_000, prefill_chunk=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    model = write_tiny_checkpoint("mixtral", folder / "model", hidden=128, ffn=128)
    compress(model, folder / "store", CompressionConfig(recipe="paper", avg_rank=16), jobs=1)
    return folder / "store"


def engine_over(store: Path, source: Any = None, **config: Any) -> Engine:
    settings = {
        name: config.get(name, getattr(CONFIG, name)) for name in WorkerConfig.__dataclass_fields__
    }
    near_data = config.get("client")
    return build_engine(store, source or Segment(store), near_data, WorkerConfig(**settings))


def requests(**params: Any) -> list[Sequence]:
    prompts = {"a": (5, 6), "b": (90, 17, 33, 4, 8, 71, 20), "c": (12,) * 3 + (40, 41), "d": (99,)}
    asked = {"max_tokens": 10, "ignore_eos": True, "seed": 3, **params}
    return [Sequence(name, ids, SamplingParams(**asked)) for name, ids in prompts.items()]


@pytest.fixture(scope="module")
def alone(store: Path) -> dict[str, list[int]]:
    """Every request's tokens when nobody else runs."""
    return {
        s.request_id: tokens_of(play(engine_over(store), {0: [s]})[s.request_id])
        for s in requests()
    }


def test_tokens_are_the_same_in_company(store: Path, alone: dict[str, list[int]]) -> None:
    one, two, three, four = requests()
    events = play(engine_over(store, max_sequences=3), {0: [four, two], 2: [one], 5: [three]})
    assert {name: tokens_of(found) for name, found in events.items()} == alone


def test_tokens_do_not_depend_on_the_cache(store: Path, alone: dict[str, list[int]]) -> None:
    for cache_bytes, prefetch in product((0, 10**9), ("always", "never")):
        engine = engine_over(store, cache_bytes=cache_bytes, prefetch=prefetch)
        events = play(engine, {0: requests()})
        assert {name: tokens_of(found) for name, found in events.items()} == alone


@pytest.mark.parametrize("prefetch", ["always", "never"])
def test_counted_bytes_are_those_the_source_delivered(store: Path, prefetch: str) -> None:
    source = CountingSource(Segment(store))
    engine = engine_over(store, source, prefetch=prefetch)
    for sequence in requests():
        engine.add(sequence)
    total, num_tokens = StepCounters(), 0
    while engine.has_work:
        output = engine.step()
        total += output.counters
        num_tokens += output.num_tokens
    engine.close()
    in_vain = total.ahead_bytes - total.ahead_used_bytes
    assert total.total_moved_bytes == sum(total.planned_bytes.values()) + in_vain
    if prefetch == "never":
        assert in_vain == 0
        for kind in ("codes", "factors"):
            assert total.moved_by_kind(kind) == source.bytes[kind] == total.planned_bytes[kind] > 0
    else:  # what was under way when the last step ended is in no step's counters
        assert total.right_pairs > 0
        assert total.total_moved_bytes <= sum(source.bytes.values())
    # Two experts of two layers for every position: prompts and all but the last token of each.
    assert num_tokens == 2 + 7 + 5 + 1 + 4 * 9
    pairs = total.restored_pairs + total.low_bit_pairs + total.degraded_pairs
    assert pairs == num_tokens * 2 * 2


def experts_used(store: Path) -> dict[str, set[ExpertKey]]:
    """Which experts each request needs, running alone."""
    used = {}
    for sequence in requests():
        source = CountingSource(Segment(store))
        play(engine_over(store, source, cache_bytes=0, prefetch="never"), {0: [sequence]})
        used[sequence.request_id] = {r.key for call in source.calls for r in call}
    return used


def test_a_lost_expert_ends_only_the_requests_that_need_it(
    store: Path, alone: dict[str, list[int]]
) -> None:
    used = experts_used(store)
    keys = sorted(set().union(*used.values()))
    shared = [
        (key, {name for name in used if key in used[name]})
        for key in keys
        if 0 < sum(key in found for found in used.values()) < len(used)
    ]
    assert shared, "this model uses every expert for every request; choose other prompts"
    for key, hit in shared:
        source = LossySource(Segment(store), [RecordRequest(key, "codes")])
        engine = engine_over(store, source, cache_bytes=0)
        events = play(engine, {0: requests()})
        for name, found in events.items():
            last = found[-1]
            if name in hit:
                assert last.finish_reason == "error"
                assert isinstance(last.error, ExpertsFailed)
                assert isinstance(last.error, StoreError)
                assert str(key) in str(last.error)
                got = tokens_of(found)
                assert got == alone[name][: len(got)], "tokens before the loss stay right"
            else:
                assert (last.finish_reason, tokens_of(found)) == ("length", alone[name])
        assert not engine.scheduler.num_running


def test_a_lost_compensator_degrades_and_says_so(store: Path) -> None:
    manifest = Segment(store).manifest
    lost = [RecordRequest(key, "factors") for key, info in manifest.experts.items() if info.factors]
    assert lost
    events = play(engine_over(store, LossySource(Segment(store), lost)), {0: requests()})
    static = play(engine_over(store, top_n=0), {0: requests()})
    for name, found in events.items():
        assert found[-1].finish_reason == "length"
        assert found[-1].degraded
        assert not static[name][-1].degraded
        assert tokens_of(found) == tokens_of(static[name]), "codes alone, as if none were asked for"


def test_near_data_serves_requests_and_its_loss_is_survived(store: Path) -> None:
    segment = Segment(store)
    near_data = InProcessNearData(segment, backend="cpu_fp32")
    engine = engine_over(store, segment, near_data="low_bit", client=near_data)
    first = play(engine, {0: requests(temperature=0.0)})
    assert near_data.num_pairs > 0
    near_data.error = StoreError("the near-data worker has gone (test)")
    second = play(engine, {0: requests(temperature=0.0)})
    off = play(engine_over(store), {0: requests(temperature=0.0)})
    for name in off:
        assert tokens_of(first[name]) == tokens_of(second[name]) == tokens_of(off[name])


def test_engine_closes_what_it_opened_and_leaves_the_source(store: Path) -> None:
    segment = Segment(store)
    engine = engine_over(store, segment)
    assert engine.tokenizer is None
    engine.close()
    assert segment.fetch([RecordRequest(ExpertKey(0, 0), "codes")])[0].dtype == torch.uint8


def test_longrope_is_served_up_to_where_it_switches() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "short_mscale": 1.0,
        "long_mscale": 1.2,
    }
    config = tiny_config("phimoe", rope_parameters=rope)
    assert usable_context(config, 256, None) == 64
    assert usable_context(config, 60, 60) == 60
    with pytest.raises(ValueError, match="max_context: got 128.*at most 64"):
        usable_context(config, 128, 128)
    assert usable_context(tiny_config("mixtral"), 256, None) == 256


def test_a_config_that_does_not_fit_is_refused(store: Path) -> None:
    with pytest.raises(ValueError, match="top_n: got 3"):
        open_model(store, Segment(store), None, WorkerConfig(top_n=3))
    with pytest.raises(ValueError, match="near_data"):
        open_model(store, Segment(store), None, WorkerConfig(near_data="low_bit"))
    with pytest.raises(ValueError, match="max_context"):
        open_model(store, Segment(store), None, WorkerConfig(max_context=10**6))


def test_a_changed_dense_file_is_not_served(store: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(store, tmp_path / "store"))
    dense = copied / "dense-00000.safetensors"
    data = bytearray(dense.read_bytes())
    data[-1] ^= 1
    dense.write_bytes(data)
    with pytest.raises(CorruptRecordError, match=f"{copied}: dense-00000.safetensors: expected"):
        open_model(copied, Segment(copied), None, CONFIG)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_tokenizer_files_that_make_no_tokenizer(text: str, store: Path, tmp_path: Path) -> None:
    """As whole as its model's: the checksum is right and the content is not."""
    copied = Path(shutil.copytree(store, tmp_path / "store"))
    (copied / "tokenizer.json").write_text(text)
    with pytest.raises(StoreFormatError, match=f"{copied}: the tokenizer's files cannot be read"):
        load_tokenizer(copied)
