"""Goal: a wrong setting is refused by name before anything starts; "auto" never reaches the worker.

Method: a table of wrong values; `resolve` against a manifest made by hand.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.types import Manifest
from gpu_worker.config import WorkerConfig
from tests.hand_store import build_store


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("store")
    return build_store(folder, layers=(0,), experts=2, ffn=64, blocks="")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"restore": "best"}, "restore: got 'best', expected one of top_n, all, random, mass"),
        ({"restore": "mass"}, "restore_mass: got None, restore 'mass' needs a threshold"),
        ({"restore": "benefit"}, "restore_benefit: got None, restore 'benefit' needs"),
        ({"restore_mass": 1.5}, "restore_mass: got 1.5, expected 0 to 1"),
        ({"restore_benefit": -0.1}, "restore_benefit: got -0.1, expected 0 or more"),
        ({"restore_benefit": float("inf")}, "restore_benefit: got inf"),
        ({"restore_seed": -1}, "restore_seed: got -1"),
        ({"skip_below": float("nan")}, "skip_below: got nan, expected 0 to 1"),
        ({"skip_below": 2}, "skip_below: got 2"),
        ({"near_data": "on"}, "near_data: got 'on', expected one of off, low_bit, all, cost"),
        ({"device": "tpu"}, "device: got 'tpu', expected one of auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of auto, float32"),
        ({"top_n": -1}, "top_n: got -1, expected a whole number of at least 0"),
        ({"top_n": True}, "top_n: got True"),
        ({"cache_bytes": -5}, "cache_bytes: got -5"),
        ({"cache_bytes": 0.5}, "cache_bytes: got 0.5"),
        ({"cache_policy": "mru"}, "cache_policy: got 'mru', expected one of lfu, score"),
        ({"factor_cache_share": 1.2}, "factor_cache_share: got 1.2, expected 0 to 1"),
        ({"max_in_flight_bytes": 0}, "max_in_flight_bytes: got 0"),
        ({"fetch_threads": -1}, "fetch_threads: got -1"),
        ({"fetch_bytes": 0}, "fetch_bytes: got 0"),
        ({"max_sequences": 0}, "max_sequences: got 0"),
        ({"max_context": 0}, "max_context: got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk: got 0"),
        ({"link_bytes_per_s": -1.0}, "link_bytes_per_s: got -1.0, expected a positive number"),
        ({"near_data_token_s": 0.0}, "near_data_token_s: got 0.0, expected a positive number"),
        ({"target_step_s": float("nan")}, "target_step_s: got nan, expected a positive number"),
        ({"min_top_n": -1}, "min_top_n: got -1"),
        ({"min_factor_share": 0.6, "factor_share": 0.5}, "min_factor_share: got 0.6, expected 0 "),
        ({"max_skip_below": 0.1, "skip_below": 0.2}, "max_skip_below: got 0.1, but skip_below is"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkerConfig(**wrong)


def test_resolve_leaves_nothing_open(manifest: Manifest) -> None:
    resolved = WorkerConfig().resolve(manifest)
    of_one_policy = {
        "target_step_s",
        "link_bytes_per_s",
        "near_data_token_s",
        "restore_mass",
        "restore_benefit",
    }
    none_is_a_choice = {"factor_cache_share"}
    for field in fields(resolved):
        if field.name not in of_one_policy | none_is_a_choice:
            assert getattr(resolved, field.name) not in (None, "auto"), field.name
    assert resolved.top_n == manifest.recipe.top_n
    assert resolved.max_context == manifest.model.max_positions
    has_cuda = torch.cuda.is_available()
    assert resolved.device == ("cuda" if has_cuda else "cpu")
    assert resolved.torch_dtype == (torch.bfloat16 if has_cuda else torch.float32)
    assert resolved.resolve(manifest) == resolved


def test_resolve_keeps_what_was_given(manifest: Manifest) -> None:
    given = WorkerConfig(top_n=0, max_context=9, dtype="bfloat16", device="cpu", fetch_bytes=3)
    resolved = given.resolve(manifest)
    assert (resolved.top_n, resolved.max_context, resolved.fetch_bytes) == (0, 9, 3)
    assert resolved.torch_dtype == torch.bfloat16


def test_what_the_model_cannot_do_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="top_n: got 3, but by hand routes a token to 2 experts"):
        WorkerConfig(top_n=3).resolve(manifest)
    with pytest.raises(ValueError, match="min_top_n: got 2, but top_n is 1; use 0 to 1"):
        WorkerConfig(min_top_n=2).resolve(manifest)
    with pytest.raises(ValueError, match="max_context: got 257, but by hand has only 256"):
        WorkerConfig(max_context=257).resolve(manifest)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="no usable GPU; use 'auto'"):
        WorkerConfig(device="cuda").resolve(manifest)


def test_the_policy_of_pairs_is_the_config_s(manifest: Manifest) -> None:
    config = WorkerConfig(restore="benefit", restore_benefit=0.1, skip_below=0.2, top_n=1)
    policy = config.resolve(manifest).pair_policy(manifest)
    assert (policy.restore, policy.restore_benefit, policy.skip_below) == ("benefit", 0.1, 0.2)
    assert policy.top_n == 1
    assert policy.repaired.keys() == {0}
    assert WorkerConfig().resolve(manifest).pair_policy(manifest).restore == "top_n"
