"""Goal: the store's format is exactly what `expert_store/format.py` says, and nothing else is read.

Method: golden bytes, a round-trip property over shapes and blocks, a table of malformed manifests.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.errors import StoreFormatError
from expert_store.files import layout
from expert_store.format import (
    FactorBlock,
    codes_bytes,
    content_version,
    encode_codes,
    encode_factors,
    factors_bytes,
    load_manifest,
    parse_codes,
    parse_factors,
    save_manifest,
)
from expert_store.manifest_json import decode_manifest, encode_manifest
from expert_store.types import PROJECTIONS, ExpertKey, ExpertShape, Manifest
from kernels.packing import pack, pack_bf16
from kernels.reference import dequantize, dequantize_low_rank
from kernels.types import GatedMLP, QuantizedMatrix
from tests.hand_store import build_store

KEY = ExpertKey(3, 7)


def ramp_matrix(rows: int, cols: int, bits: int, step: int) -> QuantizedMatrix:
    """A matrix that needs no random numbers: golden bytes must not depend on a generator."""
    numbers = torch.arange(rows * cols).view(rows, cols)
    if bits == 16:
        return pack_bf16((numbers % 251).float() * step)
    codes = ((numbers * step) % (1 << bits)).to(torch.uint8)
    groups = torch.arange(rows * (cols // 64)).view(rows, -1)
    return pack(codes, 0.5 + (groups % 8) / 16, (groups % 4).float(), bits)


def ramp_mlp(shape: ExpertShape, bits: int) -> GatedMLP:
    biases: dict[str, torch.Tensor] = {}
    if shape.has_bias:
        biases = {
            f"{name}_bias": torch.arange(shape.projection(name)[0]).float() for name in PROJECTIONS
        }
    matrices = {
        name: ramp_matrix(*shape.projection(name), bits, step)
        for step, name in enumerate(PROJECTIONS, start=1)
    }
    return GatedMLP(**matrices, activation=shape.activation, **biases)


def ramp_block(shape: ExpertShape, name: str, bits: int, step: int) -> FactorBlock:
    rows, cols = shape.projection(name)
    return FactorBlock(
        name, ramp_matrix(16, cols, bits, step), ramp_matrix(16, rows, bits, step + 1)
    )


@pytest.mark.parametrize(
    ("bits", "has_bias", "num_bytes", "sha256"),
    [
        (2, False, 7680, "2-False"),
        (3, True, 12032, "3-True"),
        (4, False, 13824, "4-False"),
        (16, True, 50432, "16-True"),
    ],
)
def test_golden_codes_record(bits: int, has_bias: bool, num_bytes: int, sha256: str) -> None:
    shape = ExpertShape(hidden=64, ffn=128, activation="silu", has_bias=has_bias)
    record = encode_codes(ramp_mlp(shape, bits))
    assert record.numel() == num_bytes == codes_bytes(shape, bits)
    assert hashlib.sha256(record.numpy()).hexdigest() == GOLDEN[sha256]


def test_biases_lie_last_as_little_endian_floats() -> None:
    shape = ExpertShape(hidden=64, ffn=128, activation="silu", has_bias=True)
    record = bytes(encode_codes(ramp_mlp(shape, 2)).numpy())
    ramps = [struct.pack(f"<{n}f", *range(n)) for n in (128, 128, 64)]
    assert record[7680:] == b"".join(ramps)


def test_golden_factors_record() -> None:
    shape = ExpertShape(hidden=64, ffn=128, activation="silu", has_bias=False)
    blocks = [ramp_block(shape, name, 3, i) for i, name in enumerate(("up", "gate", "down", "up"))]
    record = encode_factors(blocks)
    assert record.numel() == 4 * 3 * 448
    assert hashlib.sha256(record.numpy()).hexdigest() == GOLDEN["factors"]


def test_golden_container_header() -> None:
    header, entries = layout([("expert-00000", "U8", (128,), 128)], {"format": "pt"})
    assert header == (
        (120).to_bytes(8, "little")
        + b'{"__metadata__":{"format":"pt"},'
        + b'"expert-00000":{"dtype":"U8","shape":[128],"data_offsets":[0,128]}}'
        + b" " * 21
    )
    assert entries[0].start == 128


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.integers(1, 3).map(lambda n: 64 * n),
    ffn=st.integers(1, 3).map(lambda n: 64 * n),
    bits=st.sampled_from((2, 3, 4, 16)),
    factor_bits=st.sampled_from((2, 3, 4)),
    has_bias=st.booleans(),
    blocks=st.lists(st.sampled_from(PROJECTIONS), max_size=6),
    seed=st.integers(0, 1 << 30),
)
def test_records_round_trip(hidden, ffn, bits, factor_bits, has_bias, blocks, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = ExpertShape(hidden=hidden, ffn=ffn, activation="gelu", has_bias=has_bias)
    mlp = ramp_mlp(shape, bits)
    # A view at an odd offset, as the wire may give it.
    padded = torch.randint(0, 256, (codes_bytes(shape, bits) + 3,), generator=generator)
    padded = padded.to(torch.uint8)
    padded[3:] = encode_codes(mlp)
    codes = parse_codes(KEY, padded[3:], shape, bits)
    assert (codes.key, codes.num_bytes) == (KEY, codes_bytes(shape, bits))
    for name in PROJECTIONS:
        assert torch.equal(getattr(codes.mlp, name).data, getattr(mlp, name).data)
        want, got = getattr(mlp, f"{name}_bias"), getattr(codes.mlp, f"{name}_bias")
        assert (want is None) == (got is None) == (not has_bias)
        assert want is None or torch.equal(want, got)
    parts = [ramp_block(shape, name, factor_bits, i) for i, name in enumerate(blocks)]
    record = encode_factors(parts)
    for count in range(len(blocks) + 1):
        size = factors_bytes(shape, blocks[:count], factor_bits)
        assert size % 64 == 0
        compensator = parse_factors(KEY, record[:size], shape, blocks[:count], factor_bits)
        for name in PROJECTIONS:
            own = [part for part in parts[:count] if part.projection == name]
            left, right = dequantize_low_rank(getattr(compensator.factors, name))
            assert getattr(compensator.factors, name).rank == 16 * len(own)
            for i, part in enumerate(own):
                rows = slice(16 * i, 16 * i + 16)
                assert torch.equal(right[rows], dequantize(part.right))
                assert torch.equal(left[:, rows], dequantize(part.left_t).T)


@pytest.mark.parametrize("wrong", [-1, 1, -64, 64])
def test_a_record_of_the_wrong_length_is_refused(wrong: int) -> None:
    shape = ExpertShape(hidden=64, ffn=64, activation="silu", has_bias=False)
    size = codes_bytes(shape, 2) + wrong
    with pytest.raises(StoreFormatError, match=f"codes record of layer 3 expert 7.* got {size}"):
        parse_codes(KEY, torch.zeros(size, dtype=torch.uint8), shape, 2)
    size = factors_bytes(shape, ["up"], 3) + wrong
    with pytest.raises(StoreFormatError, match=f"factors record of layer 3 expert 7.* got {size}"):
        parse_factors(KEY, torch.zeros(size, dtype=torch.uint8), shape, ["up"], 3)


def test_half_a_set_of_biases_is_refused() -> None:
    shape = ExpertShape(hidden=64, ffn=64, activation="silu", has_bias=True)
    with pytest.raises(ValueError, match="biases"):
        encode_codes(replace(ramp_mlp(shape, 2), up_bias=None))
    with pytest.raises(ValueError, match="bits.*up 3"):
        encode_codes(replace(ramp_mlp(shape, 2), up=ramp_matrix(64, 64, 3, 1)))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return build_store(tmp_path / "store")


def test_manifest_round_trips(manifest: Manifest, tmp_path: Path) -> None:
    assert decode_manifest(encode_manifest(manifest), "m") == manifest
    assert load_manifest(tmp_path / "store") == manifest
    save_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == encode_manifest(manifest)


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
    ("newer", change("format_version", 2), "format version 2 is newer than 1.*upgrade moetier"),
    ("format", change("format", "zip"), "format: expected text matching moetier-store"),
    ("no version", change("version", "DELETE"), "field 'version' is missing"),
    ("version text", change("version", "x"), "version: expected"),
    ("unknown field", change("colour", 1), "unknown field 'colour'"),
    ("unknown recipe field", change("recipe.speed", 1), "recipe: unknown field 'speed'"),
    ("no recipe", change("recipe", "DELETE"), "field 'recipe' is missing"),
    ("recipe type", change("recipe", 7), "recipe: expected an object, got a number"),
    ("bits", change("recipe.bits", 5), r"bits: expected one of \(1, 2, 3, 4, 16\), got 5"),
    ("bits true", change("recipe.bits", True), "bits: expected one of"),
    ("group", change("recipe.group_size", 48), r"group_size: expected one of \(64,\), got 48"),
    ("ladder", change("recipe.rank_ladder", [0, "16"]), "rank_ladder: expected integers"),
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
    ("blocks", change("experts.0.blocks", "xyz"), "blocks: expected text matching"),
    ("spare factors", change("experts.0.blocks", ""), "factors: expected null"),
    ("kurtosis", change("experts.0.kurtosis", "3"), "kurtosis: expected a number, got a string"),
    ("negative error", change("experts.0.error", -0.5), "error: expected a finite number >= 0"),
    ("experts type", change("experts", {}), "experts: expected a list, got an object"),
    ("missing expert", drop_expert, "1 of 6 experts are missing, first layer 0 expert 2"),
    ("twice", repeat_expert, "layer 0 expert 0 is listed twice"),
    ("extra", extra_expert, "1 experts that the model does not have, first layer 1 expert 3"),
    ("overlap", overlap, "the records of layer 0 expert 0 and layer 0 expert 1 overlap"),
    ("edited", change("experts.0.kurtosis", 99.0), "its content hashes to"),
]


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


GOLDEN = {
    "2-False": "65145afcc4d467b5b6418c4eb6209064084c522b1f0d089deeaf55739b04101c",
    "3-True": "d5bdaa9e2b550e2e19a70616f1083de82d06c41a960829902022ba34f72e820d",
    "4-False": "aac6366a221a93f8475f80a666bda84ee06f7a4a05108ddaa2bfa3e525127a9c",
    "16-True": "83b0156d5eb661e771d8a3d9b5d918bfb60a9040d2939c31f07bfddf98caad0e",
    "factors": "3ea31668755af9edf5fb48c93615641f9aa3073d9440bd66c0c834f2260974cd",
}
