"""Goal: every recipe plans every expert, within its budget, the same way twice, and its stores hold
what was planned.

Method: a tiny Mixtral compressed for real by each recipe; the calibration is one made by hand.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expert_store.calibration import Calibration, save_calibration
from expert_store.checkpoint import Checkpoint
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.curves import max_rank
from expert_store.layer_codecs import LayerCodec
from expert_store.methods import METHODS
from expert_store.segment import Segment
from expert_store.statistics import CalibratedModel
from expert_store.types import ExpertKey, Manifest, RecordRequest
from expert_store.verify import verify
from tests.expert_store.calibrations import calibration_parts
from tests.tiny_checkpoints import write_tiny_checkpoint

WEIGHTS = 3 * 128 * 192


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planning") / "model"
    return write_tiny_checkpoint("mixtral", folder, layers=2, hidden=128, ffn=192, experts=4)


def calibration_of(model: Path, folder: Path) -> Calibration:
    """Random statistics that pass for this model's; two experts of a layer saw next to nothing."""
    parts = calibration_parts(
        layers=(0, 1), experts=4, hidden=128, ffn=192, tokens=(500, 300, 0, 4)
    )
    info = replace(parts[0], model=CalibratedModel.of(Checkpoint(model).model_info))
    return save_calibration(folder, info, parts[1])


def moved_bits(manifest: Manifest) -> float:
    """Bits per weight that a token moves when all experts are used alike."""
    top_n, top_k = manifest.recipe.top_n, manifest.model.top_k
    infos = manifest.experts.values()
    codes = sum(info.codes.num_bytes for info in infos)
    factors = sum(info.factors.num_bytes for info in infos if info.factors)
    return 8 * (codes + factors * top_n / top_k) / (len(infos) * WEIGHTS)


@pytest.mark.parametrize("budget", [2.3, 2.75, 3.5])
def test_fast_stays_within_its_budget_and_uses_most_of_it(
    model: Path, tmp_path: Path, budget: float
) -> None:
    config = CompressionConfig(recipe="fast", budget=budget)
    manifest = compress(model, tmp_path / "store", config, jobs=2)
    assert 0.9 * budget < moved_bits(manifest) <= budget * 1.001
    assert manifest.recipe.budget == budget
    assert not verify(tmp_path / "store").damage


def test_more_budget_leaves_less_error(model: Path, tmp_path: Path) -> None:
    errors = []
    for budget in (2.3, 2.75, 3.5):
        config = CompressionConfig(recipe="fast", budget=budget)
        manifest = compress(model, tmp_path / f"{budget}", config, jobs=2)
        errors.append(sum(info.restored_error**2 for info in manifest.experts.values()))
    assert errors[0] > errors[1] > errors[2]


def test_the_same_config_gives_the_same_store(model: Path, tmp_path: Path) -> None:
    config = CompressionConfig(recipe="fast", budget=2.75)
    first = compress(model, tmp_path / "first", config, jobs=1)
    second = compress(model, tmp_path / "second", config, jobs=2)
    assert first.version == second.version


def test_no_rank_costs_more_than_one_more_bit() -> None:
    assert max_rank(320, 384, 3) == 48 // 16 * 16 or max_rank(320, 384, 3) <= 49
    assert max_rank(64, 128, 3) < 16
    assert max_rank(4096, 14336, 3) >= 16


@pytest.mark.parametrize(
    ("config", "codec"),
    [
        (CompressionConfig(recipe="sz3", error_bound="row:0.2"), "sz3"),
        (CompressionConfig(recipe="cuszp", error_bound="group:0.2"), "cuszp"),
    ],
)
def test_codec_recipes_store_streams_that_read_back(
    model: Path, tmp_path: Path, config: CompressionConfig, codec: str
) -> None:
    manifest = compress(model, tmp_path / "store", config, jobs=2)
    assert {info.form.codec for info in manifest.experts.values()} == {codec}
    assert all(0 < info.error < 0.2 for info in manifest.experts.values())
    segment = Segment(tmp_path / "store")
    (data,) = segment.fetch([RecordRequest(ExpertKey(0, 0), "codes")])
    segment.close()
    assert data.numel() == manifest.experts[ExpertKey(0, 0)].codes.num_bytes


def test_a_layer_codec_changes_its_layers_alone(model: Path, tmp_path: Path) -> None:
    config = CompressionConfig(recipe="static", layer_codecs=(LayerCodec.parse("0:sz3:row:0.1"),))
    manifest = compress(model, tmp_path / "store", config, jobs=2)
    codecs = {key.layer: info.form.codec for key, info in manifest.experts.items()}
    assert codecs == {0: "sz3", 1: "tiles"}
    absent = replace(config, layer_codecs=(LayerCodec.parse("7:sz3:row:0.1"),))
    with pytest.raises(ValueError, match="layer_codecs: layer 7 has no routed experts"):
        compress(model, tmp_path / "absent", absent, jobs=1)


def test_best_needs_the_calibration_of_this_model(model: Path, tmp_path: Path) -> None:
    calibration = calibration_of(model, tmp_path / "calibration")
    config = CompressionConfig(recipe="best", budget=2.6, calibration=calibration.folder)
    manifest = compress(model, tmp_path / "store", config, jobs=2)
    assert manifest.recipe.calibration == calibration.id
    assert all(info.restored_error <= info.error * (1 + 1e-6) for info in manifest.experts.values())


def test_milo_and_mixed_are_controls_of_the_same_code(model: Path, tmp_path: Path) -> None:
    milo = compress(model, tmp_path / "milo", CompressionConfig(recipe="milo"), jobs=2)
    assert {info.repair.letters.count("g") for info in milo.experts.values()} <= {0, 1}
    mixed = compress(
        model, tmp_path / "mixed", CompressionConfig(recipe="mixed", budget=3.0), jobs=2
    )
    assert all(info.factors is None for info in mixed.experts.values())
    assert moved_bits(mixed) <= 3.0 * 1.001


def test_methods_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="hqq makes affine codes only"):
        replace(METHODS["paper"], grids=("symmetric",))
    with pytest.raises(ValueError, match="there is no compensator to alternate with"):
        replace(METHODS["best"], repairs=(), alternations=1)
    with pytest.raises(ValueError, match="grids: got"):
        replace(METHODS["best"], grids=())
