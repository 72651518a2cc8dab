"""Goal: stores in groups of 32, 96 and 128 inputs are made, checked, read, sent and served as those
of 64 are, and say what they are.

Method: a tiny Mixtral of 384 inputs through the recipes, its records against their quantisers, an
engine's tokens against those of the reference's kernels, manifests changed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.checkpoint import Checkpoint
from expert_store.codecs.entropy import compress as entropy_coded
from expert_store.codecs.entropy import decompress
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.errors import StoreFormatError
from expert_store.format import load_manifest, parse_codes
from expert_store.manifest_json import content_version, decode_manifest, encode_manifest
from expert_store.matrix.grid import quantize_grid
from expert_store.matrix.hqq import quantize_hqq
from expert_store.matrix.rtn import quantize_rtn
from expert_store.segment import Segment
from expert_store.types import PROJECTIONS, CodesForm, RecordRequest
from expert_store.verify import verify
from expert_store.wire_form import record_sections
from gpu_worker.build import build_engine
from gpu_worker.config import WorkerConfig
from gpu_worker.sequence import SamplingParams, Sequence
from kernels import ops
from kernels.reference import dequantize
from kernels.types import QuantizedMatrix, matrix_bytes
from tests.gpu_worker.plain_engine import play, tokens_of
from tests.gpu_worker.sources import InProcessNearData
from tests.hand_store import build_store
from tests.tiny_checkpoints import write_tiny_checkpoint

SIZE = 384  # inputs of every matrix: groups of 32, 64, 96, 128 and 192 divide it
CASES = (("static", 32), ("paper", 96), ("fast", 128))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_checkpoint("mixtral", folder, hidden=SIZE, ffn=SIZE, experts=2, layers=1)


@pytest.fixture(scope="module")
def stores(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each case, by its recipe."""
    folder = tmp_path_factory.mktemp("stores")
    for recipe, group_size in CASES:
        config = CompressionConfig(recipe=recipe, group_size=group_size)
        compress(model, folder / recipe, config, jobs=1)
    return {recipe: folder / recipe for recipe, _ in CASES}


@pytest.mark.parametrize(("recipe", "group_size"), CASES)
def test_a_store_says_its_groups_and_verifies(
    stores: dict[str, Path], model: Path, recipe: str, group_size: int
) -> None:
    store = stores[recipe]
    manifest = load_manifest(store)
    assert manifest.recipe.group_size == group_size
    assert (
        json.loads((store / "config.json").read_text())["quantization_config"]["group_size"]
        == group_size
    )
    checked = verify(store)
    assert not checked.damage
    segment, checkpoint = Segment(store), Checkpoint(model)
    for key, info in manifest.experts.items():
        assert info.form.group_size == group_size
        (data,) = segment.fetch([RecordRequest(key, "codes")])
        mlp = parse_codes(key, data, manifest.model.expert, info.form).mlp
        weights = checkpoint.expert(key)
        energy = lost = 0.0
        for name in PROJECTIONS:
            matrix = getattr(mlp, name)
            assert matrix.group_size == group_size
            weight = getattr(weights, name)
            energy += float(weight.square().sum())
            lost += float((weight - dequantize(matrix)).square().sum())
        assert info.error == pytest.approx((lost / energy) ** 0.5, rel=1e-4)
        assert (info.restored_error < info.error) == (info.factors is not None)
    assert any(info.factors for info in manifest.experts.values()) == (recipe != "static")


@pytest.mark.parametrize("recipe", [recipe for recipe, _ in CASES])
def test_it_is_served_with_the_tokens_of_the_reference(
    stores: dict[str, Path], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts on the worker, and near the data: the kernels agree on every greedy token."""

    def tokens(client: Any = None, **config: Any) -> list[int]:
        settings = WorkerConfig(device="cpu", dtype="float32", cache_bytes=0, **config)
        engine = build_engine(stores[recipe], Segment(stores[recipe]), client, settings)
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        return tokens_of(play(engine, {0: [Sequence("a", (90, 17, 33, 4), params)]})["a"])

    expected = tokens()
    assert len(expected) == 6
    near_data = InProcessNearData(Segment(stores[recipe]), backend="cpu_fp32")
    assert tokens(near_data, near_data="all") == expected
    assert near_data.num_pairs > 0
    monkeypatch.setattr(ops, "default_backend", lambda device: "reference")
    assert tokens() == expected


@pytest.mark.parametrize("recipe", [recipe for recipe, _ in CASES])
def test_a_record_travels_entropy_coded(stores: dict[str, Path], recipe: str) -> None:
    segment = Segment(stores[recipe])
    for key, info in segment.manifest.experts.items():
        request = RecordRequest(key, "codes")
        (data,) = segment.fetch([request])
        frame = entropy_coded(data, record_sections(segment.manifest, request))
        assert torch.equal(decompress(frame, data.numel()), data)
        assert info.codes.num_bytes == data.numel()


@pytest.mark.parametrize(
    "quantizer",
    [
        lambda w, size: quantize_rtn(w, 2, grid="affine", group_size=size),
        lambda w, size: quantize_hqq(w, 2, group_size=size),
        lambda w, size: quantize_grid(w, 2, grid="affine", group_size=size),
        lambda w, size: quantize_grid(w, 2, grid="symmetric", group_size=size),
    ],
    ids=["rtn", "hqq", "grid affine", "grid symmetric"],
)
def test_smaller_groups_lose_less_and_weigh_more(quantizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, SIZE, generator=generator)
    weight *= 1 + 2 * torch.rand(64, SIZE // 32, generator=generator).repeat_interleave(32, 1)
    made: list[QuantizedMatrix] = [quantizer(weight, size) for size in (32, 64, 96, 128, 192)]
    errors = [float((weight - dequantize(matrix)).norm() / weight.norm()) for matrix in made]
    assert errors == sorted(errors)
    assert errors[-1] < 0.75
    sizes = [matrix.data.numel() for matrix in made]
    assert sizes == sorted(sizes, reverse=True)


def test_the_manifest_of_groups_of_64_does_not_name_them(tmp_path: Path) -> None:
    """So that its bytes, and the store's id, are what they were before there were others."""
    manifest = build_store(tmp_path)
    assert b"group_size" not in encode_manifest(manifest)
    assert load_manifest(tmp_path).recipe.group_size == 64


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (48, "group_size"),
        (64, "group_size"),
        (0, "group_size"),
        (8192, "group_size"),
        (256, "groups of 256 need a multiple of 256"),
        (64.0, "group_size"),
    ],
)
def test_a_manifest_with_other_groups_is_refused(
    stores: dict[str, Path], found: object, message: str
) -> None:
    text = (stores["static"] / "manifest.json").read_text()
    changed = re.sub(r'("group_size":\s*)32', rf"\g<1>{found}", text)
    assert changed != text
    with pytest.raises(StoreFormatError, match=message):
        decode_manifest(changed.encode(), "manifest")


def test_a_manifest_comes_back(stores: dict[str, Path]) -> None:
    manifest = load_manifest(stores["fast"])
    assert decode_manifest(encode_manifest(manifest), "copy") == manifest
    assert content_version(manifest) == manifest.version


@pytest.mark.parametrize(
    ("group_size", "message"),
    [
        (256, "gate of this model's experts: cols: got 384, groups of 256 need a multiple of 256"),
        (160, "groups of 160 need a multiple of 320"),
    ],
)
def test_groups_that_do_not_divide_the_experts_are_refused_at_once(
    model: Path, tmp_path: Path, group_size: int, message: str
) -> None:
    config = CompressionConfig(recipe="static", group_size=group_size)
    with pytest.raises(ValueError, match=message):
        compress(model, tmp_path / "store", config, jobs=1)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodesForm.uniform(2, group_size=48), "group_size: got 48"),
        (lambda: CodesForm.uniform(16, group_size=32), "bfloat16 has no groups"),
        (
            lambda: CodesForm("sz3", (0, 0, 0), ("affine",) * 3, (1, 1, 1), 32),
            "sz3 has no groups",
        ),
    ],
)
def test_forms_without_such_groups_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bytes_by_group_size() -> None:
    """At 2 bits affine: 3, 2.5 and 2.25 bits a weight."""
    bits = [8 * matrix_bytes(16, SIZE, 2, "affine", g) / (16 * SIZE) for g in (32, 64, 128)]
    assert bits == [3, 2.5, 2.25]
