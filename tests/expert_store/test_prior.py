"""Goal: a study's prior moves bits to the layers that matter, where nothing was measured.

Method: priors and sensitivities by hand; a tiny model compressed under a budget with either.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expert_store.calibration import Calibration, save_calibration
from expert_store.checkpoint import Checkpoint
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.planning import depth_prior, layer_weights
from expert_store.prior import save_prior
from expert_store.types import ExpertShape, Manifest, ModelInfo
from tests.expert_store.calibrations import calibration_parts
from tests.tiny_checkpoints import write_tiny_checkpoint

MODEL = ModelInfo(
    name="by hand",
    model_type="mixtral",
    num_layers=3,
    top_k=2,
    vocab_size=10,
    max_positions=10,
    expert=ExpertShape(hidden=128, ffn=64, activation="silu", has_bias=False),
    moe_layers={0: "a", 2: "b"},
    num_experts={0: 3, 2: 3},
)


def calibration(folder: Path, *, measured: dict[int, float]) -> Calibration:
    info, tensors = calibration_parts()
    assert info.sensitivity is not None
    sensitivity = replace(info.sensitivity, layers=measured) if measured else None
    return save_calibration(folder, replace(info, sensitivity=sensitivity), tensors)


def test_without_a_calibration_the_prior_is_the_weight() -> None:
    assert layer_weights(MODEL, None) == depth_prior((0, 2))
    assert layer_weights(MODEL, None, {0: 1.6, 2: 0.4}) == {0: 1.6, 2: 0.4}


def test_the_prior_of_depth_favours_both_ends() -> None:
    assert depth_prior((3,)) == {3: 4.0}
    assert depth_prior((0, 2)) == {0: 4.0, 2: 2.0}
    weights = depth_prior(tuple(range(1, 33)))
    assert [layer for layer, weight in weights.items() if weight == 4.0] == [1, 2, 3, 4]
    assert [layer for layer, weight in weights.items() if weight == 2.0] == [29, 30, 31, 32]
    assert all(weights[layer] == 1.0 for layer in range(5, 29))


def test_without_a_calibration_no_matrix_is_left_far_behind(tmp_path: Path) -> None:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model", layers=3, hidden=128, ffn=192)
    config = CompressionConfig(recipe="fast", budget=3.5)
    manifest = compress(model, tmp_path / "store", config, jobs=2)
    found = {width for expert in manifest.experts.values() for width in expert.form.bits}
    assert min(found) >= 3, "one of 2 bits would pay for another of 4"


def test_what_was_measured_overrules_the_prior(tmp_path: Path) -> None:
    prior = {0: 1.6, 2: 0.4}
    measured = calibration(tmp_path / "measured", measured={0: 3.0, 2: 5.0})
    assert layer_weights(MODEL, measured, prior) == layer_weights(MODEL, measured)
    silent = calibration(tmp_path / "silent", measured={})
    plain, told = layer_weights(MODEL, silent), layer_weights(MODEL, silent, prior)
    for layer, value in prior.items():
        assert told[layer] == pytest.approx(value * plain[layer])


def bits(manifest: Manifest, layer: int) -> int:
    return sum(sum(e.form.bits) for e in manifest.experts.values() if e.key.layer == layer)


def test_bits_go_where_the_prior_says(tmp_path: Path) -> None:
    model = write_tiny_checkpoint("mixtral", tmp_path / "model")
    info = Checkpoint(model).model_info
    for name, layers in (("first", {0: 1.99, 1: 0.01}), ("second", {0: 0.01, 1: 1.99})):
        save_prior(tmp_path / f"{name}.json", info, layers)
    made = {
        name: compress(
            model,
            tmp_path / name,
            CompressionConfig(recipe="mixed", prior=tmp_path / f"{name}.json"),
            jobs=1,
        )
        for name in ("first", "second")
    }
    assert bits(made["first"], 0) > bits(made["first"], 1)
    assert bits(made["second"], 0) < bits(made["second"], 1)


def test_a_prior_needs_a_budget_and_belongs_to_the_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no budget to share out"):
        CompressionConfig(recipe="paper", prior=tmp_path / "prior.json")
    with_prior = CompressionConfig(recipe="fast", prior=tmp_path / "prior.json")
    assert with_prior.fingerprint("a") == CompressionConfig(recipe="fast").fingerprint("a")
    assert with_prior.fingerprint("a") != with_prior.fingerprint("a prior")
