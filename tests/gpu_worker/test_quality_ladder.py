"""Goal: the rungs lead from what the config wants to what it allows, never past it, each with fewer
bytes than the one before.

Method: properties over random configs on a store of eight blocks per compensator; a table of cases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.types import Manifest
from gpu_worker.config import WorkerConfig
from gpu_worker.expert_cache import CacheBudgets
from gpu_worker.quality_ladder import QualitySetting, quality_ladder
from gpu_worker.record_sizes import RecordSizes
from tests.hand_store import build_store


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("store")
    return build_store(folder, layers=(0,), experts=3, ffn=64, blocks="gudgudgu")


def ladder(manifest: Manifest, **config: Any) -> tuple[QualitySetting, ...]:
    return quality_ladder(WorkerConfig(device="cpu", **config).resolve(manifest), manifest)


@pytest.mark.parametrize(
    ("config", "rungs"),
    [
        (
            {"top_n": 1},
            [
                "top_n=1; factor_share=1",
                "top_n=1; factor_share=0.75",
                "top_n=1; factor_share=0.5",
                "top_n=1; factor_share=0.25",
                "top_n=0; factor_share=0.25",
            ],
        ),
        (
            {"top_n": 2, "min_top_n": 1, "min_factor_share": 0.5},
            [
                "top_n=2; factor_share=1",
                "top_n=2; factor_share=0.75",
                "top_n=2; factor_share=0.5",
                "top_n=1; factor_share=0.5",
            ],
        ),
        (
            {"restore": "all", "min_top_n": 1, "min_factor_share": 1.0},
            ["top_n=2; factor_share=1", "top_n=1; factor_share=1"],
        ),
        (
            {"restore": "mass", "restore_mass": 0.5, "min_factor_share": 0.75},
            ["factor_share=1", "factor_share=0.75", "top_n=0; factor_share=0.75"],
        ),
        ({"top_n": 1, "min_top_n": 1, "min_factor_share": 1.0}, ["top_n=1; factor_share=1"]),
        (
            {"top_n": 0, "max_skip_below": 0.3},
            [
                "top_n=0; factor_share=1",
                "top_n=0; factor_share=0; skip_below=0.15",
                "top_n=0; factor_share=0; skip_below=0.3",
            ],
        ),
    ],
)
def test_the_rungs_of_a_config(manifest: Manifest, config: dict[str, Any], rungs: Any) -> None:
    assert [str(rung) for rung in ladder(manifest, **config)] == rungs


@settings(max_examples=60, deadline=None)
@given(
    top_n=st.integers(0, 2),
    min_top_n=st.integers(0, 2),
    share=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_part=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    skip=st.sampled_from([0.0, 0.2]),
    restore=st.sampled_from(["top_n", "all", "random"]),
)
def test_no_rung_is_outside_the_limits_and_each_saves_something(
    manifest: Manifest,
    top_n: int,
    min_top_n: int,
    share: float,
    min_part: float,
    skip: float,
    restore: Any,
) -> None:
    min_top_n = min(top_n, min_top_n)
    limits = {"min_top_n": min_top_n, "min_factor_share": share * min_part}
    config = {"top_n": top_n, "factor_share": share, "restore": restore, "max_skip_below": skip}
    rungs = ladder(manifest, **config, **limits)
    assert rungs[0].sizes == RecordSizes.of(manifest, share)
    assert rungs[0].factor_bytes in (0.0, 1.0)
    for rung in rungs:
        assert rung.top_n is not None
        assert min_top_n <= rung.top_n <= (2 if restore == "all" else top_n)
        assert share * min_part <= rung.factor_share <= share
        assert 0 <= rung.skip_below <= skip
        # What is told is what is done.
        assert rung.pairs.skip_below == rung.skip_below
        assert rung.pairs.restore == "all" or rung.pairs.top_n == rung.top_n
        assert rung.sizes == RecordSizes.of(manifest, rung.factor_share)
        assert rung.cache == CacheBudgets(512 << 20)  # one budget for all is left as it is
    for above, below in zip(rungs, rungs[1:], strict=False):
        assert below.factor_bytes < above.factor_bytes or below.skip_below > above.skip_below


def test_a_part_of_the_cache_for_factors_shrinks_with_their_bytes(manifest: Manifest) -> None:
    rungs = ladder(manifest, top_n=1, cache_bytes=1000, factor_cache_share=0.4)
    shares = [rung.cache.factor_share for rung in rungs]
    assert shares == [pytest.approx(0.4 * rung.factor_bytes) for rung in rungs]
    assert (shares[0], shares[-1]) == (0.4, 0.0)
    assert {rung.cache.total_bytes for rung in rungs} == {1000}
    assert rungs[1].knobs()["factor_cache_share"] == shares[1]
    assert "cache" not in str(rungs[1])
