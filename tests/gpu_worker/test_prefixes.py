"""Goal: part of a compensator is a smaller compensator, in its answers and in the bytes it moves.

Method: stores of rank blocks and planes; an oracle that parses the prefix by itself and runs each
pair in plain torch; bytes by the source's own count. Codes that the host decodes go the same way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expert_store.format import (
    blocks_within,
    decode_on_host,
    device_form,
    parse_codes,
    parse_factors,
)
from expert_store.segment import Segment
from expert_store.types import Codec, ExpertKey, RecordRequest
from gpu_worker.record_sizes import RecordSizes, largest_expert_bytes
from gpu_worker.restoring import repaired_errors
from kernels import reference
from tests.gpu_worker.sources import CountingSource
from tests.gpu_worker.steps import HIDDEN, NUM_EXPERTS, TOP_K, Step, running
from tests.hand_store import build_store

BLOCKS = "gUudDg"
FFN = 64
SHARES = [0.0, 0.1, 0.3, 0.5, 0.75, 0.999, 1.0]
CLOSE = 2e-6


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Segment:
    folder = tmp_path_factory.mktemp("store")
    build_store(
        folder,
        experts=NUM_EXPERTS,
        hidden=HIDDEN,
        ffn=FFN,
        bits=(2, 1, 3),
        grids=("affine", "symmetric", "symmetric"),
        blocks=BLOCKS,
        factor_grid="symmetric",
    )
    return Segment(folder)


def expected_blocks(segment: Segment, share: float) -> int:
    info = segment.manifest.experts[ExpertKey(0, 0)]
    assert info.factors is not None
    max_bytes = share * info.factors.num_bytes
    return blocks_within(segment.manifest.model.expert, info.repair, max_bytes)


def oracle(segment: Segment, step: Step, top_n: int, num_blocks: int) -> torch.Tensor:
    """Each pair alone, in plain torch, with the first `num_blocks` blocks where it is restored."""
    manifest = segment.manifest
    order = step.weights.argsort(dim=1, descending=True)
    total = torch.zeros(step.hidden.shape)
    for row in range(step.hidden.shape[0]):
        for column in range(TOP_K):
            key = ExpertKey(step.layer, int(step.ids[row, column]))
            info, shape = manifest.experts[key], manifest.model.expert
            (data,) = segment.fetch([RecordRequest(key, "codes")])
            mlp, factors = parse_codes(key, data, shape, info.form).mlp, None
            if column in order[row, :top_n] and num_blocks:
                (data,) = segment.fetch([RecordRequest(key, "factors", num_blocks)])
                factors = parse_factors(key, data, shape, info.repair.prefix(num_blocks)).factors
            y = reference.gated_mlp(step.hidden[row : row + 1], mlp, factors)
            total[row] += step.weights[row, column] * y[0]
    return total


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_shares_give_every_prefix(segment: Segment) -> None:
    """Or the tests below would not see them all."""
    found = {expected_blocks(segment, share) for share in SHARES}
    assert {0, len(BLOCKS)} <= found
    assert len(found) >= 5


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("share", SHARES)
def test_a_share_of_the_factors_is_the_smaller_compensator(
    segment: Segment, share: float, cache_bytes: int
) -> None:
    source, num_blocks = CountingSource(segment), expected_blocks(segment, share)
    with running(source, top_n=2, factor_share=share, cache_bytes=cache_bytes) as experts:
        for seed in range(2):
            step = Step(num_rows=5, seed=seed)
            expected = oracle(segment, step, 2, num_blocks)
            assert relative(step.run(experts), expected) < CLOSE
        counters = experts.end().counters
    for kind in ("codes", "factors"):
        moved = counters.moved_by_kind(kind)
        assert moved == counters.planned_bytes.get(kind, 0) == source.bytes[kind]
        assert counters.device_bytes.get(kind, 0) == moved
    wanted = {None if num_blocks == len(BLOCKS) else num_blocks}
    asked = [request for call in source.calls for request in call if request.kind == "factors"]
    assert {request.num_blocks for request in asked} == (wanted if num_blocks else set())
    restored = 2 * 2 * 5 if num_blocks else 0
    pairs = (counters.restored_pairs, counters.low_bit_pairs, counters.degraded_pairs)
    assert pairs == (restored, 2 * 5 * TOP_K - restored, 0)


def test_more_of_the_factors_moves_more_bytes(segment: Segment) -> None:
    moved = []
    for share in SHARES:
        source = CountingSource(segment)
        with running(source, restore="all", factor_share=share, cache_bytes=0) as experts:
            Step(num_rows=4).run(experts)
        moved.append(source.bytes["factors"])
    assert moved == sorted(moved)
    assert moved[0] == 0 < moved[-2] < moved[-1]
    assert all(now <= share * moved[-1] for share, now in zip(SHARES, moved, strict=True))


def test_what_was_cached_changes_no_bit(segment: Segment) -> None:
    """A longer compensator in the cache is cut to what is wanted, a shorter one is fetched anew."""
    step, outputs, moved = Step(num_rows=6), {}, {}
    for before, now in ((None, 0.5), (1.0, 0.5), (0.1, 0.5), (None, 1.0), (0.5, 1.0)):
        source = CountingSource(segment)
        with running(source, restore="all", cache_bytes=1 << 30) as experts:
            if before is not None:
                experts._sizes = RecordSizes.of(segment.manifest, before)
                step.run(experts)
            source.bytes.clear()
            experts._sizes = RecordSizes.of(segment.manifest, now)
            outputs[before, now] = step.run(experts)
            moved[before, now] = source.bytes["factors"]
            lengths = {r.num_blocks for r in experts.cache.of_layer(0) if r.kind == "factors"}
            assert len(lengths) == 1
    assert torch.equal(outputs[1.0, 0.5], outputs[None, 0.5])
    assert torch.equal(outputs[0.1, 0.5], outputs[None, 0.5])
    assert torch.equal(outputs[0.5, 1.0], outputs[None, 1.0])
    assert not torch.equal(outputs[None, 0.5], outputs[None, 1.0])
    assert moved[1.0, 0.5] == 0
    assert moved[0.1, 0.5] == moved[None, 0.5]
    assert moved[0.5, 1.0] == moved[None, 1.0]


def test_benefit_counts_what_is_fetched_only(segment: Segment) -> None:
    info = segment.manifest.experts[ExpertKey(0, 0)]
    before = -1.0
    for share in SHARES:
        error = info.prefix_error(expected_blocks(segment, share))
        repaired = float(repaired_errors(segment.manifest, share)[0][0])
        assert repaired == pytest.approx((info.error**2 - error**2) ** 0.5, abs=1e-9)
        assert repaired >= before
        before = repaired


@pytest.mark.parametrize("cache_bytes", [0, 50_000, 1 << 30])
@pytest.mark.parametrize("codec", ["sz3", "cuszp"])
def test_codecs_run_like_any_codes_and_their_bytes_are_told_apart(
    codec: Codec, cache_bytes: int, tmp_path: Path
) -> None:
    build_store(tmp_path, experts=NUM_EXPERTS, hidden=HIDDEN, ffn=FFN, codec=codec, blocks="gU")
    segment = Segment(tmp_path)
    source, step = CountingSource(segment), Step(num_rows=5)
    limit = 2 * largest_expert_bytes(segment.manifest)
    with running(source, top_n=1, cache_bytes=cache_bytes, max_in_flight_bytes=limit) as experts:
        for _ in range(2):
            assert relative(step.run(experts), oracle(segment, step, 1, 2)) < CLOSE
        counters = experts.end().counters
        assert experts.cache.used_bytes <= cache_bytes
    assert counters.moved_by_kind("codes") == source.bytes["codes"]
    assert counters.planned_bytes["codes"] == source.bytes["codes"]
    assert counters.device_bytes["factors"] == source.bytes["factors"]
    # What crosses is bfloat16 for sz3, and what came for cuszp.
    shape, fetched = segment.manifest.model.expert, counters.cache_misses["codes"]
    if codec == "sz3":
        assert counters.device_bytes["codes"] == fetched * 3 * 2 * shape.hidden * shape.ffn
        assert counters.moved_by_kind("codes") < 0.8 * counters.device_bytes["codes"]
    else:
        assert counters.device_bytes["codes"] == counters.moved_by_kind("codes")


def test_sizes_know_what_the_host_decodes(tmp_path: Path) -> None:
    build_store(tmp_path, layers=(0,), experts=1, hidden=HIDDEN, ffn=FFN, codec="sz3")
    segment = Segment(tmp_path)
    key = ExpertKey(0, 0)
    form, shape = segment.manifest.experts[key].form, segment.manifest.model.expert
    (data,) = segment.fetch([RecordRequest(key, "codes")])
    decoded = decode_on_host(key, data, shape, form)
    sizes = RecordSizes.of(segment.manifest)
    copy = sizes.copy_of(RecordRequest(key, "codes"))
    assert copy.num_bytes == data.numel()
    assert copy.decoded_bytes == copy.device_bytes == copy.held_bytes == decoded.numel()
    assert parse_codes(key, decoded, shape, device_form(form)).num_bytes == decoded.numel()
