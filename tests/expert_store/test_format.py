"""Goal: a manifest is exactly what `expert_store/format.py` says, and nothing else is read.

Method: round trips, and a table of malformed manifests; records are in `test_records.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.errors import StoreFormatError
from expert_store.format import content_version, load_manifest, save_manifest
from expert_store.manifest_json import decode_manifest, encode_manifest
from expert_store.types import CodesForm, ExpertInfo, ExpertKey, Manifest
from tests.hand_store import build_store


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return build_store(tmp_path / "store")


@pytest.fixture
def mixed(tmp_path: Path) -> Manifest:
    """Every form that tiles know: a width and a grid for each matrix, rank blocks and planes."""
    return build_store(
        tmp_path / "store",
        bits=(1, 3, 16),
        grids=("symmetric", "affine", "affine"),
        blocks="GudGgD",
        factor_bits=2,
        factor_grid="symmetric",
    )


@pytest.mark.parametrize("name", ["manifest", "mixed"])
def test_manifest_round_trips(name: str, request: Any, tmp_path: Path) -> None:
    manifest: Manifest = request.getfixturevalue(name)
    assert decode_manifest(encode_manifest(manifest), "m") == manifest
    assert load_manifest(tmp_path / "store") == manifest
    save_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == encode_manifest(manifest)


def test_every_field_of_a_recipe_round_trips(manifest: Manifest) -> None:
    recipe = replace(
        manifest.recipe,
        codec="cuszp",
        bits=2.375,
        grid="symmetric",
        factor_bits=1,
        factor_grid="symmetric",
        budget=2.5,
        calibration="0123abcd",
        error_bound="row:0.125",
    )
    changed = replace(manifest, recipe=recipe)
    changed = replace(changed, version=content_version(changed))
    assert decode_manifest(encode_manifest(changed), "m").recipe == recipe


@pytest.mark.parametrize("codec", ["sz3", "cuszp"])
def test_streams_of_any_length_round_trip(manifest: Manifest, codec: Any) -> None:
    """Records one after the other, each as long as its own parts make it."""
    experts: dict[ExpertKey, ExpertInfo] = {}
    at = dict.fromkeys(manifest.model.moe_layers, 0)
    for n, (key, info) in enumerate(manifest.experts.items()):
        parts = (64 + n, 1, 130)  # in the record 64 or 128, 64 and 192 bytes
        size = (128 if n else 64) + 64 + 192
        form = CodesForm.streams(codec, parts)
        codes = replace(info.codes, offset=at[key.layer], num_bytes=size)
        at[key.layer] += size
        experts[key] = replace(info, form=form, codes=codes)
    changed = replace(manifest, experts=experts)
    changed = replace(changed, version=content_version(changed))
    assert decode_manifest(encode_manifest(changed), "m") == changed


def test_whole_numbers_are_the_same_content_as_int_or_float(manifest: Manifest) -> None:
    whole = replace(manifest, recipe=replace(manifest.recipe, bits=2, budget=3))
    assert content_version(whole) == content_version(
        replace(manifest, recipe=replace(manifest.recipe, bits=2.0, budget=3.0))
    )


def test_version_is_of_the_content(manifest: Manifest) -> None:
    key = next(iter(manifest.experts))
    info = replace(manifest.experts[key], kurtosis=4.5)
    changed = replace(manifest, experts={**manifest.experts, key: info})
    assert content_version(changed) != content_version(manifest)


def test_a_folder_without_a_manifest_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match=r"no readable manifest\.json.*not a finished store"):
        load_manifest(tmp_path)


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set the value at a dotted path; the string "DELETE" removes the field."""

    def apply(document: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        at: Any = document
        for name in parents:
            at = at[int(name)] if isinstance(at, list) else at[name]
        if value == "DELETE":
            del at[last]
        else:
            at[int(last) if isinstance(at, list) else last] = value

    return apply


def drop_expert(document: dict[str, Any]) -> None:
    del document["experts"][2]


def repeat_expert(document: dict[str, Any]) -> None:
    document["experts"].append(document["experts"][0])


def extra_expert(document: dict[str, Any]) -> None:
    extra = json.loads(json.dumps(document["experts"][-1]))
    extra["expert"] += 1
    extra["codes"]["offset"] += 1 << 20
    extra["factors"]["offset"] += 1 << 20
    document["experts"].append(extra)


def overlap(document: dict[str, Any]) -> None:
    document["experts"][1]["codes"]["offset"] = document["experts"][0]["codes"]["offset"]


MALFORMED: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("newer", change("format_version", 3), "format version 3 is newer than 2.*upgrade moetier"),
    ("older", change("format_version", 1), "version 1, made by an older moetier.*compress the mod"),
    ("format", change("format", "zip"), "format: expected text matching moetier-store"),
    ("no version", change("version", "DELETE"), "field 'version' is missing"),
    ("version text", change("version", "x"), "version: expected"),
    ("unknown field", change("colour", 1), "unknown field 'colour'"),
    ("unknown recipe field", change("recipe.speed", 1), "recipe: unknown field 'speed'"),
    ("no recipe", change("recipe", "DELETE"), "field 'recipe' is missing"),
    ("recipe type", change("recipe", 7), "recipe: expected an object, got a number"),
    ("codec", change("recipe.codec", "zip"), r"codec: expected one of \('tiles', 'sz3', 'cuszp'\)"),
    ("recipe bits", change("recipe.bits", 33), "bits: expected a finite number >= 0 and <= 32, go"),
    ("bits true", change("recipe.bits", True), "bits: expected a number, got a boolean"),
    ("grid", change("recipe.grid", "cubic"), r"grid: expected one of \('affine', 'symmetric'\)"),
    ("factor bits", change("recipe.factor_bits", 1), r"factor_bits: expected one of \(2, 3, 4\)"),
    ("factor 3.0", change("recipe.factor_bits", 3.0), r"factor_bits: expected one of .*, got 3.0"),
    ("ladder", change("recipe.rank_ladder", [0, "16"]), "rank_ladder: expected an integer, got a"),
    ("ladder type", change("recipe.rank_ladder", 16), "rank_ladder: expected a list, got a number"),
    ("long ladder", change("recipe.rank_ladder", [0] * 65), "rank_ladder: expected at most 64 ite"),
    ("budget", change("recipe.budget", -1), "budget: expected a finite number >= 0"),
    ("no budget", change("recipe.budget", "DELETE"), "field 'budget' is missing"),
    ("calibration", change("recipe.calibration", "a b"), "calibration: expected text matching"),
    ("error bound", change("recipe.error_bound", 0.1), "error_bound: expected a string, got a num"),
    ("avg_rank", change("recipe.avg_rank", -1), "avg_rank: expected 0 to"),
    ("hidden type", change("model.expert.hidden", "64"), "hidden: expected an integer, got a str"),
    ("huge hidden", change("model.expert.hidden", 1 << 40), "hidden: expected 1 to 1048576"),
    ("float hidden", change("model.expert.hidden", 64.0), "hidden: expected an integer"),
    ("activation", change("model.expert.activation", "tanh"), "activation: expected one of"),
    ("huge layers", change("model.num_layers", 1 << 30), "num_layers: expected 1 to 4096"),
    ("layer name", change("model.moe_layers", {"01": "a"}), "num_experts: expected the same"),
    ("layer over", change("model.num_layers", 1), "moe_layers: expected layers 0 to 0"),
    ("layer path", change("model.moe_layers.0", "a/../b"), "expected text matching"),
    ("huge count", change("model.num_experts.0", 1 << 20), "expected 1 to 65536"),
    ("escape", change("experts.0.codes.file", "../../etc/passwd"), "file: expected codes/layer-0"),
    ("absolute", change("experts.0.codes.file", "/etc/passwd"), "file: expected codes/layer-0"),
    ("other layer", change("experts.0.codes.file", "codes/layer-00001.safetensors"), "file: exp"),
    ("dense escape", change("dense_files", {"../dense.safetensors": "0" * 64}), "dense_files"),
    ("dense slash", change("dense_files", {"dense/a.safetensors": "0" * 64}), "dense_files"),
    ("dense hash", change("dense_files", {"dense.safetensors": "0"}), "expected text matching"),
    ("no side files", change("side_files", "DELETE"), "'side_files' is missing; .*compress the m"),
    ("side escape", change("side_files", {"../tokenizer.json": "0" * 64}), "side_files: expected"),
    ("side dots", change("side_files", {"..": "0" * 64}), "side_files: expected file names"),
    ("side hash", change("side_files", {"tokenizer.json": 1}), "tokenizer.json: expected a string"),
    ("offset", change("experts.0.codes.offset", 3), "offset: expected a multiple of 64, got 3"),
    ("negative", change("experts.0.codes.offset", -64), "offset: expected 0 to"),
    ("huge offset", change("experts.0.codes.offset", 1 << 60), "offset: expected 0 to"),
    ("size", change("experts.0.codes.num_bytes", 64), "num_bytes: expected .* for this shape"),
    ("sha", change("experts.0.codes.sha256", "ff"), "sha256: expected text matching"),
    ("no codes", change("experts.0.codes", None), "codes: expected an object, got null"),
    ("no factors", change("experts.0.factors", None), "factors: expected an object, got null"),
    ("no factors field", change("experts.0.factors", "DELETE"), "field 'factors' is missing"),
    ("form", change("experts.0.form", [2, 2, 2]), "form: expected an object, got a list"),
    ("form codec", change("experts.0.form.codec", "zip"), "form: codec: expected one of"),
    ("form extra", change("experts.0.form.zero", 0), "form: unknown field 'zero'"),
    ("two widths", change("experts.0.form.bits", [2, 2]), "form: bits: expected 3 items, got 2"),
    (
        "width 5",
        change("experts.0.form.bits", [2, 5, 2]),
        r"form: bits of up: got 5, .* \(2, 3, 4",
    ),
    ("affine 1 bit", change("experts.0.form.bits", [1, 2, 2]), "bits of gate: got 1, .*affine"),
    ("width 2.0", change("experts.0.form.bits", [2.0, 2, 2]), "bits: expected an integer, got a n"),
    ("grids", change("experts.0.form.grids", ["affine"] * 4), "form: grids: expected 3 items, got"),
    ("a grid", change("experts.0.form.grids", ["affine", 1, "affine"]), "grids: expected one of"),
    ("symmetric", change("experts.0.form.grids.0", "symmetric"), "num_bytes: expected .* for this"),
    ("wider", change("experts.0.form.bits.2", 4), "num_bytes: expected .* for this shape"),
    ("tile parts", change("experts.0.form.part_bytes", [1, 2, 3]), "part_bytes: .*fixed lengths"),
    ("no parts", change("experts.0.form.codec", "sz3"), "bits, grids: got .* codec sz3"),
    ("repair", change("experts.0.repair", None), "repair: expected an object, got null"),
    ("repair grid", change("experts.0.repair.grid", "x"), "repair: grid: expected one of"),
    ("repair bits", change("experts.0.repair.bits", 1), r"repair: bits: expected one of \(2, 3, 4"),
    ("blocks", change("experts.0.repair.blocks", "xyz"), "blocks: expected text matching"),
    ("long blocks", change("experts.0.repair.blocks", "g" * 5000), "blocks: expected at most 4096"),
    (
        "other blocks",
        change("experts.0.repair.blocks", "gudG"),
        "num_bytes: expected .* for this",
    ),
    ("spare factors", change("experts.0.repair.blocks", ""), "factors: expected null"),
    ("few gains", change("experts.0.block_gains", [0.1]), "block_gains: expected 4 items, got 1"),
    ("gain", change("experts.0.block_gains.1", "x"), "block_gains: expected a number, got a str"),
    ("huge gain", change("experts.0.block_gains.1", 1e9), "block_gains: expected a finite number"),
    ("huge int", change("experts.0.kurtosis", 10**400), "kurtosis: expected a finite number >= 0"),
    ("kurtosis", change("experts.0.kurtosis", "3"), "kurtosis: expected a number, got a string"),
    ("negative error", change("experts.0.error", -0.5), "error: expected a finite number >= 0"),
    ("experts type", change("experts", {}), "experts: expected a list, got an object"),
    ("missing expert", drop_expert, "1 of 6 experts are missing, first layer 0 expert 2"),
    ("twice", repeat_expert, "layer 0 expert 0 is listed twice"),
    ("extra", extra_expert, "1 experts that the model does not have, first layer 1 expert 3"),
    ("overlap", overlap, "the records of layer 0 expert 0 and layer 0 expert 1 overlap"),
    ("edited", change("experts.0.kurtosis", 99.0), "its content hashes to"),
]


STREAMS: list[tuple[str, dict[str, Any], str]] = [
    ("no lengths", {"part_bytes": None}, "part_bytes: got None, expected three lengths"),
    ("two lengths", {"part_bytes": [1, 2]}, "part_bytes: expected 3 items, got 2"),
    ("an empty part", {"part_bytes": [1, 0, 1]}, "part_bytes: got .*at least 1 for codec cuszp"),
    ("a text", {"part_bytes": [1, "2", 1]}, "part_bytes: expected an integer, got a string"),
    ("huge", {"part_bytes": [1, 1 << 60, 1]}, "part_bytes: expected 0 to"),
    ("other lengths", {"part_bytes": [9, 9, 9]}, "num_bytes: expected 192 for this shape"),
    ("with bits", {"bits": [2, 0, 0]}, "bits, grids: got .* expected 0 and affine for codec cuszp"),
    ("a grid", {"grids": ["affine", "affine", "symmetric"]}, "expected 0 and affine"),
]


@pytest.mark.parametrize(
    ("fields", "message"), [row[1:] for row in STREAMS], ids=[row[0] for row in STREAMS]
)
def test_malformed_streams(
    manifest: Manifest, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "store" / "manifest.json"
    document = json.loads(path.read_text())
    form = {"codec": "cuszp", "bits": [0, 0, 0], "grids": ["affine"] * 3, "part_bytes": [1, 1, 1]}
    document["experts"][0]["form"] = form | fields
    path.write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match=message) as caught:
        load_manifest(tmp_path / "store")
    assert f"{path}: experts[0]" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED]
)
def test_malformed_manifest(manifest: Manifest, edit: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "store" / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match=message) as caught:
        load_manifest(tmp_path / "store")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-40], "not valid JSON"),
        (lambda text: b"", "not valid JSON"),
        (lambda text: b"\xff" + text, "not valid JSON"),
        (lambda text: b"[" * 100_000, "not valid JSON"),
        (lambda text: b"[]", "expected an object, got a list"),
        (lambda text: b'{"format": "a", "format": "b"}', "duplicate key 'format'"),
        (lambda text: text.replace(b'"error":', b'"error":NaN,"error":', 1), "NaN is not a JSON"),
    ],
)
def test_manifest_that_is_not_json(
    manifest: Manifest, spoil: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "store" / "manifest.json"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(StoreFormatError, match=message):
        load_manifest(tmp_path / "store")


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 1 << 30), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_manifest_is_noticed(small_manifest: bytes, at: int, bit: int) -> None:
    spoiled = bytearray(small_manifest)
    spoiled[at % len(spoiled)] ^= 1 << bit
    try:
        found = decode_manifest(bytes(spoiled), "m")
    except StoreFormatError:
        return
    # Only white space may change without changing the content.
    assert encode_manifest(found) == small_manifest


@pytest.fixture(scope="session")
def small_manifest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("small")
    return encode_manifest(build_store(folder / "store", layers=(0,), experts=1))
