"""Goal: a calibration comes back as it was written, or not at all; and an expert that saw little
gets what its layer saw.

Method: random statistics through files, in every form; every kind of damage; shrinkage against
what the formulas say for no, few and many tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.calibration import Calibration, is_calibration, recoloured, save_calibration
from expert_store.calibration_file import CALIBRATION_FILE, layer_file
from expert_store.errors import CorruptRecordError, StoreFormatError, StoreWriteError
from expert_store.files import Disk
from expert_store.matrix.moments import Moment
from expert_store.statistics import MomentForms, moment_bytes
from expert_store.types import ExpertKey, ExpertShape, ModelInfo
from tests.expert_store.calibrations import (
    FULL,
    build_calibration,
    calibration_parts,
    random_moment,
)

BLOCKS = MomentForms("blocks", "blocks", "blocks")
MIXED = MomentForms("full", "blocks", "blocks")


@pytest.mark.parametrize("forms", [FULL, BLOCKS, MIXED])
def test_round_trip(forms: MomentForms, tmp_path: Path) -> None:
    info, tensors = calibration_parts(forms=forms)
    written = save_calibration(tmp_path / "c", info, tensors)
    read = Calibration(tmp_path / "c")
    assert read.info == info
    assert read.id == written.id
    assert dict(read.layer_sensitivity) == {0: 0.1, 2: pytest.approx(0.3)}
    for layer, expected in tensors.items():
        found, pooled = read._tensors(layer)
        for name in expected.__dataclass_fields__:
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.equal(pooled.values, expected.pooled)


def test_the_id_names_every_number(tmp_path: Path) -> None:
    info, tensors = calibration_parts()
    ids = {save_calibration(tmp_path / "a", info, tensors).id}
    assert save_calibration(tmp_path / "again", info, tensors).id in ids
    tensors[2].middle_E[0, 3, 3] += 1e-3
    ids.add(save_calibration(tmp_path / "b", info, tensors).id)
    ids.add(save_calibration(tmp_path / "c", replace(info, seed=1), tensors).id)
    ids.add(save_calibration(tmp_path / "d", replace(info, sensitivity=None), tensors).id)
    assert len(ids) == 4
    assert not Calibration(tmp_path / "d").layer_sensitivity


def test_an_expert_that_no_token_reached_sees_what_its_layer_saw(tmp_path: Path) -> None:
    info, tensors = calibration_parts(tokens=(1000, 0, 60))
    unreached = save_calibration(tmp_path / "c", info, tensors).expert(ExpertKey(0, 1))
    torch.testing.assert_close(unreached.moment_in.values, tensors[0].pooled)
    torch.testing.assert_close(
        unreached.moment_mid.values, torch.diag(tensors[0].sample_middle_EF[1])
    )
    assert torch.equal(unreached.gate_weight_F, tensors[0].sample_gate_weight_EF[1])
    assert torch.equal(unreached.up_weight_F, tensors[0].sample_up_weight_EF[1])
    assert (unreached.num_tokens, unreached.use, unreached.use_weight2) == (0, 0, 0)


def test_many_tokens_are_believed_and_few_are_not(tmp_path: Path) -> None:
    info, tensors = calibration_parts(tokens=(1_000_000, 2, 60))
    calibration = save_calibration(tmp_path / "c", info, tensors)
    many, few = (calibration.expert(ExpertKey(2, expert)) for expert in (0, 1))
    own, pooled = tensors[2].input_E, tensors[2].pooled
    torch.testing.assert_close(many.moment_in.values, own[0], rtol=1e-2, atol=1e-3)
    assert torch.dist(few.moment_in.values, pooled) < 0.1 * torch.dist(own[1], pooled)
    torch.testing.assert_close(many.gate_weight_F, tensors[2].gate_weight_EF[0], rtol=1e-3, atol=0)
    drawn = 64 / 66 * tensors[2].sample_gate_weight_EF[1] + 2 / 66 * tensors[2].gate_weight_EF[1]
    torch.testing.assert_close(few.gate_weight_F, drawn)
    assert many.use == pytest.approx(1_000_000 / 1_000_062)
    assert many.use_weight2 == pytest.approx(0.5 * many.use)


def test_blocks_of_an_expert_colour_the_full_pool(tmp_path: Path) -> None:
    info, tensors = calibration_parts(forms=MIXED, tokens=(1_000_000, 0, 60))
    calibration = save_calibration(tmp_path / "c", info, tensors)
    moment = calibration.expert(ExpertKey(0, 0)).moment_in
    assert moment.is_full
    torch.testing.assert_close(moment.block_diagonal(), tensors[0].input_E[0], rtol=2e-2, atol=2e-3)
    assert torch.linalg.eigvalsh(moment.values).min() > 0
    assert float(moment.values[:64, 64:].abs().max()) > 0.05, "what groups have in common is kept"
    unreached = calibration.expert(ExpertKey(0, 1)).moment_in
    torch.testing.assert_close(unreached.values, tensors[0].pooled, rtol=1e-3, atol=1e-4)


def test_recolouring_scales_and_survives_dead_inputs() -> None:
    pooled = Moment(random_moment(128, "full", torch.Generator().manual_seed(3)))
    louder = recoloured(pooled, Moment(4 * pooled.block_diagonal()))
    torch.testing.assert_close(louder.values, 4 * pooled.values, rtol=1e-3, atol=1e-3)
    dead = pooled.values.clone()
    dead[5], dead[:, 5] = 0, 0
    found = recoloured(Moment(dead), Moment(Moment(dead).block_diagonal()))
    torch.testing.assert_close(found.values, dead, rtol=1e-3, atol=1e-3)
    silent = recoloured(Moment(torch.zeros(128, 128)), Moment(torch.zeros(2, 64, 64)))
    assert bool(silent.values.isfinite().all())


def model_info(**changes: Any) -> ModelInfo:
    """The model that `calibration_parts` says it is of."""
    shape = ExpertShape(hidden=128, ffn=64, activation="silu", has_bias=False)
    model = ModelInfo(
        name="by hand",
        model_type="mixtral",
        num_layers=3,
        top_k=2,
        vocab_size=128,
        max_positions=256,
        expert=shape,
        moe_layers={0: "a", 2: "b"},
        num_experts={0: 3, 2: 3},
    )
    return replace(model, **changes)


def test_another_models_calibration_is_refused(tmp_path: Path) -> None:
    calibration = build_calibration(tmp_path / "c")
    calibration.check_model(model_info())
    wider = ExpertShape(hidden=128, ffn=128, activation="silu", has_bias=False)
    for changes, field in (
        ({"name": "other"}, "name is by hand, expected other"),
        ({"model_type": "olmoe"}, "model_type"),
        ({"top_k": 1}, "top_k is 2, expected 1"),
        ({"num_experts": {0: 3, 2: 4}}, "num_experts"),
        ({"num_experts": {0: 3}}, "num_experts"),
        ({"expert": wider}, "expert"),
    ):
        with pytest.raises(ValueError, match=f"of another model: its {field}"):
            calibration.check_model(model_info(**changes))
    for key in (ExpertKey(1, 0), ExpertKey(0, 3), ExpertKey(0, -1)):
        with pytest.raises(KeyError):
            calibration.expert(key)


def test_a_damaged_layer_is_found_when_it_is_read(tmp_path: Path) -> None:
    calibration = build_calibration(tmp_path / "c")
    path = tmp_path / "c" / layer_file(2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    calibration.expert(ExpertKey(0, 0))
    with pytest.raises(CorruptRecordError, match=r"layer-00002.*expected sha256"):
        calibration.expert(ExpertKey(2, 0))
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreFormatError, match="reaches past"):
        calibration.expert(ExpertKey(2, 0))
    path.unlink()
    with pytest.raises(StoreFormatError, match="layer-00002"):
        calibration.expert(ExpertKey(2, 0))


def test_layer_files_of_another_calibration_are_refused(tmp_path: Path) -> None:
    calibration = build_calibration(tmp_path / "c")
    build_calibration(tmp_path / "other", seed=1)
    (tmp_path / "other" / layer_file(0)).rename(tmp_path / "c" / layer_file(0))
    with pytest.raises(CorruptRecordError, match="of another calibration"):
        calibration.expert(ExpertKey(0, 0))


def _change(value: dict[str, Any], *path: str | int, to: Any) -> dict[str, Any]:
    at: Any = value
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = to
    return value


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("format",), "moetier-store", "no calibration"),
        (("format_version",), 1, "expected 2, got 1; run `moetier calibrate` again"),
        (("id",), "0" * 64, "id does not match"),
        (("num_tokens",), 7, "id does not match"),
        (("forms", "input"), "half", "forms: input"),
        (("model", "top_k"), 0, "top_k: expected 1"),
        (("model", "extra"), 1, "unknown field 'extra'"),
        (("model", "num_experts", "x"), 1, "a layer number"),
        (("layers", 0, "layer"), 2, "each of .0, 2. once"),
        (("layers", 1), 5, "expected an object"),
        (("layers",), [], "layer 0 is missing"),
        (("layers", 0, "tokens"), [1, 2], "3 counts"),
        (("layers", 0, "tokens"), [1, 2, -3], "3 counts"),
        (("layers", 0, "skew"), [0.5], "2 finite numbers"),
        (("layers", 0, "use_at"), [[0.5, 0.1]], "3 rows"),
        (("layers", 0, "weight2_at", 0), [0.5, "x"], "2 finite numbers"),
        (("sensitivity", "layers"), {"0": 1.0}, "each of"),
        (("alike",), 1, "alike"),
        (("texts", 0, "sha256"), "x", "sha256"),
    ],
)
def test_a_changed_json_is_refused(
    path: tuple[str | int, ...], to: Any, message: str, tmp_path: Path
) -> None:
    build_calibration(tmp_path)
    file = tmp_path / CALIBRATION_FILE
    file.write_text(json.dumps(_change(json.loads(file.read_text()), *path, to=to)))
    with pytest.raises(StoreFormatError, match=message):
        Calibration(tmp_path)


def test_a_folder_without_a_calibration(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match="not a calibration: make one with `moetier cal"):
        Calibration(tmp_path)
    (tmp_path / CALIBRATION_FILE).write_text("{")
    with pytest.raises(StoreFormatError, match="not valid JSON"):
        Calibration(tmp_path)


def test_a_finished_calibration_is_not_overwritten(tmp_path: Path) -> None:
    build_calibration(tmp_path)
    with pytest.raises(StoreFormatError, match="holds a calibration already"):
        build_calibration(tmp_path, seed=1)
    info, tensors = calibration_parts()
    with pytest.raises(ValueError, match=r"tables of \[0, 2\], but tensors of \[0\]"):
        save_calibration(tmp_path / "new", info, {0: tensors[0]})


def test_a_write_that_fails_leaves_no_calibration(tmp_path: Path) -> None:
    class FullDisk(Disk):
        def __init__(self, fail_at: int) -> None:
            self.left = fail_at

        def open(self, path: Path) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return super().open(path)

    info, tensors = calibration_parts()
    for fail_at in range(3):  # two layers, then the JSON
        with pytest.raises(StoreWriteError, match="the disk is full"):
            save_calibration(tmp_path / "c", info, tensors, FullDisk(fail_at))
        assert not is_calibration(tmp_path / "c")
    assert is_calibration(save_calibration(tmp_path / "c", info, tensors, FullDisk(3)).folder)


@pytest.mark.parametrize(
    ("hidden", "ffn", "layers", "experts", "expected", "megabytes"),
    [
        (576, 1536, 30, 4, FULL, 40 + 159 + 1132),  # smol-moe
        (4096, 14336, 32, 8, BLOCKS, 34 + 268 + 940),  # Mixtral-8x7B
        (2048, 1408, 26, 64, MIXED, 436 + 872 + 600),  # DeepSeek-V2-Lite
        (384, 320, 6, 8, FULL, 4 + 28 + 20),  # mixtral-mini
    ],
)
def test_forms_keep_large_models_small(
    hidden: int, ffn: int, layers: int, experts: int, expected: MomentForms, megabytes: int
) -> None:
    """The arithmetic of `expert_store/calibration_file.py`."""
    shape = ExpertShape(hidden=hidden, ffn=ffn, activation="silu", has_bias=False)
    counts = dict.fromkeys(range(layers), experts)
    forms = MomentForms.of(model_info(expert=shape, num_experts=counts))
    assert forms == expected
    total = layers * moment_bytes(hidden, forms.pooled) + layers * experts * (
        moment_bytes(hidden, forms.input) + moment_bytes(ffn, forms.middle)
    )
    assert total / 1e6 == pytest.approx(megabytes, rel=0.01)
    tight = MomentForms.of(model_info(expert=shape, num_experts=counts), full_bytes=1)
    assert (tight.input, tight.middle) == ("blocks", "blocks")
